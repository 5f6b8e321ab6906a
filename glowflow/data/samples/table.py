"""The windows of a split whose rows are samples, from the manifest's counts alone.

A window is a run of row groups of about ``window_tokens`` tokens and at most some bytes of media, for samples are drawn
from all over it and its media are kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glowflow.data.manifest import Manifest
from glowflow.data.order import LRU, permutation

__all__ = ["EpochOrder", "SampleTable"]

WINDOW_STREAM = 5  # distinguishes this use of the seed from the others, here and in windows.py
_WINDOW_MEDIA_BYTES = 64 << 20
_GROUP_MEDIA_BYTES = 8 << 20  # different media in a row group of several rows at most, see sample_shards.py
_WHOLE = 1_000_000  # a window in the integers that row groups are measured in
_CACHED_EPOCHS = 2

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """The windows of one epoch in order (n windows), and the rows that have gone before each (n + 1)."""

    windows: Ints
    rows: Ints


class SampleTable:
    """The windows of one split of a manifest.

    Args:
        manifest: the data set.
        split: name of the split.
        window_tokens: largest tokens of a window, exceeded by less than one row group.
        seed: seed of the permutation of windows; ``None`` keeps the order of the shards.
        source: index of the source in the plan (part of the seed).
    """

    def __init__(self, manifest: Manifest, split: str, window_tokens: int, seed: int | None, source: int) -> None:
        self.manifest, self.split, self.seed, self.source = manifest, split, seed, source
        groups = [
            (s, g, info.rows, info.tokens, info.media_bytes)
            for s, shard in enumerate(manifest.split(split).shards)
            for g, info in enumerate(shard.row_groups)
        ]
        table = np.array(groups, dtype=np.int64).reshape(-1, 5)
        self.shard, self.row_group, self.group_rows, tokens, media = table.T
        # Counted are files as often as rows have them; held in memory are the different ones.
        held = np.where(self.group_rows == 1, media, np.minimum(media, _GROUP_MEDIA_BYTES))
        shares = np.maximum(tokens * _WHOLE // window_tokens, held * _WHOLE // _WINDOW_MEDIA_BYTES)
        self.first_group = _window_starts(shares)
        starts = self.first_group[:-1]
        self.rows = np.add.reduceat(self.group_rows, starts) if len(starts) else self.group_rows
        self.held_bytes = np.add.reduceat(held, starts) if len(starts) else held
        self.media_bytes = int(media.sum())
        self.total_rows = int(self.rows.sum())
        self._orders: LRU[int, EpochOrder] = LRU(_CACHED_EPOCHS)

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self, window: int) -> range:
        """The row groups of a window, as indices of ``shard``, ``row_group`` and ``group_rows``."""
        return range(int(self.first_group[window]), int(self.first_group[window + 1]))

    def order(self, epoch: int) -> EpochOrder:
        """The permuted windows of an epoch; the last two epochs are kept."""
        cached = self._orders.get(epoch)
        if cached is not None:
            return cached
        if self.seed is None:
            windows = np.arange(len(self), dtype=np.int64)
        else:
            windows = permutation(len(self), self.seed, WINDOW_STREAM, self.source, epoch)
        order = EpochOrder(windows, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows[windows])]))
        self._orders.put(epoch, order)
        return order


def _window_starts(shares: Ints) -> Ints:
    """First row group of each window, and the number of row groups at the end: windows of nearly equal size.

    Args:
        shares: of each row group, its part of the largest window in millionths.
    """
    total = int(shares.sum())
    if not total:
        return np.array([0, len(shares)] if len(shares) else [0], np.int64)
    count = -(-total // _WHOLE)
    middle_twice = 2 * np.cumsum(shares) - shares
    starts = np.flatnonzero(np.diff(middle_twice * count // (2 * total), prepend=-1))
    return np.append(starts, len(shares))
