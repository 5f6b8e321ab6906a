"""The tokenizer with tokens for media."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.data.processors.media_text import MediaTokenizer, count_placeholders, split_placeholders
from glowflow.data.processors.text import ByteTokenizer, WordTokenizer, tokenizer_from_spec, train_tokenizer

TEXTS = st.lists(
    st.one_of(st.sampled_from(["<image>", "<audio>"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    max_size=8,
).map("".join)


@given(TEXTS)
def test_bytes_with_media_come_back(text: str) -> None:
    tokenizer = MediaTokenizer(ByteTokenizer())
    ids = tokenizer.encode_sample(text)
    assert tokenizer.decode(ids) == text
    counts = count_placeholders(text)
    assert [int((ids == 257 + i).sum()) for i in range(2)] == [counts["image"], counts["audio"]]
    assert "".join(split_placeholders(text)) == text
    plain = sum(len(part.encode()) for part in split_placeholders(text) if part not in ("<image>", "<audio>"))
    assert len(ids) == plain + sum(counts.values())


def test_plain_text_keeps_a_literal_placeholder() -> None:
    tokenizer = MediaTokenizer(ByteTokenizer())
    assert tokenizer.encode("<image>").tolist() == list(b"<image>")
    assert tokenizer.encode_sample("<image>").tolist() == [257]
    assert tokenizer.encode_document("a<image>").tolist() == [256, *b"a<image>", 256]
    assert tokenizer.encode_pieces(["<audio>"], [True])[0].tolist() == list(b"<audio>")


def test_words_and_their_ends() -> None:
    tokenizer = MediaTokenizer(WordTokenizer(["<eos>", "<unk>", "a", "dog"]))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (6, 0, 0, 1)
    ids = tokenizer.encode_sample("<image> <audio> a dog<image>")
    assert ids.tolist() == [4, 5, 2, 3, 4] and ids.dtype == np.uint8
    assert tokenizer.decode(ids) == "<image> <audio> a dog <image>"


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "bpe"])
def test_it_is_rebuilt_from_its_spec(kind: str) -> None:
    tokenizer = MediaTokenizer(train_tokenizer(kind, ["some words of text"] * 3, 300 if kind == "bpe" else None))
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert isinstance(again, MediaTokenizer) and again.fingerprint == tokenizer.fingerprint
    text = "some <audio>words<image>"
    assert again.encode_sample(text).tolist() == tokenizer.encode_sample(text).tolist()
    assert again.media_ids == {"<image>": again.vocab_size - 2, "<audio>": again.vocab_size - 1}
    widths = again.token_bytes()
    assert widths is None or (len(widths) == again.vocab_size and widths[-2:].tolist() == [0, 0])


def test_a_narrow_base_grows_into_a_wider_type() -> None:
    base = WordTokenizer(["<eos>", "<unk>", *(f"w{n}" for n in range(253))])
    assert base.dtype == np.uint8 and MediaTokenizer(base).dtype == np.uint16
    assert MediaTokenizer(base).encode("w252").dtype == np.uint16


def test_specs_that_do_not_fit() -> None:
    spec = MediaTokenizer(ByteTokenizer()).spec()
    for change in ({"media": ["<video>"]}, {"vocab_size": 258}, {"base": {"kind": "morse"}}, {"base": spec}):
        with pytest.raises(DataError):
            tokenizer_from_spec({**spec, **change})
    del spec["base"]
    with pytest.raises(DataError, match="base"):
        tokenizer_from_spec(spec)
