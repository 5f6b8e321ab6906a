"""From scanned files to splits: which document belongs to which split, decided by name or by hash.

Files named after splits keep them. Otherwise a document's split is a function of its name: 90 % train, 5 %
validation, 5 % test; where there are few documents the ranks of the hashes decide, so that validation is never
empty. A single document is cut in two, the first nine tenths of its characters and the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.documents import read_pieces
from glowflow.data.datasets.scan import character_offset
from glowflow.data.datasets.source import Extent, FileFacts, Skipped, row_hash

__all__ = [
    "FEW_DOCUMENTS",
    "Thresholds",
    "contiguous",
    "file_extent",
    "hash_splits",
    "held_out",
    "named_split",
    "selected",
    "split_alias",
    "split_files",
    "thresholds",
]

_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "validation"),
    "test": "test",
}
_DATA_SUFFIXES = (".txt", ".text", ".tokens", ".raw", ".jsonl", ".ndjson", ".parquet")
FEW_DOCUMENTS = 200
_TOP = 1 << 64
Thresholds = dict[str, tuple[int, int]]


def split_alias(name: str) -> str | None:
    """The split that a word stands for: ``dev`` is the validation split."""
    return _ALIASES.get(name.lower())


def named_split(name: str, suffixes: Sequence[str] = _DATA_SUFFIXES) -> str | None:
    """The split that a name says: a folder ``valid/``, ``train.txt``, ``wiki.test.tokens``, ``train-00000-of-2``.

    Only data files have one (by their suffix): ``train.py`` in a folder of programs is a document like the others.
    """
    path = PurePosixPath(name.lower())
    if path.suffix not in suffixes:
        return None
    for folder in path.parts[:-1]:
        if folder in _ALIASES:
            return _ALIASES[folder]
    stem = path.name.removeprefix("wiki.")
    return _ALIASES.get(re.split(r"[._\-]", stem, maxsplit=1)[0])


def split_files(files: Sequence[FileFacts]) -> tuple[dict[str, list[Extent]], list[Skipped]]:
    """Extents per split of the good files of a local source, and the files that belong to no split.

    Raises:
        DataError: there is no document, or nothing for the training split.
    """
    if not files:
        raise DataError(Problem("data.dataset", "the corpus is empty: it has no file with text"))
    first_ids = _first_document_ids(files)
    named = {facts.name: named_split(facts.name) for facts in files} if len(files) > 1 else {}
    if "train" not in named.values():
        return hash_splits(files, first_ids, with_test=True), []
    splits: dict[str, list[Extent]] = {}
    for facts in files:
        if (split := named[facts.name]) is not None:
            splits.setdefault(split, []).extend(_all_extents(facts, first_ids[facts.name]))
    if "validation" not in splits:
        train = [facts for facts in files if named[facts.name] == "train"]
        splits.update(hash_splits(train, first_ids, with_test=False))
    unused = [Skipped(f.name, "its name tells no split while others do") for f in files if named[f.name] is None]
    return splits, unused


def hash_splits(files: Sequence[FileFacts], first_ids: dict[str, int], *, with_test: bool) -> dict[str, list[Extent]]:
    """Distribute documents over train, validation (and test) by the hash of their names."""
    few = _few_documents(files)
    if few is not None and len(few) == 1:
        facts = next(facts for facts in files if few[0] in (facts.name, *_row_keys(facts)))
        return contiguous(facts, first_ids[facts.name])
    ranges = thresholds(few, with_test=with_test)
    splits: dict[str, list[Extent]] = {name: [] for name in ranges}
    for facts in files:
        if facts.kind == "text":
            value = row_hash(facts.name)
            split = next(name for name, (low, high) in ranges.items() if low <= value < high)
            splits[split].append(file_extent(facts, first_ids[facts.name]))
            continue
        for name, select in ranges.items():
            for extent in _all_extents(facts, first_ids[facts.name]):
                splits[name].append(selected(extent, select))
    return {name: extents for name, extents in splits.items() if extents}


def selected(extent: Extent, select: tuple[int, int]) -> Extent:
    """An extent of which only the rows in a range of hashes count."""
    share = (select[1] - select[0]) / _TOP
    return replace(extent, select=select, size=max(1, int(extent.size * share)))


def _few_documents(files: Sequence[FileFacts]) -> list[str] | None:
    """The names of all documents where there are few of them; rows without text do not count.

    Raises:
        DataError: no file has a document.
    """
    if sum(max(facts.rows, 1) for facts in files) >= FEW_DOCUMENTS:
        return None
    names = [facts.name for facts in files if facts.kind == "text"]
    for facts in files:
        names += _row_keys(facts)
    if not names:
        raise DataError(Problem("data.dataset", "the corpus is empty: no row has text", [f.name for f in files]))
    return names


def _row_keys(facts: FileFacts) -> list[str]:
    """The names of the rows that hold text (rows that are malformed are reported when they are built)."""
    if facts.kind == "text" or ("tokens" in facts.columns and "text" not in facts.columns):
        return [f"{facts.name}:{row}" for row in range(facts.rows)]
    problems: list[Problem] = []
    pieces = (piece for extent in _all_extents(facts, 0) for piece in read_pieces(extent, problems))
    return [f"{facts.name}:{piece.document_id}" for piece in pieces if piece.first]


def thresholds(few: list[str] | None, *, with_test: bool) -> Thresholds:
    """Hash ranges of the splits; by rank when there are so few documents that a split might come out empty.

    Args:
        few: the names of all of them, where they are few.
        with_test: whether there is a test split.
    """
    low, high = int(0.90 * _TOP), int(0.95 * _TOP)
    if few is not None:
        ranked = sorted(map(row_hash, few))
        share = round(0.05 * len(few))
        num_test, num_validation = (share if with_test else 0), max(1, share)
        high = ranked[-num_test] if num_test else _TOP
        low = ranked[len(few) - num_test - num_validation]
    elif not with_test:
        low, high = high, _TOP
    ranges = {"train": (0, low), "validation": (low, high), "test": (high, _TOP)}
    return {name: bounds for name, bounds in ranges.items() if bounds[0] < bounds[1]}


def contiguous(facts: FileFacts, document_id: int = 0) -> dict[str, list[Extent]]:
    """Cut the only document of a source at nine tenths of its characters, as nanoGPT does.

    Raises:
        DataError: it is too short to be cut.
    """
    if facts.kind != "text":
        whole = _all_extents(facts, document_id)
        return {
            "train": [replace(extent, clip=(0, 9), size=extent.size * 9 // 10 + 1) for extent in whole],
            "validation": [replace(extent, clip=(9, 10), size=extent.size // 10 + 1) for extent in whole],
        }
    if facts.chars < 2:
        raise DataError(Problem(facts.path, "is too short to be cut into train and validation", facts.chars))
    return _cut_in_two(facts, _nine_tenths(facts.chars), facts.bytes, document_id)


def held_out(facts: FileFacts) -> dict[str, list[Extent]]:
    """Cut the training part of `contiguous` once more at nine tenths of its characters, and leave out the rest.

    Raises:
        DataError: it is too short to be cut.
    """
    chars = _nine_tenths(facts.chars)
    if facts.chars < 2 or chars < 2:
        raise DataError(Problem(facts.path, "has a training part too short to be cut", facts.chars))
    return _cut_in_two(facts, _nine_tenths(chars), character_offset(facts.path, chars), 0)


def _nine_tenths(chars: int) -> int:
    return max(1, int(chars * 0.9))


def _cut_in_two(facts: FileFacts, chars: int, end: int, document_id: int) -> dict[str, list[Extent]]:
    """The first characters of a text for training, the rest up to the byte ``end`` for validation."""
    middle = character_offset(facts.path, chars)
    train = Extent(facts.path, facts.name, "text", 0, middle, document_id, middle)
    validation = Extent(facts.path, facts.name, "text", middle, end, document_id + 1, end - middle)
    return {"train": [train], "validation": [validation]}


def file_extent(facts: FileFacts, document_id: int) -> Extent:
    """A whole text file as one document."""
    return Extent(facts.path, facts.name, "text", 0, facts.bytes, document_id, facts.bytes)


def _all_extents(facts: FileFacts, first_id: int) -> list[Extent]:
    """Every document of a file, in runs of some MiB."""
    if facts.kind == "text":
        return [file_extent(facts, first_id)]
    extents, row = [], 0
    if facts.kind == "parquet":
        for group, (size, rows) in enumerate(facts.marks):
            extents.append(
                Extent(facts.path, facts.name, "parquet", group, group + 1, first_id + row, max(1, size), row)
            )
            row += rows
        return extents
    ends = [*(offset for offset, _ in facts.marks[1:]), facts.bytes]
    for (start, row), end in zip(facts.marks, ends, strict=True):
        if start < end:
            extents.append(Extent(facts.path, facts.name, "jsonl", start, end, first_id + row, end - start, row))
    return extents


def _first_document_ids(files: Sequence[FileFacts]) -> dict[str, int]:
    ids, count = {}, 0
    for facts in files:
        ids[facts.name] = count
        # A text file may be cut in two documents, hence the second id.
        count += max(facts.rows, 2 if len(files) == 1 else 1)
    return ids
