"""Text while it is written: whole characters, nothing of a stop string, the same as decoding all at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.core.generation import TextStream
from glowflow.data.processors.text import ByteTokenizer, WordTokenizer, train_tokenizer

BYTES = ByteTokenizer()


def of_bytes(ids: Sequence[int]) -> str:
    return BYTES.decode(ids)


def run(stream: TextStream, ids: Sequence[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@given(prompt=st.binary(max_size=8), new=st.binary(max_size=40))
def test_any_bytes_give_the_text_of_all_at_once(prompt: bytes, new: bytes) -> None:
    prompt_ids = [*BYTES.encode(prompt.decode("utf-8", "ignore")).tolist()]
    stream = TextStream(of_bytes, prompt_ids)
    assert "".join(run(stream, list(new))) == of_bytes(list(new)) == stream.text


def test_a_character_is_shown_when_it_is_whole() -> None:
    assert run(TextStream(of_bytes), list("aé€😀b".encode())) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert run(TextStream(of_bytes), [*b"a", 0xE2, 0x82]) == ["a", "", "", "\ufffd"]
    assert "".join(run(TextStream(of_bytes), [0xFF, 0xC3, 0xA9])) == "\ufffdé"


def test_special_tokens_stand_for_no_text() -> None:
    ids = [256, *b"a", 256, 256, *"é".encode()[:1], 256, *b"b"]
    assert "".join(run(TextStream(of_bytes, [256]), ids)) == of_bytes(ids)


def test_a_special_token_is_no_context_where_a_text_starts_in_another_way() -> None:
    pieces = ["", " a", " b"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert run(TextStream(decode, [1]), [2, 0, 0, 1, 2]) == [" b", "", "", " a", " b", ""]


def test_words_are_set_apart_from_the_prompt_and_from_each_other() -> None:
    words = WordTokenizer(["<eos>", "<unk>", "the", "cat", "sat"])
    stream = TextStream(words.decode, words.encode("the").tolist())
    assert run(stream, words.encode("cat sat").tolist()) == [" cat", " sat", ""]


def test_byte_level_tokens_that_cut_characters() -> None:
    tokenizer = train_tokenizer("bpe", ["ab abc"], 258)
    ids = tokenizer.encode("ab €uro abc").tolist()
    pieces = run(TextStream(tokenizer.decode, tokenizer.encode("é").tolist()), ids)
    assert "".join(pieces) == "ab €uro abc" and "\ufffd" not in "".join(pieces) and len(pieces) > 8


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("xababac", ["abac"], "xab"),
        ("hello END", ["END", "lo E"], "hel"),
        ("a€b", ["€"], "a"),
        ("stop", ["stop"], ""),
        ("never", ["stop", "evert"], "never"),
        ("ab", [""], "ab"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str], want: str) -> None:
    stream = TextStream(of_bytes, (), stops)
    assert "".join(run(stream, list(text.encode()))) == want == stream.text
    assert stream.stopped == (want != text)
    assert stream.push(97) == "" or not stream.stopped


@given(
    tokens=st.lists(st.text("abc", min_size=1, max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_across_tokens(tokens: list[str], stops: list[str]) -> None:
    """What has been shown is a beginning of the right answer after every token, and all of it at the end."""
    whole = "".join(tokens)
    stream = TextStream(lambda ids: "".join(tokens[i] for i in ids), (), stops)
    shown = ""
    for token in range(len(tokens)):
        shown += stream.push(token)
        so_far = "".join(tokens[: token + 1])
        found = [so_far.find(stop) for stop in stops if stop in so_far]
        assert stream.stopped == bool(found)
        if found:
            assert shown == so_far[: min(found)]
            break
        # Nothing shown could be the beginning of a stop string that further tokens complete.
        assert so_far.startswith(shown)
        held = so_far[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        ends = [size for stop in stops for size in range(1, len(stop)) if so_far.endswith(stop[:size])]
        assert len(held) == max(ends, default=0)
    else:
        assert shown + stream.finish() == whole
    assert stream.text == (shown if stream.stopped else whole)
