"""One streaming pass over each file: its sha256, whether it is text at all, and where its rows lie.

Memory stays at one block per file however large it is. Files that are no text are named, never dropped silently.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.source import FileFacts, Kind, Skipped

__all__ = [
    "INDEX_MARK",
    "NO_TEXT",
    "OUR_INDEX",
    "SHARD_MARK",
    "character_offset",
    "file_kind",
    "folder_files",
    "keep_good",
    "scan_files",
]

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4 << 20
_PARALLEL_BYTES = 64 << 20
SHARD_MARK = b"glowflow.shard"  # key in the Parquet metadata of our own shards
INDEX_MARK = b"glowflow.index"  # and of the length indexes of --index-only
OUR_INDEX = "is a length index of GlowFlow"
NO_TEXT = "has no column `text`"
_NOT_BUILT = ("manifest.json", ".building")


def folder_files(folder: Path) -> list[tuple[Path, str]]:
    """All files below a folder in the order of their names; hidden ones and built data sets inside are left out."""
    found = []
    for current, directories, files in os.walk(folder, followlinks=True):
        if current != str(folder) and any(name in files or name in directories for name in _NOT_BUILT):
            directories.clear()
            continue
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "__pycache__")
        found += [Path(current, name) for name in files if not name.startswith(".")]
    return sorted(((path, path.relative_to(folder).as_posix()) for path in found), key=lambda pair: pair[1])


def file_kind(path: Path) -> Kind:
    """``jsonl`` and ``parquet`` by suffix, everything else is text until a scan says otherwise."""
    suffix = path.suffix.lower()
    return "parquet" if suffix == ".parquet" else "jsonl" if suffix in (".jsonl", ".ndjson") else "text"


def scan_files(paths: Sequence[tuple[Path, str]]) -> list[FileFacts]:
    """Facts of (path, name) pairs, in their order; several at once where there is much to read."""
    total = sum(path.stat().st_size for path, _ in paths if path.exists())
    workers = min(4, os.cpu_count() or 1, len(paths))
    if total < _PARALLEL_BYTES or workers < 2:
        return [_scan(path, name) for path, name in paths]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: _scan(*pair), paths))


def keep_good(facts: Sequence[FileFacts], on_bad_file: str) -> tuple[list[FileFacts], list[Skipped], int]:
    """Usable files, skipped files, and the number of empty ones.

    Raises:
        DataError: ``on_bad_file`` is ``refuse`` and there are bad files; all are named.
    """
    bad = [one for one in facts if one.problem is not None]
    if bad and on_bad_file == "refuse":
        hint = "remove it, or set data.on_bad_file=skip"
        raise DataError(
            [Problem(one.path, one.problem or "", hint=hint) for one in bad], title="files that cannot be used"
        )
    for one in bad:
        logger.warning("skipped %s: %s", one.name, one.problem)
    good = [one for one in facts if one.problem is None and one.bytes]
    empty = sum(one.problem is None and not one.bytes for one in facts)
    return good, [Skipped(one.name, one.problem or "") for one in bad], empty


def _scan(path: Path, name: str) -> FileFacts:
    kind = file_kind(path)
    try:
        if kind == "parquet" and path.stat().st_size:
            return _scan_parquet(path, name)
        return _scan_text(path, name, kind)
    except OSError as error:
        return FileFacts(str(path), name, kind, 0, "", problem=f"cannot be read: {error.strerror or error}")


def _scan_text(path: Path, name: str, kind: Kind) -> FileFacts:
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    problem: str | None = None
    chars = rows = offset = 0
    tail = b"\n"
    marks = [(0, 0)]
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            if problem is None:
                try:
                    chars += len(decoder.decode(block))
                except UnicodeDecodeError as error:
                    found = f"byte 0x{error.object[error.start]:02x} near offset {offset + error.start}"
                    problem = f"is not UTF-8 text: {found}"
                nul = block.find(b"\0")
                problem = problem if nul < 0 else f"is binary: a NUL byte at offset {offset + nul}"
            if kind == "jsonl":
                rows += int(np.count_nonzero(np.frombuffer(block, np.uint8) == 10))
                if (last := block.rfind(b"\n")) >= 0:
                    marks.append((offset + last + 1, rows))
            offset += len(block)
            tail = block[-1:]
    if problem is None and decoder.getstate()[0]:
        problem = "is not UTF-8 text: it ends inside a character"
    rows += tail != b"\n"
    return FileFacts(
        str(path), name, kind, offset, digest.hexdigest(), problem, chars, rows if kind == "jsonl" else 0, tuple(marks)
    )


def _scan_parquet(path: Path, name: str) -> FileFacts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from glowflow.data.manifest import file_sha256

    size, digest = path.stat().st_size, file_sha256(path)
    try:
        with pq.ParquetFile(path) as file:
            metadata, columns = file.metadata, tuple(file.schema_arrow.names)
            marks_of_ours = file.schema_arrow.metadata or {}
            if SHARD_MARK in marks_of_ours:
                problem: str | None = "is a shard of a built data set whose manifest.json is missing"
            elif INDEX_MARK in marks_of_ours:
                problem = OUR_INDEX
            else:
                problem = None if {"text", "tokens"} & set(columns) else NO_TEXT
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            marks = tuple((_text_bytes(group), group.num_rows) for group in groups)
            return FileFacts(str(path), name, "parquet", size, digest, problem, 0, metadata.num_rows, marks, columns)
    except pa.ArrowException as error:
        return FileFacts(str(path), name, "parquet", size, digest, problem=f"is no readable Parquet file: {error}")


def _text_bytes(group: object) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]  # type: ignore[attr-defined]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in ("text", "tokens"))


def character_offset(path: str, chars: int) -> int:
    """The byte offset of the character number ``chars`` of a UTF-8 file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            pending = len(decoder.getstate()[0])
            text = decoder.decode(block)
            if len(text) >= chars:
                return offset - pending + len(text[:chars].encode("utf-8"))
            chars -= len(text)
            offset += len(block)
    return offset
