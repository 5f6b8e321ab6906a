"""llama2.c's tokenizer: equal to its algorithm written out, exact round trips, and what is no tokenizer.bin."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.data.datasets.documents import Piece, cut_text
from glowflow.data.processors.llama2c import Llama2cTokenizer
from glowflow.data.processors.text import Tokenizer, load_tokenizer_file, parse_request, tokenizer_from_spec
from glowflow.data.shards import PieceEncoder
from tests.core.foreign import VOCABULARY, tokenizer_bin

UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
NEAR = st.text(st.sampled_from("abthequick  é🙂戦\n"), max_size=40)


def pieces_of(content: bytes) -> list[tuple[bytes, float]]:
    found, at = [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        found.append((content[at + 8 : at + 8 + length], score))
        at += 8 + length
    return found


def encode_by_hand(text: str, content: bytes) -> list[int]:
    """``encode`` of run.c, step by step: merge the best pair of the whole text until there is none."""
    pieces = pieces_of(content)
    lookup = {piece: index for index, (piece, _) in reversed(list(enumerate(pieces)))}
    if not text:
        return []
    ids = [lookup[b" "]]
    for character in text:
        known = lookup.get(character.encode())
        ids += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for at in range(len(ids) - 1):
            merged = lookup.get(pieces[ids[at]][0] + pieces[ids[at + 1]][0], -1)
            if merged != -1 and pieces[merged][1] > best_score:
                best_score, best_id, best_at = pieces[merged][1], merged, at
        if best_at < 0:
            return ids
        ids[best_at : best_at + 2] = [best_id]


def decode_by_hand(ids: list[int], content: bytes) -> str:
    """The pieces that run.c prints, one after another; <unk>, <s> and </s> stand for no text."""
    pieces, text, before = pieces_of(content), b"", 1
    for index in ids:
        if index >= 3:
            piece = pieces[index][0]
            if before == 1 and piece[:1] == b" ":
                piece = piece[1:]
            text += bytes([index - 3]) if index < 259 else piece
        before = index
    return text.decode("utf-8", errors="replace")


TIED = ["ab", "ba", "aba", "bab", "abab", "a b", "  ", " a"]
CONTENTS = {"words": tokenizer_bin(), "ties and spaces inside": tokenizer_bin(TIED, [-1.0] * len(TIED))}
kinds = pytest.mark.parametrize("kind", CONTENTS)


@kinds
@given(text=UNICODE | NEAR)
@example(text="the quick the")
@example(text="aabababba a b  ab")
@example(text="  the \n é🙂戦 ")
@example(text="<0x41> <s> </s>")
def test_encoding_equals_the_algorithm_of_run_c(kind: str, text: str) -> None:
    tokenizer = Llama2cTokenizer(CONTENTS[kind])
    ids = tokenizer.encode(text).tolist()
    assert ids == encode_by_hand(text, CONTENTS[kind])
    assert tokenizer.decode(ids) == text == decode_by_hand(ids, CONTENTS[kind])
    assert tokenizer.decode([1, *ids, 1]) == text
    widths = tokenizer.token_bytes()
    assert widths[ids].sum() == len(text.encode()) + bool(text)


def test_some_pairs_are_merged_and_words_are_remembered() -> None:
    tokenizer = Llama2cTokenizer(tokenizer_bin())
    first = tokenizer.encode("the quick the")
    assert len(first) == 3 and tokenizer.encode("the quick the").tolist() == first.tolist()
    assert first[0] == first[2] == VOCABULARY - 17 + 3
    assert tokenizer.dtype == np.uint16 and tokenizer.name == f"llama2c:{VOCABULARY}"


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=20))
def test_decoding_any_ids_equals_run_c(ids: list[int]) -> None:
    assert Llama2cTokenizer(CONTENTS["words"]).decode(ids) == decode_by_hand(ids, CONTENTS["words"])


def test_a_long_word_takes_no_quadratic_time() -> None:
    tokenizer = Llama2cTokenizer(tokenizer_bin())
    text = "ab" * 100_000  # 2e10 steps for the algorithm as run.c has it
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 100_002


def test_published_tokenizer(glowflow_data: Path) -> None:
    path = glowflow_data / "stories260K" / "tok512.bin"
    tokenizer = load_tokenizer_file(path)
    text = (glowflow_data / "stories260K" / "stories260K.md").read_text(encoding="utf-8")
    ids = tokenizer.encode(text).tolist()
    assert ids[:400] == encode_by_hand(text, path.read_bytes())[:400] and tokenizer.vocab_size == 512
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("Once upon a time").tolist() == [403, 407, 261, 378]
    assert tokenizer.files() == {"tokenizer.bin": path.read_bytes()}


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return one.fingerprint == other.fingerprint and one.encode("a té").tolist() == other.encode("a té").tolist()


def test_spec_file_and_pickle_rebuild_it(tmp_path: Path) -> None:
    tokenizer = Llama2cTokenizer(tokenizer_bin())
    tokenizer.encode("the quick")
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(tokenizer.content)
    assert parse_request(str(path)) == ("llama2c", None, path)
    for other in (
        load_tokenizer_file(path),
        tokenizer_from_spec(tokenizer.spec()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert same(tokenizer, other)
    assert not same(tokenizer, Llama2cTokenizer(tokenizer_bin(["he"])))


def test_a_document_in_pieces_has_one_space_in_front() -> None:
    tokenizer = Llama2cTokenizer(tokenizer_bin())
    text = "the quick " * 20_000
    pieces = list(cut_text(text))
    assert len(pieces) > 1
    last = len(pieces) - 1
    given = [Piece(0, part, piece, "text", part == 0, part == last) for part, piece in enumerate(pieces)]
    rows = PieceEncoder(tokenizer).rows(given)
    assert (
        tokenizer.decode(rows[0]) + "".join(decode_by_hand([0, *row[1:]], tokenizer.content) for row in rows[1:])
        == text
    )
    assert rows[0][0] == 1 and rows[-1][-1] == 1


WHOLE = tokenizer_bin()


@pytest.mark.parametrize(
    "content",
    [
        *(WHOLE[:size] for size in (0, 1, 3, 4, 7, 12, 2000, len(WHOLE) - 1)),
        WHOLE + b"\0",
        b"{}",
        bytes(range(256)) * 20,
        WHOLE.replace(b"<0x41>", b"<0x4Z>"),
        WHOLE[:4] + struct.pack("<f", float("nan")) + WHOLE[8:],
    ],
)
def test_what_is_no_tokenizer_bin_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tok.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tok\.bin: is no tokenizer\.bin of llama2\.c"):
        load_tokenizer_file(path)
