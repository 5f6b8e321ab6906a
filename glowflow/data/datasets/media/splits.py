"""Which sample belongs to which split: by the names of files and folders, else by the hash of the sample's key.

Samples of one key (captions of one picture, recordings of one speaker where ``columns.group`` says so) stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.layout import FEW_DOCUMENTS, selected, thresholds
from glowflow.data.datasets.media.files import SampleFile
from glowflow.data.datasets.media.samples import read_samples
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, Skipped

__all__ = ["assign_splits"]

_COUNTED_ROWS = 4000  # up to here the keys themselves are looked at: many samples may be of few groups


def assign_splits(
    files: Sequence[SampleFile], settings: SampleSettings
) -> tuple[dict[str, list[Extent]], list[Skipped]]:
    """Extents per split, and the files that belong to none.

    Raises:
        DataError: there are no samples, or only one.
    """
    numbered, first = [], 0
    for file in files:
        shifted = tuple(replace(extent, document_id=extent.document_id + first) for extent in file.extents)
        numbered.append(replace(file, extents=shifted))
        first += file.facts.rows
    if not first:
        raise DataError(Problem("data.dataset", "the data set is empty: it has no sample"))
    if len(files) == 1 or "train" not in {file.split for file in files}:
        return _by_hash([e for file in numbered for e in file.extents], first, settings, with_test=True), []
    splits: dict[str, list[Extent]] = {}
    for file in numbered:
        if file.split is not None:
            splits.setdefault(file.split, []).extend(file.extents)
    if "validation" not in splits:
        rows = sum(file.facts.rows for file in numbered if file.split == "train")
        splits.update(_by_hash(splits["train"], rows, settings, with_test=False))
    reason = "its name tells no split while others do"
    return splits, [Skipped(file.facts.name, reason) for file in files if file.split is None]


def _by_hash(
    extents: Sequence[Extent], rows: int, settings: SampleSettings, *, with_test: bool
) -> dict[str, list[Extent]]:
    few = None
    if rows < _COUNTED_ROWS:
        keys = sorted({sample.key for extent in extents for sample in read_samples(extent, settings, media=False)})
        few = keys if len(keys) < FEW_DOCUMENTS else None
        if len(keys) < 2:
            rule = "has a single sample (or group of samples); training and validation need one each"
            raise DataError(Problem("data.dataset", rule, keys))
    ranges = thresholds(few, with_test=with_test)
    return {split: [selected(extent, select) for extent in extents] for split, select in ranges.items()}
