"""Local files and folders with media: which reader a path gets follows from what lies there.

In this order: WebDataset archives; files of captions that name pictures or recordings; Parquet and JSONL with media
columns; idx files; a folder per class. What has no media is left to the readers of text, unless the config maps
columns or gives a prompt or template: then plain rows are samples too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.layout import named_split
from glowflow.data.datasets.media import classes, idx, parquet, tables, tar
from glowflow.data.datasets.media.columns import mapping_problems
from glowflow.data.datasets.media.files import SampleFile
from glowflow.data.datasets.media.samples import modality_of, plain
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.media.splits import assign_splits
from glowflow.data.datasets.scan import NO_TEXT, keep_good, scan_files
from glowflow.data.datasets.source import Skipped, Source, source_digest

__all__ = ["local_media", "reader_of"]

logger = logging.getLogger(__name__)

_SPLIT_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar", ".gz", ".tgz")
_LEAST_SHARE = 0.5  # of the files of a folder of classes are pictures or recordings
Pairs = Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class _Found:
    """The files that one reader takes, and those that nobody takes."""

    reader: str
    taken: Pairs
    left: Pairs


def reader_of(pairs: Pairs, config: DataConfig) -> str | None:
    """The reader that files get; None: they are text."""
    found = _detect(pairs, SampleSettings.from_config(config), config.on_bad_file)
    return found.reader if found else None


def local_media(path: Path, pairs: Pairs, config: DataConfig) -> Source | None:
    """The source that a path with media is; None: there are none.

    Raises:
        DataError: a file can not be used, a column is not there, or there are no samples.
    """
    settings = SampleSettings.from_config(config)
    found = _detect(pairs, settings, config.on_bad_file)
    if found is None:
        return None
    files, bad, empty = _scan(found, settings, config.on_bad_file)
    problems = [
        problem
        for file in files
        if file.facts.rows
        for problem in mapping_problems(settings, file.columns, _told(file))
    ]
    if problems:
        raise DataError(problems, title="columns that are not there")
    splits, unused = assign_splits(files, settings)
    left = [*unused, *_left_out(found, files)]
    for one in left:
        logger.warning("left out %s: %s", one.name, one.reason)
    names = {one.name for one in unused}
    used = [file for file in files if file.facts.name not in names]
    name = path.stem.removesuffix(".tar") if path.is_file() else path.name
    return Source(
        name=name,
        origin=f"local: {path.name}",
        licence="not known",
        tokenizer="bytes",
        digest=source_digest([file.facts for file in used], splits),
        splits=splits,
        files=sum(file.files for file in used),
        bytes=sum(file.facts.bytes for file in used),
        empty_files=empty,
        skipped=(*bad, *left),
        samples=settings,
    )


def _told(file: SampleFile) -> str:
    return file.facts.name if file.facts.name != "." else "the folder"


# --- which reader --------------------------------------------------------------------------------------------------


def _detect(pairs: Pairs, settings: SampleSettings, on_bad_file: str) -> _Found | None:
    archives = [pair for pair in pairs if tar.is_tar(pair[0])]
    if archives and (settings.maps or len(pairs) == 1 or any(tar.has_media(path) for path, _ in archives)):
        return _taking("tar", archives, pairs)
    captions = [pair for pair in pairs if _is_captions(pair[0], settings, alone=len(pairs) == 1)]
    if captions:
        return _taking("table", captions, pairs)
    rows = [pair for pair in pairs if pair[0].suffix.lower() in (".parquet", ".jsonl", ".ndjson")]
    if rows and (settings.maps or any(_has_media(path) for path, _ in rows)):
        return _taking("rows", rows, pairs)
    arrays = [pair for pair in pairs if idx.is_idx(pair[1])]
    if any("images" in path.name.lower() for path, _ in arrays):
        return _taking("idx", arrays, pairs)
    return _detect_classes(pairs, on_bad_file)


def _taking(reader: str, taken: Pairs, pairs: Pairs) -> _Found:
    names = {name for _, name in taken}
    return _Found(reader, taken, [pair for pair in pairs if pair[1] not in names])


def _is_captions(path: Path, settings: SampleSettings, *, alone: bool) -> bool:
    named = tables.is_captions(path.name) or (alone and tables.is_table(path))
    return named and (settings.maps or tables.has_media(path))


def _has_media(path: Path) -> bool:
    return parquet.has_media(path) if path.suffix.lower() == ".parquet" else tables.has_media(path)


def _detect_classes(pairs: Pairs, on_bad_file: str) -> _Found | None:
    """A folder that is mainly pictures or recordings, with nothing else below its first level."""
    media = [pair for pair in pairs if modality_of(pair[1])]
    others = [name for _, name in pairs if not modality_of(name)]
    if not media or len(media) < _LEAST_SHARE * len(pairs) or any(len(PurePosixPath(n).parts) > 1 for n in others):
        return None
    if len(classes.class_labels([name for _, name in media])) > 1:
        return _taking("classes", media, pairs)
    if on_bad_file == "skip" and others:
        return None
    rule = "has pictures or recordings, but neither a file of captions nor a folder for each class"
    hint = "add captions.csv, captions.tsv or captions.jsonl with the columns file_name and text"
    raise DataError(Problem("data.dataset", rule, media[0][1], hint))


# --- scanning ------------------------------------------------------------------------------------------------------


def _scan(found: _Found, settings: SampleSettings, on_bad_file: str) -> tuple[list[SampleFile], list[Skipped], int]:
    """The files as planned, those that are skipped, and the number of empty ones."""
    if found.reader == "tar":
        full = [pair for pair in found.taken if pair[0].stat().st_size]
        files = [tar.scan(path, name, settings) for path, name in full]
        return [_with_split(file) for file in files], [], len(found.taken) - len(full)
    if found.reader == "idx":
        return idx.scan(found.taken), [], 0
    if found.reader == "classes":
        return classes.scan(found.taken), [], 0
    scanned = [replace(one, problem=None) if one.problem == NO_TEXT else one for one in scan_files(found.taken)]
    good, skipped, empty = keep_good(scanned, on_bad_file)
    files = [parquet.scan(one) if one.kind == "parquet" else tables.scan(one, settings) for one in good]
    return [_with_split(file) for file in files], skipped, empty


def _with_split(file: SampleFile) -> SampleFile:
    return replace(file, split=named_split(file.facts.name, _SPLIT_SUFFIXES))


def _left_out(found: _Found, files: Sequence[SampleFile]) -> list[Skipped]:
    """Files beside the samples; pictures and recordings that no sample names are told by their number."""
    named = {name for file in files for name in file.named}
    media = [name for path, name in found.left if modality_of(name) and os.path.normpath(path) not in named]
    left = [Skipped(plain(name), "is no file of samples") for _, name in found.left if not modality_of(name)]
    if found.reader == "classes":
        left += [Skipped(plain(name), "lies in no folder of a class") for name in classes.outside_classes(found.taken)]
    if media:
        left.append(Skipped(f"{len(media)} files such as {plain(media[0])}", "are named by no sample"))
    return left
