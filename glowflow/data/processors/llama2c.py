"""The tokenizer of llama2.c (github.com/karpathy/llama2.c), read from its ``tokenizer.bin``: scored pieces of text.

A text is a space and its characters, those that the vocabulary lacks byte by byte; then the neighbours whose
concatenation is the piece of the largest score become one, the leftmost first, until no two do. The file holds the
length of the longest piece, then of each piece its score, its length and its UTF-8 bytes, little-endian.
"""

from __future__ import annotations

import base64
import heapq
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.processors.text import Ids, Tokenizer

__all__ = ["Llama2cTokenizer"]

_FIRST_BYTE = 3  # after <unk>, <s> and </s> come the 256 bytes
_LOWEST_SCORE = -1e10  # where llama2.c begins its search: nothing below is merged
_CACHED_WORDS = 1 << 16
_WORDS = re.compile(rb" *[^ ]+| +")
_SPACE_INSIDE = re.compile(rb"[^ ] ")


class Llama2cTokenizer(Tokenizer):
    """Encodes and decodes as llama2.c's ``run.c`` does; ``<s>`` starts and ends documents, as in its training data.

    Args:
        content: the bytes of a ``tokenizer.bin``.

    Raises:
        DataError: they are none.
    """

    kind = "llama2c"
    bos_id = 1
    eos_id = 1

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._pieces, self._scores = _parse(content)
        self.vocab_size = len(self._pieces)
        self._ids: dict[bytes, int] = {}
        for index, piece in enumerate(self._pieces):
            self._ids.setdefault(piece, index)
        # Where no piece goes on after a space that follows something, words are independent of each other.
        self._by_word = not any(_SPACE_INSIDE.search(piece) for piece in self._pieces)
        self._cache: dict[bytes, list[int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Llama2cTokenizer, (self.content,))

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.vocab_size}"

    def encode(self, text: str) -> Ids:
        return self._encode(text, first=True)

    def encode_pieces(self, texts: Sequence[str], firsts: Sequence[bool]) -> list[Ids]:
        return [self._encode(text, first=first) for text, first in zip(texts, firsts, strict=True)]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        found, at_start = [], True
        for index in np.asarray(ids, np.int64).tolist():
            if not _FIRST_BYTE <= index < self.vocab_size:
                at_start = at_start or index == self.bos_id
                continue
            piece = self._text(index)
            found.append(piece[1:] if at_start and piece.startswith(b" ") else piece)
            at_start = False
        return b"".join(found).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        encoded = base64.b64encode(self.content).decode("ascii")
        return {"kind": self.kind, "vocab_size": self.vocab_size, "tokenizer_bin": encoded}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.bin": self.content}

    def token_bytes(self) -> npt.NDArray[np.int32]:
        # Of a document's first piece one byte is the space in front that belongs to no text.
        widths = [0] * _FIRST_BYTE + [len(self._text(index)) for index in range(_FIRST_BYTE, self.vocab_size)]
        return np.array(widths, np.int32)

    def _text(self, index: int) -> bytes:
        """The bytes that a piece stands for."""
        byte = index - _FIRST_BYTE
        return bytes([byte]) if byte < 256 else self._pieces[index]

    def _encode(self, text: str, *, first: bool) -> Ids:
        content = text.encode("utf-8")
        if content and first and b" " in self._ids:
            content = b" " + content
        words = _WORDS.findall(content) if self._by_word else [content]
        ids: list[int] = []
        for word in words:
            ids += self._word(word)
        return np.array(ids, self.dtype)

    def _word(self, word: bytes) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            ids = self._cache[word] = self._merged(self._characters(word))
        return ids

    def _characters(self, word: bytes) -> list[int]:
        ids: list[int] = []
        for character in word.decode("utf-8"):
            encoded = character.encode("utf-8")
            known = self._ids.get(encoded)
            ids += [_FIRST_BYTE + byte for byte in encoded] if known is None else [known]
        return ids

    def _merged(self, ids: list[int]) -> list[int]:
        """Merge neighbours, the best score first and of equal ones the leftmost, in O(n log n)."""
        after = list(range(1, len(ids) + 1))  # the live piece to the right of each
        before = list(range(-1, len(ids) - 1))
        alive = [True] * len(ids)
        waiting: list[tuple[float, int, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = after[left]
            merged = self._ids.get(self._pieces[ids[left]] + self._pieces[ids[right]]) if right < len(ids) else None
            if merged is not None and self._scores[merged] > _LOWEST_SCORE:
                heapq.heappush(waiting, (-self._scores[merged], left, right, ids[left], ids[right], merged))

        for index in range(len(ids)):
            offer(index)
        while waiting:
            _, left, right, first, second, merged = heapq.heappop(waiting)
            unchanged = alive[left] and alive[right] and ids[left] == first and ids[right] == second
            if not unchanged or after[left] != right:
                continue
            ids[left], alive[right], after[left] = merged, False, after[right]
            if after[right] < len(ids):
                before[after[right]] = left
            if before[left] >= 0:
                offer(before[left])
            offer(left)
        return [index for index, live in zip(ids, alive, strict=True) if live]


def _parse(content: bytes) -> tuple[list[bytes], list[float]]:
    """Pieces and scores of a tokenizer.bin."""
    pieces, scores, at = [], [], 4
    longest = struct.unpack_from("<i", content)[0] if len(content) >= 4 else -1
    while 0 <= longest and at + 8 <= len(content):
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        if not 0 <= length <= min(longest, len(content) - at) or not math.isfinite(score):
            break
        pieces.append(content[at : at + length])
        scores.append(score)
        at += length
    named = pieces[_FIRST_BYTE : _FIRST_BYTE + 256]
    if at != len(content) or named != [b"<0x%02X>" % byte for byte in range(256)]:
        rule = f"is no tokenizer.bin of llama2.c: it can be read up to byte {min(at, len(content))} of {len(content)}"
        if at == len(content):
            rule = "is no tokenizer.bin of llama2.c: pieces 3 to 258 are not the bytes <0x00> to <0xFF>"
        raise DataError(Problem("tokenizer", rule, hint="its tokenizer.py writes one, from a sentencepiece model"))
    return pieces, scores
