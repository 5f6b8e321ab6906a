"""Files of samples, as planned: what is in them, and how each is cut into extents.

Planning reads every byte once (the hash of what is built is its name in the cache) and keeps counts alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256

__all__ = ["EXTENT_BYTES", "ContentHash", "SampleFile", "cut_rows"]

EXTENT_BYTES = 1 << 20


@dataclass(frozen=True)
class SampleFile:
    """One file (or folder) of samples.

    Args:
        facts: its name, size and hash, over everything that it refers to.
        extents: in order; their document ids are the numbers of the rows in the file.
        columns: what a row has, as far as that is known without reading all.
        split: the split that its name tells.
        files: how many files stand behind it.
        named: the paths of the files that its samples name.
    """

    facts: FileFacts
    extents: tuple[Extent, ...] = ()
    columns: tuple[str, ...] = ()
    split: str | None = None
    files: int = 1
    named: tuple[str, ...] = ()


def cut_rows(
    rows: Iterable[tuple[int, int, int]], facts: tuple[str, str, str], limit: int | None = None
) -> Iterator[Extent]:
    """Extents of about so many bytes.

    Args:
        rows: (where the row begins, where it ends, bytes of the sample), in order.
        facts: path, name and reader of the file.
        limit: None: a MiB.
    """
    path, name, reader = facts
    first, start, size, last = 0, None, 0, 0
    number = 0
    for begin, stop, weight in rows:
        if start is None:
            first, start = number, begin
        size, last, number = size + max(1, weight), stop, number + 1
        if size >= (limit or EXTENT_BYTES):
            yield Extent(path, name, "samples", start, last, first, size, first, reader=reader)
            start, size = None, 0
    if start is not None:
        yield Extent(path, name, "samples", start, last, first, size, first, reader=reader)


@dataclass
class ContentHash:
    """Hash over a file and everything that it refers to; every file is read once."""

    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    bytes: int = 0
    _known: dict[str, int] = field(default_factory=dict)
    _paths: list[str] = field(default_factory=list)

    def add(self, folder: Path, name: str) -> int:
        """Count a file that is referred to, and give its size (0: there is none)."""
        if name in self._known:
            return self._known[name]
        size, sha256 = 0, "missing"
        try:
            path = folder / name
            if path.is_file():
                size, sha256 = os.stat(path).st_size, file_sha256(path)
        except (OSError, ValueError):
            pass  # it is a bad sample, and is named when samples are read
        self._known[name] = size
        self._paths.append(os.path.normpath(folder / name))
        self.bytes += size
        self.digest.update(f"{len(name)}:{name}:{size}:{sha256};".encode("utf-8", "surrogatepass"))
        return size

    @property
    def named(self) -> tuple[str, ...]:
        """The paths of the files, whether they are there or not."""
        return tuple(self._paths)
