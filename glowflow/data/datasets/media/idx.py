"""The idx files of MNIST and its kin, gzipped or not: pictures become PNG, the bytes beside them are labels."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.encoding import encode_png
from glowflow.data.datasets.media.files import EXTENT_BYTES, SampleFile, cut_rows
from glowflow.data.datasets.media.samples import Medium, RawSample, is_selected
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["is_idx", "labels_beside", "read", "read_labels", "read_pictures", "scan"]

_NAME = re.compile(r"^(.*)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?$", re.IGNORECASE)
_IMAGES, _LABELS = 0x0803, 0x0801
_COLUMNS = ("label",)
_MOST_EXTENTS = 32
_MOST_PACKED = 1100  # deflate makes nothing smaller than about a thousandth
_DAMAGE = (OSError, EOFError, zlib.error, struct.error)


def is_idx(name: str) -> bool:
    """Whether a file is called as idx files of bytes are."""
    return _NAME.match(Path(name).name) is not None


def scan(files: Sequence[tuple[Path, str]]) -> list[SampleFile]:
    """The files of pictures, each with the labels of the same name where there are some.

    Raises:
        DataError: a file is none, or has other counts than the one beside it; all are named.
    """
    found: list[SampleFile] = []
    problems: list[Problem] = []
    for path, name in files:
        if "images" not in path.name.lower():
            continue
        try:
            found.append(_scan(path, name))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems, title="idx files that cannot be used")
    return found


def _scan(path: Path, name: str) -> SampleFile:
    count, height, width = _image_header(path)
    labels = labels_beside(path)
    if labels is not None and (found := len(read_labels(labels))) != count:
        raise DataError(Problem(str(labels), f"must have {count} labels, as many as there are pictures", found))
    both = [path, *([labels] if labels else [])]
    digest = hashlib.sha256("".join(file_sha256(one) for one in both).encode()).hexdigest()
    facts = FileFacts(str(path), name, "samples", sum(one.stat().st_size for one in both), digest, rows=count)
    rows = ((row, row + 1, height * width) for row in range(count))
    match = _NAME.match(path.name)
    stem = match[1].lower() if match else ""
    split = "test" if stem.startswith(("t10k", "test")) else "train" if stem.startswith("train") else None
    # What is packed is read from its beginning to where an extent lies: there must not be many.
    extents = cut_rows(rows, (facts.path, name, "idx"), max(EXTENT_BYTES, count * height * width // _MOST_EXTENTS))
    return SampleFile(facts, tuple(extents), _COLUMNS, split, len(both))


def labels_beside(path: Path) -> Path | None:
    """The file of labels that belongs to a file of pictures."""
    wanted = re.sub("idx3", "idx1", re.sub("images", "labels", path.name, flags=re.IGNORECASE), flags=re.IGNORECASE)
    plain = wanted.removesuffix(".gz")
    return next(
        (path.with_name(name) for name in (wanted, plain, f"{plain}.gz") if path.with_name(name).is_file()), None
    )


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _image_header(path: Path) -> tuple[int, int, int]:
    with _open(path) as stream:
        return _read_header(stream, path)


def _read_header(stream: BinaryIO, path: Path) -> tuple[int, int, int]:
    try:
        magic, count, height, width = struct.unpack(">IIII", stream.read(16))
    except _DAMAGE as error:
        raise DataError(Problem(str(path), f"is no idx file of pictures: {error}")) from error
    if magic != _IMAGES:
        raise DataError(Problem(str(path), "is no idx file of pictures: it begins with another number", hex(magic)))
    if not 0 < height * width or count * height * width > _MOST_PACKED * path.stat().st_size:
        rule = "cannot hold what its header says"
        raise DataError(Problem(str(path), rule, f"{count} pictures of {height} x {width}"))
    return count, height, width


def read_labels(path: Path) -> npt.NDArray[np.uint8]:
    """The labels of an idx file, (N,).

    Raises:
        DataError: it is none, or cut off.
    """
    try:
        with _open(path) as stream:
            magic, count = struct.unpack(">II", stream.read(8))
            labels = np.frombuffer(stream.read(count if magic == _LABELS else 0), np.uint8)
    except _DAMAGE as error:
        raise DataError(Problem(str(path), f"is no idx file of labels: {error}")) from error
    if magic != _LABELS or len(labels) != count:
        raise DataError(Problem(str(path), "is no whole idx file of labels", hint="fetch it again"))
    return labels


def read_pictures(path: Path, start: int = 0, end: int | None = None) -> Iterator[npt.NDArray[np.uint8] | BadSample]:
    """The pictures [start, end) of an idx file, each (H, W) uint8; where it is cut off, what is wrong."""
    with _open(path) as stream:
        count, height, width = _read_header(stream, path)
        size = height * width
        last = count if end is None else min(end, count)
        damage = _skip(stream, start * size)
        for _ in range(start, last):
            content = b""
            if damage is None:
                try:
                    content = stream.read(size)
                except _DAMAGE as error:
                    damage = str(error)
            if len(content) == size:
                yield np.frombuffer(content, np.uint8).reshape(height, width)
            else:
                yield BadSample("no_data", f"the file is cut off{f': {damage}' if damage else ''}")


def _skip(stream: BinaryIO, size: int) -> str | None:
    try:
        stream.seek(size, 1)
    except _DAMAGE as error:
        return str(error)
    return None


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of pictures."""
    path = Path(extent.path)
    beside = labels_beside(path)
    labels = read_labels(beside) if beside is not None else None
    pictures = read_pictures(path, extent.start, extent.end) if media else iter([None] * (extent.end - extent.start))
    for row, pixels in enumerate(pictures, extent.start):
        name = f"{extent.name}:{row}"
        if is_selected(extent, name):
            identity = RawSample(extent.document_id + row - extent.start, name, name)
            record = {"label": int(labels[row])} if labels is not None else {}
            yield _sample(identity, pixels, record, settings)


def _sample(
    identity: RawSample,
    pixels: npt.NDArray[np.uint8] | BadSample | None,
    record: dict[str, int],
    settings: SampleSettings,
) -> RawSample:
    if isinstance(pixels, BadSample):
        return replace(identity, bad=pixels)
    if pixels is not None:
        identity = replace(identity, images=(Medium(encode_png(pixels), f"{identity.name}.png"),))
    return compose_known(record, settings, identity)
