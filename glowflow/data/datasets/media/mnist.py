"""``mnist``: 70,000 handwritten digits; the last 5,000 pictures of the official training part are for validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from glowflow.data.datasets.media import idx
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.encoding import encode_png
from glowflow.data.datasets.media.files import cut_rows
from glowflow.data.datasets.media.samples import Medium, RawSample
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["COLUMNS", "FILES", "NUM_VALIDATION", "WORDS", "layout", "picture_files", "read"]

COLUMNS = ("text", "label", "digit", "word")
FILES = tuple(
    (f"{name}.gz", name, f"{name.replace('-idx', '.idx')}")
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
)
"""The four files, each by the names that it may have."""
NUM_VALIDATION = 5000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def picture_files(folder: Path) -> dict[str, Path]:
    """The files of pictures: ``train`` and ``test``."""
    found = [next(folder / name for name in names if (folder / name).is_file()) for names in FILES]
    return {"train": found[0], "test": found[2]}


def layout(folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """The files, and extents of pictures per split."""
    files: list[FileFacts] = []
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for part, path in picture_files(folders["mnist"]).items():
        labels = idx.labels_beside(path)
        for one in (path, labels):
            if one is not None:
                files.append(
                    FileFacts(str(one), one.name.removesuffix(".gz"), "samples", one.stat().st_size, file_sha256(one))
                )
        count = len(idx.read_labels(labels)) if labels is not None else 0
        cut = count - NUM_VALIDATION if part == "train" else count
        extents = [*cut_rows(((n, n + 1, 400) for n in range(count)), (str(path), part, "mnist"))]
        for extent in extents:
            for split, low, high in ((part, 0, cut), ("validation", cut, count)):
                start, end = max(extent.start, low), min(extent.end, high)
                if start < end:
                    piece = replace(extent, start=start, end=end, row=start, document_id=document_id + start)
                    splits.setdefault(split, []).append(replace(piece, size=(end - start) * 400))
        document_id += count
    return files, splits


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of pictures."""
    path = Path(extent.path)
    labels_path = idx.labels_beside(path)
    assert labels_path is not None, "the layout counted its labels"
    labels = idx.read_labels(labels_path)
    pictures = idx.read_pictures(path, extent.start, extent.end) if media else None
    for row in range(extent.start, extent.end):
        name, digit = f"mnist/{extent.name}-{row:05d}", int(labels[row])
        sample = RawSample(extent.document_id + row - extent.start, name, name)
        pixels = next(pictures) if pictures is not None else None
        if isinstance(pixels, BadSample):
            yield replace(sample, bad=pixels)
            continue
        if pixels is not None:
            sample = replace(sample, images=(Medium(encode_png(pixels), f"{name}.png"),))
        record = {"text": "", "label": digit, "digit": digit, "word": WORDS[digit]}
        yield compose_known(record, settings, sample)
