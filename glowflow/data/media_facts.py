"""What ``glowflow data inspect`` tells of a data set with media: read from its shards' columns, but not the media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.histograms import Histogram, histogram
from glowflow.data.manifest import Manifest
from glowflow.data.shards import read_rows

__all__ = ["COMBINATIONS", "media_facts"]

COMBINATIONS = ("text", "image", "audio", "image+audio")
"""Which modalities a sample may have beside its text."""
_COLUMNS = ["num_tokens", "image_sizes", "audio_lengths", "label", "bad"]
_MOST_SIZES = 8
_Ints = npt.NDArray[np.int64]


@dataclass
class _Tally:
    """What is counted over a split, or over all."""

    samples: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    rates: Counter[int] = field(default_factory=Counter)
    tokens: list[_Ints] = field(default_factory=list)
    heights: list[_Ints] = field(default_factory=list)
    widths: list[_Ints] = field(default_factory=list)
    seconds: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, table: Any) -> None:
        """Count one row group."""
        images, sizes = _lists(table, "image_sizes", ("height", "width"))
        audio, lengths = _lists(table, "audio_lengths", ("samples", "rate"))
        bad = [reason for reason in table.column("bad").to_pylist() if reason is not None]
        good = ~np.array(table.column("bad").is_valid(), dtype=bool)
        # 0: text alone, 1: pictures, 2: recordings, 3: both; as in COMBINATIONS.
        kinds = ((images > 0) + 2 * (audio > 0))[good]
        self.samples.update({COMBINATIONS[kind]: int((kinds == kind).sum()) for kind in range(len(COMBINATIONS))})
        self.bad.update(reason.partition(":")[0] for reason in bad)
        self.labels.update(label for label in table.column("label").to_pylist() if label is not None)
        self.rates.update(lengths["rate"].tolist())
        self.tokens.append(table.column("num_tokens").to_numpy().astype(np.int64)[good])
        self.heights.append(sizes["height"])
        self.widths.append(sizes["width"])
        self.seconds.append(lengths["samples"] / np.maximum(lengths["rate"], 1))

    def merge(self, other: _Tally) -> None:
        """Count what another one has counted."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            mine.update(value) if isinstance(value, Counter) else mine.extend(value)

    def facts(self) -> dict[str, Any]:
        """For JSON: histograms are objects with edges and counts, null where there is nothing to count."""
        heights, widths = _joined(self.heights), _joined(self.widths)
        sizes, counts = np.unique(np.stack([heights, widths], 1), axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:_MOST_SIZES]
        return {
            "samples": {name: self.samples[name] for name in COMBINATIONS},
            "images": len(heights),
            "audio": sum(self.rates.values()),
            "tokens": _told(histogram(_joined(self.tokens))),
            "image_heights": _told(histogram(heights)),
            "image_widths": _told(histogram(widths)),
            "image_sizes": {
                "distinct": len(sizes),
                "most": [[*map(int, sizes[i]), int(counts[i])] for i in order],
            },
            "audio_seconds": _told(histogram(_joined(self.seconds, np.float64))),
            "audio_rates": {str(rate): count for rate, count in sorted(self.rates.items())},
            "labels": dict(sorted(self.labels.items(), key=_label_order)),
            "bad": dict(sorted(self.bad.items())),
        }


def _lists(table: Any, column: str, fields: tuple[str, ...]) -> tuple[_Ints, dict[str, _Ints]]:
    """A column of lists of structs: how many each row has, and each field of all of them in one array."""
    lists = table.column(column).combine_chunks()
    structs = lists.flatten()
    counts = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return counts, {name: structs.field(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in fields}


def _joined(arrays: list[Any], dtype: Any = np.int64) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _told(found: Histogram | None) -> dict[str, Any] | None:
    return None if found is None else {**found.to_dict(), "labels": found.labels(), "summary": found.summary()}


def _label_order(item: tuple[str, int]) -> tuple[Any, ...]:
    """Numbers by their value, then words by the alphabet."""
    label = item[0]
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def media_facts(manifest: Manifest) -> dict[str, Any]:
    """Columns, placeholders, bad samples, and per split and over all: samples by modality, lengths, sizes, labels.

    Raises:
        DataError: a shard cannot be read, or lacks a column.
    """
    total, splits = _Tally(), {}
    for name in manifest.splits:
        tally = _Tally()
        for table in _tables(manifest, name):
            tally.add(table)
        total.merge(tally)
        splits[name] = tally.facts()
    ids: dict[str, int] = getattr(manifest.tokenizer(), "media_ids", {})
    return {
        "schema": _schema(manifest),
        "placeholders": {name: ids.get(name) for name in manifest.media.get("placeholders", [])},
        "bad": manifest.media.get("bad", {}),
        "all": total.facts(),
        "splits": splits,
    }


def _tables(manifest: Manifest, split: str) -> Iterator[Any]:
    for index, shard in enumerate(manifest.splits[split].shards):
        for group in range(len(shard.row_groups)):
            table = read_rows(manifest, split, index, group, _COLUMNS)
            missing = set(_COLUMNS) - set(table.column_names)
            if missing:
                rule = f"lacks the columns {', '.join(sorted(missing))} of a data set with media"
                raise DataError(Problem(str(manifest.shard_path(shard)), rule, hint="build the data set again"))
            yield table


def _schema(manifest: Manifest) -> list[dict[str, str]]:
    """Name and type of each column of the first shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = next((shard for split in manifest.splits.values() for shard in split.shards), None)
    if shard is None:
        return []
    try:
        columns = pq.read_schema(manifest.shard_path(shard))
    except (OSError, pa.ArrowException) as error:
        raise DataError(Problem(str(manifest.shard_path(shard)), f"the shard cannot be read: {error}")) from error
    return [{"column": column.name, "type": _short_type(str(column.type))} for column in columns]


def _short_type(name: str) -> str:
    """Without the names that Parquet gives to the elements of lists."""
    return name.replace("list<element: ", "list<").replace("list<item: ", "list<").replace(" not null", "")
