"""Tokenizers: round trips, specs, determinism, and the published word counts' rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.data.processors.text import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer_file,
    parse_request,
    tokenizer_from_spec,
    train_tokenizer,
)

TEXTS = ["def area(width, height):\n    return width * height\n", "naïve café – 戦場 🙂\n\tdef f(x): return x\n"] * 8
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer("bpe", TEXTS, 300)


def all_kinds() -> list[Tokenizer]:
    return [train_tokenizer(kind, TEXTS, 300 if kind == "bpe" else None) for kind in ("bytes", "chars", "words", "bpe")]


@given(UNICODE)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == tokenizer.num_bytes(text) == len(text.encode())


@settings(deadline=None)
@given(UNICODE)
def test_bpe_writes_any_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    widths = bpe.token_bytes()
    assert widths is not None and widths[ids].sum() == bpe.num_bytes(text)


@given(UNICODE, UNICODE)
def test_chars_round_trip_and_unknown(known: str, text: str) -> None:
    tokenizer = CharTokenizer(known)
    assert tokenizer.decode(tokenizer.encode(known)) == known
    expected = "".join(char if char in known else "\ufffd" for char in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert np.count_nonzero(tokenizer.encode(text) == tokenizer.unk_id) == sum(char not in known for char in text)


def test_words_count_newlines_and_unknown() -> None:
    tokenizer = train_tokenizer("words", ["b a b \n = T = \n"])
    assert isinstance(tokenizer, WordTokenizer)
    assert tokenizer.words == ["<eos>", "<unk>", "=", "b", "T", "a"]
    assert tokenizer.encode("a zebra\n\nb").tolist() == [5, 1, 0, 0, 3]
    assert tokenizer.decode([5, 1, 0, 3]) == "a <unk> \n b"
    assert tokenizer.encode_document("a\n").tolist() == [0, 5, 0]  # <eos> begins a document, none is added at its end


def test_words_vocabulary_size_keeps_the_most_frequent() -> None:
    tokenizer = train_tokenizer("words", ["a a a b b c"], 4)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("a b c").tolist() == [2, 3, 1]


@pytest.mark.parametrize("tokenizer", all_kinds(), ids=lambda tokenizer: tokenizer.kind)
def test_spec_rebuilds_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.bos_id, again.eos_id) == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    for text in TEXTS[:2]:
        assert np.array_equal(again.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("tokenizer", all_kinds(), ids=lambda tokenizer: tokenizer.kind)
def test_documents_and_types(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0])
    document = tokenizer.encode_document(TEXTS[0])
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    assert document.tolist() == [tokenizer.bos_id, *ids.tolist(), *ends]
    assert document.dtype == ids.dtype == tokenizer.dtype
    assert tokenizer.vocab_size <= np.iinfo(tokenizer.dtype).max + 1
    batch = tokenizer.encode_batch(TEXTS)
    assert all(np.array_equal(one, tokenizer.encode(text)) for one, text in zip(batch, TEXTS, strict=True))


def test_dtype_is_the_narrowest() -> None:
    assert ByteTokenizer().dtype == np.uint16  # 257 ids
    assert CharTokenizer("abc").dtype == np.uint8
    assert WordTokenizer(["<eos>", "<unk>", *(str(i) for i in range(70_000))]).dtype == np.uint32


def test_bpe_training_is_deterministic_and_bounded() -> None:
    first, second = (train_tokenizer("bpe", list(TEXTS), 280) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 280
    assert train_tokenizer("bpe", TEXTS, 290).fingerprint != first.fingerprint


def test_special_token_inside_text_is_text(bpe: Tokenizer) -> None:
    text = f"a{END_OF_TEXT}b"
    ids = bpe.encode(text)
    assert bpe.bos_id not in ids.tolist()
    assert bpe.decode(ids) == text
    assert bpe.decode(bpe.encode_document("ab")) == "ab"


def test_invalid_ids_decode_to_something() -> None:
    assert ByteTokenizer().decode([0xE2, 0x82, 256, 65]) == "\ufffdA"
    assert CharTokenizer("ab").decode([0, 1, 2, 3]) == "ab\ufffd"


def test_path_of_a_tokenizer_json(tmp_path: Path, bpe: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.spec()["tokenizer_json"])
    assert parse_request(str(path)) == ("bpe", None, path)
    assert parse_request(str(tmp_path)) == ("bpe", None, path)
    loaded = load_tokenizer_file(path)
    assert np.array_equal(loaded.encode(TEXTS[0]), bpe.encode(TEXTS[0]))
    assert loaded.fingerprint == load_tokenizer_file(path).fingerprint


def test_foreign_tokenizer_gets_a_document_boundary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    engine = Engine(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer_file(tmp_path / "t.json")
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode_document("b a").tolist() == [3, 1, 0, 3]
    assert tokenizer.token_bytes() is None
    assert tokenizer_from_spec(tokenizer.spec()).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("request_", ["bite", "bpe:12", "bytes:300", "bpe:many", "words:1", "", "no/such/file.json"])
def test_bad_requests(request_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        parse_request(request_)


def test_good_requests() -> None:
    assert parse_request("bytes") == ("bytes", None, None)
    assert parse_request("bpe") == ("bpe", None, None)
    assert parse_request("bpe:512") == ("bpe", 512, None)
    assert parse_request("words:100") == ("words", 100, None)


@pytest.mark.parametrize("spec", [{}, {"kind": "morse"}, {"kind": "chars"}, {"kind": "words", "words": ["a", "a"]}])
def test_bad_specs(spec: dict[str, object]) -> None:
    with pytest.raises(DataError):
        tokenizer_from_spec(spec)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"no valid tokenizer\.json"):
        load_tokenizer_file(path)
    with pytest.raises(DataError):
        BpeTokenizer("not json")
