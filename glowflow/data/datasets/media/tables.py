"""Rows of text files that name or hold media: captions in CSV, TSV and JSONL, and interleaved JSONL documents.

CSV is quoted as usual; in TSV a tab is a border and a quotation mark is text. Paths are relative to the file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from glowflow.data.datasets.media.columns import FILE_NAMES, MEDIA_NAMES, Roles, compose
from glowflow.data.datasets.media.files import ContentHash, SampleFile, cut_rows
from glowflow.data.datasets.media.samples import RawSample, is_selected, modality_of, plain
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.processors.bad import BadSample

__all__ = ["has_media", "is_captions", "is_table", "read_jsonl", "read_table", "scan"]

_CAPTIONS = re.compile(r"^(captions|metadata)\.(csv|tsv|jsonl)$", re.IGNORECASE)
_LOOKED_AT = 100  # rows that tell what a file is


@dataclass(frozen=True)
class _Row:
    """One row that is not blank: its number, its bytes [begin, end) in the file, its columns or what is wrong."""

    number: int
    begin: int
    end: int
    record: dict[str, Any] | BadSample


def is_captions(name: str) -> bool:
    """Whether a file is called as captions are."""
    return bool(_CAPTIONS.match(Path(name).name))


def is_table(path: Path) -> bool:
    """Whether it is CSV or TSV by its suffix."""
    return path.suffix.lower() in (".csv", ".tsv")


def has_media(path: Path) -> bool:
    """Whether one of the first rows names or holds a picture or a recording."""
    captions = is_captions(path.name) or is_table(path)
    names = [*(name for names in MEDIA_NAMES.values() for name in names), *(FILE_NAMES if captions else ())]
    try:
        for row in _first_rows(path):
            if isinstance(row.record, dict) and any(_looks_like_media(row.record.get(name)) for name in names):
                return True
    except UnicodeDecodeError:
        return is_captions(path.name)  # then the scan says what is wrong with it
    except OSError:
        return False
    return False


def _first_rows(path: Path) -> Iterator[_Row]:
    for row in _rows(path):
        if row.number >= _LOOKED_AT:
            return
        yield row


def _looks_like_media(value: Any) -> bool:
    if isinstance(value, str):
        return modality_of(value) is not None and not value.startswith(("http://", "https://"))
    if isinstance(value, Mapping):
        return value.get("bytes") is not None or _looks_like_media(value.get("path"))
    return isinstance(value, list) and any(_looks_like_media(one) for one in value)


def scan(facts: FileFacts, settings: SampleSettings) -> SampleFile:
    """A scanned file of rows: everything that it names is read once for the hash."""
    path, content = Path(facts.path), ContentHash()
    columns: dict[str, None] = {}
    roles_of = _RolesOf(path, settings)

    rows = 0

    def weights() -> Iterator[tuple[int, int, int]]:
        nonlocal rows
        for row in _rows(path):
            rows, size = row.number + 1, 0
            if isinstance(row.record, dict):
                if row.number < _LOOKED_AT:
                    columns.update(dict.fromkeys(row.record))
                size = sum(content.add(path.parent, one) for one in _paths(row.record, roles_of(row.record)))
            yield row.begin, row.end, row.end - row.begin + size

    reader = "table" if is_table(path) else "jsonl"
    extents = tuple(cut_rows(weights(), (facts.path, facts.name, reader)))
    digest = hashlib.sha256(f"{facts.sha256}:{content.digest.hexdigest()}".encode()).hexdigest()
    size = facts.bytes + content.bytes
    whole = replace(facts, kind="samples", bytes=size, sha256=digest, rows=rows, marks=())
    found = tuple(_header(path)) if is_table(path) else tuple(columns)
    named = content.named
    return SampleFile(whole, extents, found, files=1 + len(named), named=named)


class _RolesOf:
    """The roles of a record's columns; JSON objects may each have others."""

    def __init__(self, path: Path, settings: SampleSettings) -> None:
        self._settings = settings
        self._files = is_captions(path.name) or is_table(path)
        self._known: dict[tuple[str, ...], Roles] = {}

    def __call__(self, record: Mapping[str, Any]) -> Roles:
        columns = tuple(record)
        if columns not in self._known:
            if len(self._known) > 1000:
                self._known.clear()
            self._known[columns] = Roles.of(columns, self._settings, files=self._files)
        return self._known[columns]


