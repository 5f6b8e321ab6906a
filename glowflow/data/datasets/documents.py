"""Reads the documents of an extent as pieces of at most 64 KiB, which become the rows of the shards.

Where a long document is cut depends on its bytes alone, not on the tokenizer or on how work is grouped: near every
multiple of 57,342 bytes, after the last newline of the 8 KiB before it (else before the last space, else between two
characters). A piece has at most 65,534 bytes, so no tokenizer of ours gives it more than 65,536 tokens with its
special or repeated token. For BPE the cut is also a token boundary.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.source import Extent, row_hash

__all__ = ["MAX_PIECE_BYTES", "STRIDE", "Piece", "cut_text", "num_parts", "previous_texts", "read_pieces"]

STRIDE = 57_342
_SEARCH = 8_192
MAX_PIECE_BYTES = STRIDE + _SEARCH
_ROWS_PER_READ = 256

Read = Callable[[int, int], bytes]  # (start, end) -> the bytes of that range of the document


@dataclass(frozen=True)
class Piece:
    """A piece of a document: ``first`` and ``last`` tell where the special tokens go."""

    document_id: int
    part: int
    text: str
    source: str
    first: bool
    last: bool


def num_parts(size: int) -> int:
    """Number of pieces of a document of ``size`` bytes."""
    return max(1, -(-size // STRIDE))


def cut_text(text: str) -> list[str]:
    """The pieces of a text in memory; their concatenation is the text."""
    raw = text.encode("utf-8")
    if len(raw) <= STRIDE:
        return [text]
    read: Read = lambda start, end: raw[start:end]  # noqa: E731
    cuts = [_cut(read, len(raw), part) for part in range(num_parts(len(raw)) + 1)]
    return [raw[start:end].decode("utf-8") for start, end in itertools.pairwise(cuts)]


def _cut(read: Read, size: int, part: int) -> int:
    """Where piece number ``part`` of a document of ``size`` bytes begins."""
    if part == 0:
        return 0
    if part >= num_parts(size):
        return size
    anchor = part * STRIDE
    window = read(anchor - _SEARCH, anchor + 1)
    newline = window.rfind(b"\n", 0, _SEARCH)
    if newline >= 0:
        return anchor - _SEARCH + newline + 1
    space = window.rfind(b" ", 1, _SEARCH)
    if space > 0:
        return anchor - _SEARCH + space
    position = _SEARCH
    while window[position] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        position -= 1
    return anchor - _SEARCH + position


def read_pieces(extent: Extent, problems: list[Problem] | None = None) -> Iterator[Piece]:
    """The pieces of all documents of an extent, in order.

    Args:
        extent: what to read.
        problems: where to add rows that hold no text; without it they raise.

    Raises:
        DataError: a row holds no text and ``problems`` is None.
    """
    if extent.kind == "text":
        yield from _read_text(extent)
        return
    found: list[Problem] = [] if problems is None else problems
    rows = _jsonl_rows(extent, found) if extent.kind == "jsonl" else _parquet_rows(extent, found)
    for document_id, text in rows:
        if extent.clip is not None:
            low, high = (len(text) * tenth // 10 for tenth in extent.clip)
            text = text[low:high]
        if text:
            pieces = cut_text(text)
            for part, piece in enumerate(pieces):
                yield Piece(document_id, part, piece, extent.name, part == 0, part == len(pieces) - 1)
    if problems is None and found:
        raise DataError(found, title="rows that hold no text")


def _read_text(extent: Extent) -> Iterator[Piece]:
    size = extent.end - extent.start
    count = num_parts(size)
    first, last = extent.parts or (0, count)
    with _Bytes(extent) as read:
        start = _cut(read, size, first)
        for part in range(first, last):
            end = _cut(read, size, part + 1)
            text = read(start, end).decode("utf-8")
            yield Piece(extent.document_id, part, text, extent.name, part == 0, part == count - 1)
            start = end


def previous_texts(extent: Extent) -> Iterator[str]:
    """The texts before the first piece of an extent, nearest first: the last token before a cut comes from there."""
    if extent.kind != "text" or extent.parts is None:
        return
    size = extent.end - extent.start
    with _Bytes(extent) as read:
        for part in range(extent.parts[0] - 1, -1, -1):
            yield read(_cut(read, size, part), _cut(read, size, part + 1)).decode("utf-8")


class _Bytes:
    """Random access to the byte range of an extent."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent

    def __enter__(self) -> Read:
        self._stream = open(self._extent.path, "rb")
        return self._read

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _read(self, start: int, end: int) -> bytes:
        offset, stop = self._extent.start + start, min(self._extent.start + end, self._extent.end)
        self._stream.seek(offset, os.SEEK_SET)
        content = self._stream.read(stop - offset)
        if len(content) != stop - offset:
            raise DataError(Problem(self._extent.path, "has become shorter since it was scanned"))
        return content


def _jsonl_rows(extent: Extent, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    with open(extent.path, "rb") as stream:
        stream.seek(extent.start)
        position, row = extent.start, extent.row
        for line in stream:
            if position >= extent.end:
                return
            position += len(line)
            if _selected(extent, row) and line.strip():
                text, reason = _json_text(line)
                if reason:
                    problems.append(Problem(f"{extent.path}: byte {position - len(line)}", reason))
                else:
                    yield row - extent.row + extent.document_id, text
            row += 1


def _json_text(line: bytes) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return "", f"the line is no JSON: {error}"
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return "", "the line must be a JSON object with a string `text`"
    return _encodable(text)


def _encodable(text: str) -> tuple[str, str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"the text has half a surrogate pair at character {error.start}"
    return text, ""


def _parquet_rows(extent: Extent, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(extent.path, memory_map=False) as file:
        if "text" not in file.schema_arrow.names:
            hint = "a Parquet file of tokens alone can only be used with --index-only"
            problems.append(Problem(extent.path, "has no column `text`", hint=hint))
            return
        row = extent.row
        groups = list(range(extent.start, extent.end))
        for batch in file.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=["text"], use_threads=False):
            for text in batch.column(0).to_pylist():
                if _selected(extent, row) and text is not None:
                    if isinstance(text, str):
                        yield row - extent.row + extent.document_id, text
                    else:
                        problems.append(
                            Problem(f"{extent.path}: column text", "must hold strings", type(text).__name__)
                        )
                        return
                row += 1


def _selected(extent: Extent, row: int) -> bool:
    if extent.select is None:
        return True
    return extent.select[0] <= row_hash(f"{extent.name}:{row}") < extent.select[1]
