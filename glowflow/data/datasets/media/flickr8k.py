"""``flickr8k``: photographs with five captions each, in the official splits; a sample is one caption and its picture.

Captions are in lower case, their words separated by spaces as published. Pictures are read from ``images_112.zip``.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.samples import Medium, RawSample
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts, Skipped
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["ARCHIVE", "COLUMNS", "FILES", "facts", "layout", "left_out", "opened_archive", "picture_sizes", "read"]

COLUMNS = ("text", "label", "caption", "number", "file_name")
ARCHIVE = "images_112.zip"
_CAPTIONS = "Flickr8k.token.txt"
_SPLITS = {"train": "trainImages", "validation": "devImages", "test": "testImages"}
FILES = ((_CAPTIONS,), (ARCHIVE,), *((f"Flickr_8k.{name}.txt",) for name in _SPLITS.values()))
_PICTURES_PER_EXTENT = 256


def facts(folder: Path, names: tuple[str, ...]) -> list[FileFacts]:
    """Sizes and hashes of files of a folder."""
    return [
        FileFacts(str(folder / name), name, "samples", (folder / name).stat().st_size, file_sha256(folder / name))
        for name in names
    ]


def layout(folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """The files, and extents of pictures per split.

    Raises:
        DataError: the archive can not be read.
    """
    folder = folders["flickr8k"]
    sizes, captions = picture_sizes(folder), _captions(str(folder))
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for split in _SPLITS:
        names = _split_names(str(folder), split)
        for start in range(0, len(names), _PICTURES_PER_EXTENT):
            chosen = names[start : start + _PICTURES_PER_EXTENT]
            place = (start, start + len(chosen), document_id, sum(sizes.get(name, 0) for name in chosen))
            splits.setdefault(split, []).append(Extent(str(folder), split, "samples", *place, reader="flickr8k"))
            document_id += sum(len(captions.get(name, ())) for name in chosen)
    return facts(folder, tuple(names[0] for names in FILES)), splits


def left_out(folders: Mapping[str, Path]) -> list[Skipped]:
    """Captions without a picture, and pictures that are in no split."""
    folder = folders["flickr8k"]
    sizes, captions = picture_sizes(folder), _captions(str(folder))
    used = {name for split in _SPLITS for name in _split_names(str(folder), split)}
    found = [
        Skipped(name, f"its {len(texts)} captions have no picture")
        for name, texts in sorted(captions.items())
        if name not in sizes and name not in used
    ]
    unused = len(sizes.keys() - used)
    return [*found, *([Skipped(f"{unused} pictures", "are in none of the official splits")] if unused else [])]


@lru_cache(maxsize=2)
def _captions(folder: str) -> dict[str, list[str]]:
    """Picture -> its captions."""
    found: dict[str, list[str]] = {}
    for line in (Path(folder) / _CAPTIONS).read_text(encoding="utf-8").splitlines():
        key, _, caption = line.partition("\t")
        if caption:
            found.setdefault(key.rpartition("#")[0], []).append(" ".join(caption.lower().split()))
    return found


@lru_cache(maxsize=4)
def _split_names(folder: str, split: str) -> list[str]:
    text = (Path(folder) / f"Flickr_8k.{_SPLITS[split]}.txt").read_text(encoding="utf-8")
    return [name for line in text.splitlines() if (name := line.strip())]


def picture_sizes(folder: Path) -> dict[str, int]:
    """Picture -> bytes, of the archive."""
    with opened_archive(folder) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@contextmanager
def opened_archive(folder: Path) -> Iterator[zipfile.ZipFile]:
    """The archive of pictures.

    Raises:
        DataError: it is none.
    """
    path = folder / ARCHIVE
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(Problem(str(path), f"is no readable archive: {error}", hint="fetch it again")) from error
    with archive:
        yield archive


def picture(archive: zipfile.ZipFile, name: str) -> Medium:
    """One picture of the archive.

    Raises:
        BadSample: it is not there, or damaged.
    """
    try:
        return Medium(archive.read(name), name)
    except KeyError:
        raise BadSample("missing_file", f"{ARCHIVE} has no {name}") from None
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise BadSample("no_data", f"{name} cannot be read from {ARCHIVE}: {error}") from None


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The captions of a range of pictures."""
    captions = _captions(extent.path)
    document_id = extent.document_id
    with opened_archive(Path(extent.path)) as archive:
        for name in _split_names(extent.path, extent.name)[extent.start : extent.end]:
            bad: BadSample | None = None
            images: tuple[Medium, ...] = ()
            if media:
                try:
                    images = (picture(archive, name),)
                except BadSample as error:
                    bad = error
            for number, caption in enumerate(captions.get(name, ())):
                sample = RawSample(document_id, f"{name}#{number}", name, images=images, group=name, bad=bad)
                record = {"text": caption, "caption": caption, "number": number, "file_name": name, "label": None}
                yield sample if bad else compose_known(record, settings, sample)
                document_id += 1
