"""Layouts: which stretches of which windows fill the rows of a global batch.

``packed`` cuts every window's pair stream into ceil(pairs / T) sequences; sequence g of the run is the k-th of some
epoch of some source. ``lanes`` cuts the pair stream of a whole epoch into one contiguous lane per row of the batch.
Both are pure functions of the plan's arguments and the manifests' counts; they open no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glowflow.data.mixture import Mixture, lane_sources
from glowflow.data.windows import WindowTable

__all__ = ["LanesLayout", "Layout", "PackedLayout", "Segments", "Stretch"]

Ints = NDArray[np.int64]


class Stretch(NamedTuple):
    """``length`` consecutive pairs of a window's pair stream, and where they go."""

    row: int  # row of the result
    column: int  # first position in that row
    source: int
    epoch: int
    window: int
    first: int  # first pair in the window
    length: int
    floor: int  # pair of the window from which positions count, where the document began earlier
    base: int  # added to the document's number in the window


@dataclass
class Segments:
    """What fills rows [start, stop) of the global batches of some steps (B rows together)."""

    stretches: list[Stretch]
    sample_ids: Ints  # (B,)
    reset: NDArray[np.bool_]  # (B,)


class Layout(Protocol):
    """What the plan asks of a layout."""

    streams: int  # how many stretches of data are read side by side
    sequences_per_epoch: int  # of the first source
    num_steps: int | None  # of a plan that ends

    def epoch(self, step: int) -> float:
        """Epochs of the first source that are done before a step."""
        ...

    def weights(self, steps: range) -> Ints:
        """Number of targets in the global batch of each step."""
        ...

    def segments(self, steps: range, start: int, stop: int) -> Segments:
        """What fills rows [start, stop) of the global batch of each step, one step after the other."""
        ...


