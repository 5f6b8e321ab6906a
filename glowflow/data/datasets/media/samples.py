"""Samples as readers give them: encoded media, text and label, before anything is checked or tokenised.

A reader turns an extent (a part of a source) into samples, in an order and with numbers that depend on the source
alone, and holds no more than a few of them. What is wrong with one sample travels with it; the build's policy decides.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, row_hash
from glowflow.data.processors.bad import BadSample

__all__ = [
    "AUDIO_SUFFIXES",
    "IMAGE_SUFFIXES",
    "READERS",
    "Medium",
    "RawSample",
    "Reader",
    "is_selected",
    "load_file",
    "modality_of",
    "plain",
    "read_samples",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
_LARGEST_FILE = (1 << 31) - 1  # a Parquet value holds no more
_NAMES_NOTHING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class Medium:
    """A picture or recording as it is stored: its bytes, and the name that the source gives it (it may have none)."""

    data: bytes
    path: str


@dataclass(frozen=True)
class RawSample:
    """One sample.

    Args:
        document_id: unique in the source.
        name: what to call it to a user.
        key: what decides its split; samples of one group have one key.
        text, prompt: with placeholders; ``prompt`` None: none is given.
        images, audio: in the order of their placeholders.
        label, group: where the source says them.
        bad: why it can not be used; then the rest does not count.
    """

    document_id: int
    name: str
    key: str
    text: str = ""
    prompt: str | None = None
    images: tuple[Medium, ...] = ()
    audio: tuple[Medium, ...] = ()
    label: str | None = None
    group: str | None = None
    bad: BadSample | None = None


class Reader(Protocol):
    """Reads the samples of an extent that its ``select`` wants, in order."""

    def __call__(self, extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
        """With ``media`` False pictures and recordings are left out (for text alone, and for keys)."""


READERS = {
    "parquet": "glowflow.data.datasets.media.parquet:read",
    "jsonl": "glowflow.data.datasets.media.tables:read_jsonl",
    "table": "glowflow.data.datasets.media.tables:read_table",
    "tar": "glowflow.data.datasets.media.tar:read",
    "classes": "glowflow.data.datasets.media.classes:read",
    "split-classes": "glowflow.data.datasets.media.classes:read_split",
    "idx": "glowflow.data.datasets.media.idx:read",
    "digits": "glowflow.data.datasets.media.digits:read",
    "mnist": "glowflow.data.datasets.media.mnist:read",
    "fsdd": "glowflow.data.datasets.media.fsdd:read",
    "av-digits": "glowflow.data.datasets.media.av_digits:read",
    "flickr8k": "glowflow.data.datasets.media.flickr8k:read",
    "multi30k": "glowflow.data.datasets.media.multi30k:read",
}


def read_samples(extent: Extent, settings: SampleSettings, *, media: bool = True) -> Iterator[RawSample]:
    """The samples of an extent.

    Args:
        extent: of kind ``samples``.
        settings: columns, prompt and template.
        media: whether pictures and recordings are read too.

    Raises:
        DataError: the file as a whole can not be read, or a column that the settings name is not there.
    """
    module, _, function = READERS[extent.reader].partition(":")
    reader: Any = getattr(importlib.import_module(module), function)
    yield from reader(extent, settings, media=media)


def plain(text: str) -> str:
    """A name that can be written: bytes of a file's name that are no UTF-8, and half surrogate pairs, become ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_selected(extent: Extent, key: str) -> bool:
    """Whether a sample belongs to the extent's split."""
    return extent.select is None or extent.select[0] <= row_hash(key) < extent.select[1]


def modality_of(name: str) -> str | None:
    """``image`` or ``audio`` by the name of a file; None: neither."""
    suffix = Path(name.lower()).suffix
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None


def load_file(folder: Path, name: str) -> Medium:
    """A picture or recording from a file, named relative to a folder.

    Raises:
        BadSample: there is no such file, or it is empty.
    """
    try:
        path = folder / name
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise BadSample("no_data", f"{name} has {size} bytes; a sample's file has at most {_LARGEST_FILE}")
        if not path.is_file():
            raise BadSample("missing_file", f"{name} is no file")
        return Medium(path.read_bytes(), name)
    except (FileNotFoundError, NotADirectoryError):
        raise BadSample("missing_file", f"{name} does not exist") from None
    except PermissionError:
        raise BadSample("missing_file", f"{name} may not be read") from None
    except ValueError:
        raise BadSample("missing_file", f"{name!r} is no name of a file") from None
    except OSError as error:
        if error.errno in _NAMES_NOTHING:
            raise BadSample("missing_file", f"{name} is no name of a file") from None
        raise
