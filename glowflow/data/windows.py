"""Windows: consecutive row groups of about ``window_tokens`` tokens, inside which documents are shuffled.

A row of n tokens gives n - 1 (input, target) pairs. The pairs of a window's documents, one document after the other
in permuted order, form the window's *pair stream*; its length follows from the manifest. A document's pieces repeat
one token, so their pairs join without a seam. ``Part`` holds the tokens of a stretch of the pair stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.data.manifest import Manifest
from glowflow.data.order import LRU, permutation

__all__ = ["EpochOrder", "Part", "Window", "WindowReader", "WindowTable"]

_WINDOW_STREAM = 2  # distinguish the uses of the seed
_DOCUMENT_STREAM = 3
_SEQUENCE_STREAM = 4
_CACHED_EPOCHS = 2
_CACHED_SEQUENCE_ORDERS = 4

Ints = NDArray[np.int64]
Tokens = NDArray[Any]  # uint8, uint16 or uint32


@dataclass(frozen=True)
class EpochOrder:
    """The windows of one epoch in order (n windows), and what has gone before each (n + 1 each)."""

    windows: Ints
    sequences: Ints  # cumulative ceil(pairs / context)
    pairs: Ints
    rows: Ints


class WindowTable:
    """The windows of one split of a manifest, from its counts alone.

    Args:
        manifest: the data set.
        split: name of the split.
        window_tokens: largest size of a window, exceeded by less than one row group.
        context: sequence length T.
        seed: seed of the permutation of windows; ``None`` keeps the order of the shards.
        source: index of the source in the plan (part of the seed).
    """

    def __init__(
        self, manifest: Manifest, split: str, window_tokens: int, context: int, seed: int | None, source: int
    ) -> None:
        self.manifest, self.split, self.seed, self.source = manifest, split, seed, source
        shards = manifest.split(split).shards
        groups = [
            (s, g, info.rows, info.tokens) for s, shard in enumerate(shards) for g, info in enumerate(shard.row_groups)
        ]
        table = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.shard, self.row_group, rows, tokens = table.T
        self.first_group = _window_starts(tokens, window_tokens)
        starts = self.first_group[:-1]
        self.rows = np.add.reduceat(rows, starts) if len(starts) else rows
        self.pairs = (np.add.reduceat(tokens, starts) if len(starts) else tokens) - self.rows
        self.sequences = -(-self.pairs // context)
        self.total_pairs = int(self.pairs.sum())
        self.total_rows = int(self.rows.sum())
        self.total_sequences = int(self.sequences.sum())
        self._orders: LRU[int, EpochOrder] = LRU(_CACHED_EPOCHS)
        self._sequence_orders: LRU[tuple[int, int], Ints] = LRU(_CACHED_SEQUENCE_ORDERS)

    def __len__(self) -> int:
        return len(self.pairs)

    def order(self, epoch: int) -> EpochOrder:
        """The permuted windows of an epoch with cumulative counts; the last two epochs are kept."""
        cached = self._orders.get(epoch)
        if cached is not None:
            return cached
        if self.seed is None:
            windows = np.arange(len(self), dtype=np.int64)
        else:
            windows = permutation(len(self), self.seed, _WINDOW_STREAM, self.source, epoch)
        order = EpochOrder(
            windows, *(_cumulative(counts[windows]) for counts in (self.sequences, self.pairs, self.rows))
        )
        self._orders.put(epoch, order)
        return order

    def shuffled(self, epoch: int, windows: Ints, ranks: Ints) -> Ints:
        """Which sequence of its window comes at each rank: neighbours in the text are no neighbours in a batch.

        Without it a long document would fill whole batches with consecutive text, whose gradients say nearly the same.
        """
        if self.seed is None:
            return ranks
        sequences = np.empty_like(ranks)
        for window in np.unique(windows).tolist():
            here = windows == window
            sequences[here] = self._sequence_order(epoch, window)[ranks[here]]
        return sequences

    def _sequence_order(self, epoch: int, window: int) -> Ints:
        cached = self._sequence_orders.get((epoch, window))
        if cached is None:
            assert self.seed is not None
            count = int(self.sequences[window])
            cached = permutation(count, self.seed, _SEQUENCE_STREAM, self.source, epoch, window)
            self._sequence_orders.put((epoch, window), cached)
        return cached


@dataclass(frozen=True)
class Part:
    """A stretch of a window's pair stream: the whole rows that cover pairs [first_pair, last_pair).

    R rows in permuted order. Pair p of row r has its input at ``tokens[p + shift[r]]`` and its target behind it.
    """

    tokens: Tokens
    first_pair: int
    last_pair: int
    row_end: NDArray[Any]  # (R,) pair after the last of each row
    shift: NDArray[Any]  # (R,) token index minus pair index
    document_start: NDArray[Any]  # (R,) first pair of the row's document
    document_row: NDArray[Any]  # (R,) permuted rank in the window of the document's first row: its id

    @cached_property
    def nbytes(self) -> int:
        arrays = (self.tokens, self.row_end, self.shift, self.document_start, self.document_row)
        return sum(array.nbytes for array in arrays)


class Window(Part):
    """A whole decoded window."""

    @classmethod
    def arrange(
        cls, tokens: Tokens, row_lengths: Ints, document_ids: Ints, order: Callable[[int], Ints] | None
    ) -> Window:
        """Lay out the pair stream of decoded rows.

        Args:
            tokens: tokens of all rows, one after the other.
            row_lengths: (R,) tokens per row.
            document_ids: (R,) equal in consecutive rows of one document.
            order: gives the permutation of so many documents; ``None`` keeps their order.
        """
        # 4-byte indices do for all but absurd row groups, and halve the cost of corpora of short rows.
        index = np.int32 if len(tokens) < 2**31 else np.int64
        first_row = np.flatnonzero(np.diff(document_ids, prepend=document_ids[:1] - 1))
        rows_of = np.diff(first_row, append=len(document_ids))
        if order is not None:
            chosen = order(len(first_row))
            first_row, rows_of = first_row[chosen], rows_of[chosen]
        document_row = np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
        rows = np.arange(len(row_lengths)) - document_row + np.repeat(first_row, rows_of)
        row_pairs = row_lengths[rows] - 1
        row_end = np.cumsum(row_pairs)
        row_start = row_end - row_pairs
        shift = (np.cumsum(row_lengths) - row_lengths)[rows] - row_start
        return cls(
            tokens,
            0,
            int(row_pairs.sum()),
            *(array.astype(index) for array in (row_end, shift, row_start[document_row], document_row)),
        )

    def cut(self, first_pair: int, last_pair: int) -> Part:
        """A part with copies of just the rows that cover [first_pair, last_pair)."""
        low = int(np.searchsorted(self.row_end, first_pair, side="right"))
        high = int(np.searchsorted(self.row_end, last_pair, side="left")) + 1
        row_end = self.row_end[low:high]
        before = self.row_end[low - 1 : low] if low else np.zeros(1, row_end.dtype)
        row_start = np.concatenate([before, row_end[:-1]])
        token_start = row_start + self.shift[low:high]
        lengths = row_end - row_start + 1
        new_start = np.cumsum(lengths) - lengths
        source = np.arange(int(lengths.sum())) + np.repeat(token_start - new_start, lengths)
        return Part(
            self.tokens[source],
            first_pair,
            last_pair,
            row_end.copy(),
            (new_start - row_start).astype(row_end.dtype),
            self.document_start[low:high].copy(),
            self.document_row[low:high].copy(),
        )


class WindowReader:
    """Opens windows and keeps what is in use, within a memory limit. The caller holds a lock.

    Args:
        tables: the windows of each source.
        part_pairs: pairs that are kept together for one of the streams that are read side by side; a window that is
            no longer than this is kept whole.
        cache_bytes: largest size of all parts kept.
        keep: how many parts are in use side by side; as many are kept whatever their size.
    """

    def __init__(self, tables: list[WindowTable], part_pairs: int, cache_bytes: int, keep: int) -> None:
        self._tables, self._part_pairs = tables, part_pairs
        self._parts: LRU[tuple[int, int, int, int], Part] = LRU(cache_bytes, lambda part: part.nbytes, keep)
        # Streams that are read side by side often want pieces of one window at the same time.
        self._latest: tuple[tuple[int, int, int], Window] | None = None
        self.windows_opened = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        latest = self._latest[1].nbytes if self._latest else 0
        return self._parts.total + latest

    @property
    def part_pairs(self) -> int:
        return self._part_pairs

    def part(self, source: int, epoch: int, window: int, number: int) -> Part:
        """Part ``number`` of a window: its pairs [number * part_pairs, (number + 1) * part_pairs)."""
        key = (source, epoch, window, number)
        part = self._parts.get(key)
        if part is None:
            part = self._load(*key)
            self._parts.put(key, part)
        return part

    def _load(self, source: int, epoch: int, window: int, number: int) -> Part:
        key = (source, epoch, window)
        if self._latest is not None and self._latest[0] == key:
            whole = self._latest[1]
        else:
            self._latest = None  # let go of the last window before the next one is decoded
            whole = self._open(*key)
        if whole.last_pair <= self._part_pairs:
            self._latest = None  # the cache keeps it
            return whole
        self._latest = (key, whole)
        first = number * self._part_pairs
        return whole.cut(first, min(first + self._part_pairs, whole.last_pair))

    def _open(self, source: int, epoch: int, window: int) -> Window:
        """Decode the row groups of a window and permute its documents."""
        from glowflow.data.shards import read_tokens

        table = self._tables[source]
        self.windows_opened += 1
        groups = range(int(table.first_group[window]), int(table.first_group[window + 1]))
        pieces = [
            read_tokens(table.manifest, table.split, int(table.shard[g]), int(table.row_group[g])) for g in groups
        ]
        tokens, lengths, documents = (_joined([piece[i] for piece in pieces]) for i in range(3))
        lengths = lengths.astype(np.int64)
        self._check(table, window, tokens, lengths)
        seed = table.seed
        order = None if seed is None else lambda n: permutation(n, seed, _DOCUMENT_STREAM, source, epoch, window)
        return Window.arrange(tokens, lengths, documents.astype(np.int64), order)

    @staticmethod
    def _check(table: WindowTable, window: int, tokens: Tokens, lengths: Ints) -> None:
        rows, pairs = int(table.rows[window]), int(table.pairs[window])
        if len(lengths) == rows and len(tokens) == lengths.sum() == pairs + rows and (lengths >= 1).all():
            return
        paths = sorted({int(s) for s in table.shard[table.first_group[window] : table.first_group[window + 1]]})
        shards = table.manifest.split(table.split).shards
        raise DataError(
            Problem(
                ", ".join(str(table.manifest.shard_path(shards[s])) for s in paths),
                f"must hold {rows} rows with {pairs + rows} tokens in this window, as the manifest says",
                {"rows": len(lengths), "tokens": len(tokens)},
                "find the damaged shard with `glowflow data verify`, or build the data set again",
            )
        )


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _cumulative(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _window_starts(tokens: Ints, window_tokens: int) -> Ints:
    """First row group of each window, and the number of row groups at the end: windows of nearly equal size."""
    total = int(tokens.sum())
    if not len(tokens):
        return np.zeros(1, np.int64)
    size = total / max(1, -(-total // window_tokens))
    middle = np.cumsum(tokens) - tokens / 2
    number = np.floor(middle / size) if total else np.zeros(len(tokens))
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return np.append(starts, len(tokens))