class PackedLayout:
    """Sequences of one window each, mixed from the sources.

    Args:
        tables: the windows of each source.
        weights: their shares.
        seed: seed of the mixture.
        context: sequence length T.
        global_batch: sequences per step.
        epochs: number of epochs, or ``None`` for an endless plan.
    """

    def __init__(
        self,
        tables: list[WindowTable],
        weights: Sequence[float],
        *,
        seed: int,
        context: int,
        global_batch: int,
        epochs: int | None,
    ) -> None:
        self._tables, self._context, self._global_batch = tables, context, global_batch
        self._mixture = Mixture(weights, seed)
        self.streams = len(tables)
        self.sequences_per_epoch = tables[0].total_sequences
        self.num_sequences = None if epochs is None else epochs * self.sequences_per_epoch
        self.num_steps = None if self.num_sequences is None else -(-self.num_sequences // global_batch)

    def epoch(self, step: int) -> float:
        """Epochs of the first source that are done before a step."""
        return self._mixture.count_before(0, step * self._global_batch) / self.sequences_per_epoch

    def weights(self, steps: range) -> Ints:
        """Number of targets in the global batch of each step."""
        counts = np.zeros(len(steps) * self._global_batch, dtype=np.int64)
        for _, rows, _, _, count in self._located(self._sequences(steps, 0, self._global_batch)):
            counts[rows] = count
        return counts.reshape(len(steps), -1).sum(axis=1)

    def segments(self, steps: range, start: int, stop: int) -> Segments:
        """What fills rows [start, stop) of the global batch of each step, one step after the other."""
        sequences = self._sequences(steps, start, stop)
        stretches = []
        for (source, epoch), rows, window, first, count in self._located(sequences):
            fields = zip(rows.tolist(), window.tolist(), first.tolist(), count.tolist(), strict=True)
            stretches += [Stretch(row, 0, source, epoch, w, f, n, f, 0) for row, w, f, n in fields]
        sample_ids = np.full(len(steps) * (stop - start), -1, dtype=np.int64)
        sample_ids[: len(sequences)] = sequences
        return Segments(stretches, sample_ids, np.ones(len(sample_ids), dtype=np.bool_))

    def _sequences(self, steps: range, start: int, stop: int) -> Ints:
        """Sequences of the run in rows [start, stop) of the steps, without those past the end (which come last)."""
        firsts = np.arange(steps.start, steps.stop, dtype=np.int64) * self._global_batch
        sequences = (firsts[:, None] + np.arange(start, stop)).reshape(-1)
        return sequences if self.num_sequences is None else sequences[sequences < self.num_sequences]

    def _located(self, sequences: Ints) -> list[tuple[tuple[int, int], Ints, Ints, Ints, Ints]]:
        """By (source, epoch): rows, and for each its window, first pair in it and number of pairs."""
        found = []
        source_of, index_of = self._mixture.locate(sequences)
        for source in range(len(self._tables)) if len(sequences) else ():
            table = self._tables[source]
            mine = np.flatnonzero(source_of == source)
            epochs, indices = np.divmod(index_of[mine], table.total_sequences)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if len(mine) else ():
                here = epochs == epoch
                order, index = table.order(epoch), indices[here]
                slot = np.searchsorted(order.sequences, index, side="right") - 1
                window = order.windows[slot]
                first = table.shuffled(epoch, window, index - order.sequences[slot]) * self._context
                count = np.minimum(self._context, table.pairs[window] - first)
                found.append(((source, epoch), mine[here], window, first, count))
        return found


class LanesLayout:
    """One contiguous lane of the epoch's pair stream per row of the batch, for recurrent architectures.

    Lane j of a source's n lanes holds the pairs [j P / n, (j + 1) P / n) of its epoch of P pairs, T at a step; all
    lanes of a source are done at the same step, and start their next epoch together with ``reset``. Arguments as for
    ``PackedLayout``; the number of lanes is ``global_batch``.
    """

    def __init__(
        self,
        tables: list[WindowTable],
        weights: Sequence[float],
        *,
        seed: int,
        context: int,
        global_batch: int,
        epochs: int | None,
    ) -> None:
        self._tables, self._context, self._num_lanes, self._epochs = tables, context, global_batch, epochs
        self._source_of = lane_sources(weights, global_batch)
        self._lanes_of = np.bincount(self._source_of, minlength=len(tables)).tolist()
        self._index_of = np.zeros(global_batch, dtype=np.int64)
        for source in range(len(tables)):
            mine = self._source_of == source
            self._index_of[mine] = np.arange(np.count_nonzero(mine))
        longest = [-(-table.total_pairs // lanes) for table, lanes in zip(tables, self._lanes_of, strict=True)]
        self._steps_of = [-(-pairs // context) for pairs in longest]
        self.streams = global_batch
        self.sequences_per_epoch = self._lanes_of[0] * self._steps_of[0]
        self.num_steps = None if epochs is None else epochs * max(self._steps_of)

    def epoch(self, step: int) -> float:
        """Epochs of the first source that are done before a step."""
        return step / self._steps_of[0]

    def weights(self, steps: range) -> Ints:
        """Number of targets in the global batch of each step."""
        return np.array([self._weight(step) for step in steps], dtype=np.int64)

    def _weight(self, step: int) -> int:
        return sum(last - first for _, _, first, last in (self._range(lane, step) for lane in range(self._num_lanes)))

    def segments(self, steps: range, start: int, stop: int) -> Segments:
        """What fills lanes [start, stop) at each step, one step after the other."""
        stretches: list[Stretch] = []
        shape = (len(steps), stop - start)
        ids = np.arange(start, stop, dtype=np.int64) + np.arange(steps.start, steps.stop)[:, None] * self._num_lanes
        sample_ids, reset = ids.reshape(-1), np.zeros(shape, dtype=np.bool_).reshape(-1)
        for row, (step, lane) in enumerate((step, lane) for step in steps for lane in range(start, stop)):
            epoch, lane_first, first, last = self._range(lane, step)
            reset[row] = step % self._steps_of[self._source_of[lane]] == 0
            stretches += self._stretches(row, int(self._source_of[lane]), epoch, lane_first, first, last)
            if first == last and self._epochs is not None:
                sample_ids[row] = -1
        return Segments(stretches, sample_ids, reset)

    def _range(self, lane: int, step: int) -> tuple[int, int, int, int]:
        """Epoch of a lane at a step; in the epoch's pair stream its start and the step's pairs [first, last)."""
        source, index = int(self._source_of[lane]), int(self._index_of[lane])
        lanes, total = self._lanes_of[source], self._tables[source].total_pairs
        epoch, inside = divmod(step, self._steps_of[source])
        lane_first, lane_last = index * total // lanes, (index + 1) * total // lanes
        if self._epochs is not None and epoch >= self._epochs:
            return epoch, lane_first, lane_last, lane_last
        first = min(lane_first + inside * self._context, lane_last)
        return epoch, lane_first, first, min(first + self._context, lane_last)

    def _stretches(self, row: int, source: int, epoch: int, lane_first: int, first: int, last: int) -> list[Stretch]:
        """Cut pairs [first, last) of an epoch's stream at the borders of its windows."""
        found = []
        order, at = self._tables[source].order(epoch), first
        while at < last:
            slot = int(np.searchsorted(order.pairs, at, side="right")) - 1
            origin, end = int(order.pairs[slot]), int(order.pairs[slot + 1])
            count = min(last, end) - at
            found.append(
                Stretch(
                    row,
                    at - first,
                    source,
                    epoch,
                    int(order.windows[slot]),
                    at - origin,
                    count,
                    lane_first - origin,
                    int(order.rows[slot]),
                )
            )
            at += count
        return found