def _paths(record: Mapping[str, Any], roles: Roles) -> Iterator[str]:
    """Every file that a record names."""
    for column in (*roles.media.values(), *roles.files):
        yield from _named(record.get(column))


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        if value.get("bytes") is None:
            yield from _named(value.get("path"))
    elif isinstance(value, list):
        for one in value:
            yield from _named(one)


def read_table(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of a CSV or TSV file."""
    yield from _read(extent, settings, media)


def read_jsonl(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of a JSONL file."""
    yield from _read(extent, settings, media)


def _read(extent: Extent, settings: SampleSettings, media: bool) -> Iterator[RawSample]:
    path = Path(extent.path)
    roles_of = _RolesOf(path, settings)
    for row in _rows(path, extent.start, extent.end, extent.row):
        name = f"{extent.name}:{row.number}"
        document_id = extent.document_id + row.number - extent.row
        if isinstance(row.record, BadSample):
            if is_selected(extent, name):
                yield RawSample(document_id, name, name, bad=row.record)
            continue
        roles = roles_of(row.record)
        group = row.record.get(roles.group) if roles.group is not None else None
        first = next(_paths(row.record, roles), None)
        key = plain(f"group:{group}" if group is not None else name if first is None else f"{extent.name}:{first}")
        if is_selected(extent, key):
            identity = RawSample(document_id, name, key, group=None if first is None else plain(first))
            yield compose(row.record, roles, settings, identity, path.parent, media=media)


# --- the rows of a file --------------------------------------------------------------------------------------------


def _rows(path: Path, start: int = 0, end: int | None = None, number: int = 0) -> Iterator[_Row]:
    """The rows of the byte range [start, end), which begins with a row; blank ones are passed over."""
    rows: Callable[..., Iterator[_Row]] = _table_rows if is_table(path) else _json_rows
    with path.open("rb") as stream:
        for row in rows(stream, path, start, number):
            if end is not None and row.begin >= end:
                return
            yield row


def _json_rows(stream: BinaryIO, path: Path, start: int, number: int) -> Iterator[_Row]:
    stream.seek(start)
    position = start
    for line in stream:
        begin, position = position, position + len(line)
        if line.strip():
            yield _Row(number, begin, position, _json_record(line))
            number += 1


def _json_record(line: bytes) -> dict[str, Any] | BadSample:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadSample("text", f"the line is no JSON: {error}")
    return record if isinstance(record, dict) else BadSample("text", "the line must be a JSON object")


def _header(path: Path) -> list[str]:
    """The names of the columns of a table."""
    with path.open("rb") as stream:
        return _read_header(stream, path)[0]


def _read_header(stream: BinaryIO, path: Path) -> tuple[list[str], int]:
    lines = _Lines(stream, 0)
    try:
        header = next(_csv_reader(lines, path), [])
    except csv.Error:  # then no row fits it, and each says so
        header = []
    return [name.strip() for name in header], lines.position


class _Lines:
    """Decoded lines of a file; ``position`` is the end of the last one that was taken."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        stream.seek(start)
        self._stream = stream
        self.position = start

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            text = line.decode("utf-8-sig" if self.position == 0 else "utf-8")
            self.position += len(line)
            yield text


def _csv_reader(lines: Iterable[str], path: Path) -> Iterator[list[str]]:
    if path.suffix.lower() == ".tsv":
        return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(lines)


def _table_rows(stream: BinaryIO, path: Path, start: int, number: int) -> Iterator[_Row]:
    header, first = _read_header(stream, path)
    lines = _Lines(stream, max(start, first))
    reader = _csv_reader(lines, path)
    while True:
        begin = lines.position
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Row(number, begin, lines.position, BadSample("text", f"the row cannot be read: {error}"))
            number += 1
            continue
        if cells:
            yield _Row(number, begin, lines.position, _table_record(header, cells))
            number += 1


def _table_record(header: list[str], cells: list[str]) -> dict[str, Any] | BadSample:
    if len(cells) > len(header):
        return BadSample("text", f"the row has {len(cells)} fields, the header {len(header)}")
    return dict(zip(header, [*cells, *([None] * (len(header) - len(cells)))], strict=True))
