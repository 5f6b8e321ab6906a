"""A folder per class: each picture or recording is a sample whose label is the name of its folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from glowflow.data.datasets.layout import split_alias
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.files import SampleFile, cut_rows
from glowflow.data.datasets.media.samples import RawSample, is_selected, load_file, modality_of, plain
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["class_labels", "has_split_folders", "outside_classes", "read", "read_split", "scan"]

_COLUMNS = ("label", "file_name")


def has_split_folders(names: Iterable[str]) -> bool:
    """Whether the first folders are splits, and the classes lie below: ``train/cat/1.jpg``."""
    first = {PurePosixPath(name).parts[0] for name in names if len(PurePosixPath(name).parts) > 1}
    splits = {split_alias(folder) for folder in first}
    return "train" in splits and None not in splits


def class_labels(names: Sequence[str]) -> set[str]:
    """The classes of some files; those that lie in no folder of a class have none."""
    depth = has_split_folders(names)
    return {label for name in names if (label := _label(name, depth)) is not None}


def outside_classes(files: Sequence[tuple[Path, str]]) -> list[str]:
    """The files that lie in no folder of a class."""
    names = [name for _, name in files]
    depth = has_split_folders(names)
    return [name for name in names if _label(name, depth) is None]


def _label(name: str, depth: int) -> str | None:
    folders = PurePosixPath(name).parts[:-1]
    return folders[depth] if len(folders) > depth else None


def scan(files: Sequence[tuple[Path, str]]) -> list[SampleFile]:
    """One entry for each folder that directly holds pictures or recordings."""
    splits = has_split_folders([name for _, name in files])
    by_folder: dict[str, Path] = {}
    for path, name in files:
        if _label(name, splits) is not None:
            by_folder.setdefault(str(PurePosixPath(name).parent), path.parent)
    return [_scan(path, folder, splits) for folder, path in sorted(by_folder.items())]


def _scan(path: Path, folder: str, splits: bool) -> SampleFile:
    digest, rows = hashlib.sha256(), []
    for number, name in enumerate(_names(path, path.stat().st_mtime_ns)):
        size = (path / name).stat().st_size
        digest.update(f"{len(name)}:{name}:{size}:{file_sha256(path / name)};".encode("utf-8", "surrogatepass"))
        rows.append((number, number + 1, size))
    total = sum(size for _, _, size in rows)
    facts = FileFacts(str(path), folder, "samples", total, digest.hexdigest(), rows=len(rows))
    extents = tuple(cut_rows(rows, (facts.path, folder, "split-classes" if splits else "classes")))
    split = split_alias(PurePosixPath(folder).parts[0]) if splits else None
    return SampleFile(facts, extents, _COLUMNS, split, len(rows))


@lru_cache(maxsize=8)
def _names(folder: Path, _mtime_ns: int) -> list[str]:
    """The pictures and recordings in a folder, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and modality_of(e.name) and e.is_file())


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of a folder."""
    yield from _read(extent, settings, media, 0)


def read_split(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The same below a folder of a split."""
    yield from _read(extent, settings, media, 1)


def _read(extent: Extent, settings: SampleSettings, media: bool, depth: int) -> Iterator[RawSample]:
    folder = Path(extent.path)
    label = plain(_label(f"{extent.name}/_", depth) or "") or None
    for number, name in enumerate(_names(folder, folder.stat().st_mtime_ns)[extent.start : extent.end]):
        full = plain(f"{extent.name}/{name}")
        if is_selected(extent, full):
            identity = RawSample(extent.document_id + number, full, full, label=label)
            yield _sample(identity, name, label, settings, folder if media else None)


def _sample(
    identity: RawSample, name: str, label: str | None, settings: SampleSettings, folder: Path | None
) -> RawSample:
    record = {"label": label, "file_name": name}
    sample = compose_known(record, settings, identity)
    if folder is None or sample.bad is not None:
        return sample
    try:
        medium = load_file(folder, name)
    except BadSample as bad:
        return RawSample(identity.document_id, identity.name, identity.key, bad=bad)
    if modality_of(name) == "image":
        return replace(sample, images=(medium,))
    return replace(sample, audio=(medium,))
