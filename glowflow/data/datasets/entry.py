"""What the catalogue says of a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glowflow.data.datasets.source import Extent, FileFacts, Skipped

__all__ = ["Entry", "Layout", "MediaSet"]

Layout = tuple[list[FileFacts], dict[str, list[Extent]]]  # files, and split -> extents


@dataclass(frozen=True)
class MediaSet:
    """What an entry with media is made of.

    Args:
        layout: from the folders of ``needs`` (name -> where it lies) to files and extents.
        columns: what a sample has, for ``data.columns``, ``data.prompt`` and ``data.template``.
        needs: folder -> its files, each by the names that it may have (a folder's name ends with /).
        origin: where the set comes from.
        left_out: what is there and not used.
    """

    layout: Callable[[Mapping[str, Path]], Layout]
    columns: tuple[str, ...]
    needs: Mapping[str, tuple[tuple[str, ...], ...]]
    origin: str
    left_out: Callable[[Mapping[str, Path]], list[Skipped]] = lambda folders: []


@dataclass(frozen=True)
class Entry:
    """One catalogue name.

    Args:
        tokenizer: what ``data.tokenizer: auto`` means for it.
        files: split -> file names that it may have, the canonical one first; empty for python-stdlib and for media.
        folders: paths on Hugging Face that may hold its Parquet files.
        lines: the Parquet rows are lines of the original files.
        layout: turns the scanned files (by split) into extents.
        vocabulary: the known size of the default tokenizer's vocabulary, media not counted.
        home: the entry whose files it has; empty: its own.
        media: what its samples with media are made of; None: it is text.
    """

    name: str
    description: str
    licence: str
    tokenizer: str
    files: dict[str, tuple[str, ...]]
    folders: tuple[str, ...]
    lines: bool
    layout: Callable[[dict[str, FileFacts]], dict[str, list[Extent]]] | None = None
    vocabulary: int | None = None
    home: str = ""
    media: MediaSet | None = None

    @property
    def folder(self) -> str:
        """Name of the folder that holds its files."""
        return self.home or self.name
