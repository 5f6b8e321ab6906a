"""A resolved source: which documents each split has, as extents of files. No text is held, only where it lies.

An extent is a run of documents of one file: one whole document (``text``: a byte range; a file, an article, or nine
tenths of a file) or rows of a JSONL or Parquet file. Document ids are unique over the whole source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from glowflow.data.datasets.media.settings import SampleSettings

__all__ = ["Extent", "FileFacts", "Skipped", "Source", "row_hash", "source_digest"]

Kind = Literal["text", "jsonl", "parquet", "samples"]


@dataclass(frozen=True)
class Extent:
    """A run of documents of one file.

    Args:
        path: the file, absolute.
        name: its name inside the source; the column ``source`` of the shards.
        kind: ``text`` (one document), ``jsonl`` or ``parquet`` (one document per row), ``samples`` (with media).
        start, end: half-open range; ``text`` and ``jsonl``: bytes, ``parquet``: row groups, ``samples``: its reader's.
        document_id: id of the document, or of the first row of the extent.
        size: bytes of text, about; what balances the units of work.
        row: number of the first row in its file (its name and row decide a document's split).
        parts: ``text``: only the pieces [first, last) of a long document.
        select: rows whose ``row_hash`` lies in [low, high); None: all.
        clip: tenths [low, high) of the characters, where the single document of a source is cut in two.
        reader: ``samples``: what reads them, a name of ``media.samples.READERS``.
    """

    path: str
    name: str
    kind: Kind
    start: int
    end: int
    document_id: int
    size: int
    row: int = 0
    parts: tuple[int, int] | None = None
    select: tuple[int, int] | None = None
    clip: tuple[int, int] | None = None
    reader: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Extent:
        pairs = {key: tuple(content[key]) if content[key] is not None else None for key in ("parts", "select", "clip")}
        return cls(**{**content, **pairs})


@dataclass(frozen=True)
class FileFacts:
    """What one pass over a file found.

    Args:
        sha256: of the whole file.
        problem: why the file can not be used; None when it can.
        chars: characters of a text file.
        rows: rows of a JSONL (lines) or Parquet file.
        marks: ``jsonl``: (byte offset, row) of line starts some MiB apart, the first (0, 0);
            ``parquet``: (bytes of text, rows) of each row group.
        columns: ``parquet``: its column names.
    """

    path: str
    name: str
    kind: Kind
    bytes: int
    sha256: str
    problem: str | None = None
    chars: int = 0
    rows: int = 0
    marks: tuple[tuple[int, int], ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file that is not part of the data, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """What ``resolve`` gives.

    Args:
        name: catalogue name, or the last part of the path.
        origin: where it came from, without machine paths (it enters the manifest).
        licence: its licence as far as it is known.
        tokenizer: what ``auto`` means for it.
        digest: sha256 over the contents and the splits; equal contents give equal digests on every machine.
        splits: split -> extents in document order.
        files: number of files used; ``empty_files`` of no bytes were passed over.
        skipped: files left out, with the reason.
        bytes: size of the files used.
        built: the directory, when it is a built data set already (then there are no splits here).
        samples: how its samples with media are read; None: it is text.
    """

    name: str
    origin: str
    licence: str
    tokenizer: str
    digest: str = ""
    splits: dict[str, list[Extent]] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    empty_files: int = 0
    skipped: tuple[Skipped, ...] = ()
    built: Path | None = None
    samples: SampleSettings | None = None


def row_hash(key: str) -> int:
    """A 64-bit number from a document's name: what decides its split, on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def source_digest(files: Iterable[FileFacts], splits: Mapping[str, Iterable[Extent]]) -> str:
    """sha256 over file contents and the documents of each split; no absolute path enters."""
    digest = hashlib.sha256()
    for facts in sorted(files, key=lambda facts: facts.name):
        digest.update(json.dumps([facts.name, facts.kind, facts.bytes, facts.sha256]).encode())
    for split, extents in sorted(splits.items()):
        digest.update(json.dumps(["split", split]).encode())
        for e in extents:
            layout = [e.name, e.kind, e.start, e.end, e.document_id, e.select, e.clip]
            digest.update(json.dumps([*layout, e.reader] if e.reader else layout).encode())
    return digest.hexdigest()
