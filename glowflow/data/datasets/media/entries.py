"""The catalogue's entries with media, and how each becomes a source from the folders that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.entry import Entry, MediaSet
from glowflow.data.datasets.media import av_digits, digits, flickr8k, fsdd, mnist, multi30k
from glowflow.data.datasets.media.columns import mapping_problems
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Source, source_digest

__all__ = ["MEDIA_ENTRIES", "found_folders", "resolve_media"]

Places = Callable[[str], list[tuple[str, Path]]]  # folder name -> where it may lie, each place with a label


def found_folders(media: MediaSet, places: Places) -> dict[str, Path]:
    """Folder name -> where it lies with all its files; one that lies nowhere is left out."""
    found = {}
    for folder, files in media.needs.items():
        for _, place in places(folder):
            if all(any(_exists(place, name) for name in names) for names in files):
                found[folder] = place
                break
    return found


def _exists(place: Path, name: str) -> bool:
    return (place / name).is_dir() if name.endswith("/") else (place / name).is_file()


def resolve_media(entry: Entry, config: DataConfig, places: Places) -> Source:
    """The source of an entry.

    Raises:
        DataError: files are missing (every folder is named), or the config names columns that the entry has not.
    """
    media = entry.media
    assert media is not None, "only entries with media come here"
    folders, settings = found_folders(media, places), SampleSettings.from_config(config)
    missing = [_nowhere(entry, folder, places) for folder in media.needs if folder not in folders]
    if missing:
        raise DataError(missing)
    if problems := mapping_problems(settings, media.columns, entry.name):
        raise DataError(problems, title="columns that are not there")
    files, splits = media.layout(folders)
    return Source(
        name=entry.name,
        origin=media.origin,
        licence=entry.licence,
        tokenizer=entry.tokenizer,
        digest=source_digest(files, splits),
        splits=splits,
        files=len(files),
        bytes=sum(one.bytes for one in files),
        skipped=tuple(media.left_out(folders)),
        samples=settings,
    )


def _nowhere(entry: Entry, folder: str, places: Places) -> Problem:
    assert entry.media is not None
    names = ", ".join(names[0] for names in entry.media.needs[folder])
    looked = [f"{label} ({place})" for label, place in places(folder)]
    if not os.environ.get("GLOWFLOW_DATA"):
        looked.insert(0, "GLOWFLOW_DATA (not set)")
    hint = (
        f"looked in: {'; '.join(looked)}. Put {names} ({entry.media.origin}) into one of the folders above, or set "
        f"GLOWFLOW_DATA to a folder that has {folder}/{names.split(',')[0]}"
    )
    return Problem("data.dataset", f"needs the files of {folder}, which are not on this machine", entry.name, hint)


def _entry(
    name: str, description: str, licence: str, media: MediaSet, tokenizer: str = "bytes", vocabulary: int | None = None
) -> Entry:
    return Entry(name, description, licence, tokenizer, {}, (), False, vocabulary=vocabulary, media=media)


_FLICKR8K = "Flickr8k (Hodosh, Young and Hockenmaier, 2013)"
_MNIST = "MNIST (LeCun, Cortes and Burges)"
_FSDD = "Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset)"

MEDIA_ENTRIES = (
    _entry(
        "digits",
        "handwritten digits, each with another digit as a telephone's tone pair and a text that names both and their "
        "sum; on every machine",
        "pictures: CC BY 4.0 (UCI), as in scikit-learn; tones: made here",
        MediaSet(digits.layout, digits.COLUMNS, {}, "scikit-learn's load_digits, and tones made by GlowFlow"),
        tokenizer="words",
        vocabulary=24,  # 0 to 18, three words, <unk> and <eos>
    ),
    _entry(
        "mnist",
        "70,000 handwritten digits; official test part, the last 5,000 of the training part for validation",
        "CC BY-SA 3.0",
        MediaSet(mnist.layout, mnist.COLUMNS, {"mnist": mnist.FILES}, _MNIST),
    ),
    _entry(
        "fsdd",
        "3,000 spoken digits of six speakers; test: recordings 0-4 of each speaker and digit, validation: 5-9",
        "CC BY-SA 4.0",
        MediaSet(fsdd.layout, fsdd.COLUMNS, {"fsdd": fsdd.FILES}, _FSDD),
    ),
    _entry(
        "av-digits",
        "the same digit written (MNIST, 4 principal components) and spoken (FSDD, noise at -6 dB), as in AV-MNIST",
        "CC BY-SA 3.0 (MNIST) and CC BY-SA 4.0 (FSDD)",
        MediaSet(
            av_digits.layout, av_digits.COLUMNS, {"mnist": mnist.FILES, "fsdd": fsdd.FILES}, f"{_MNIST} and {_FSDD}"
        ),
    ),
    _entry(
        "flickr8k",
        "8,000 photographs with five captions each, official splits; a sample is one caption with its picture",
        "non-commercial research and education only",
        MediaSet(flickr8k.layout, flickr8k.COLUMNS, {"flickr8k": flickr8k.FILES}, _FLICKR8K, flickr8k.left_out),
        tokenizer="words:4000",
    ),
    _entry(
        "multi30k",
        "English to German with the picture, for the 7,478 lines of Multi30k whose pictures are in flickr8k "
        "(arXiv:1605.00459)",
        "research only (captions of Flickr30k)",
        MediaSet(
            multi30k.layout,
            multi30k.COLUMNS,
            {"multi30k": multi30k.FILES, "flickr8k": ((flickr8k.ARCHIVE,),)},
            f"Multi30k task 1, linked with {_FLICKR8K}",
        ),
        tokenizer="bpe:4096",
    ),
)
