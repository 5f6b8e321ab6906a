"""Deterministic mixing of weighted sources: which source gives sequence g, and which of its own sequences that is.

Time runs in blocks of N sequences. Up to the end of block b, source s has given floor(C_s b N) - floor(C_{s-1} b N)
sequences, where C_s is the exact cumulative share: a source is never more than one sequence away from its weight,
however long the run. Inside a block the sources are permuted by a seeded generator. Both are O(1) in g.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.data.order import LRU, permutation

__all__ = ["Mixture", "lane_sources"]

_MIN_BLOCK = 1024
_MAX_BLOCK = 1 << 20
_MIXTURE_STREAM = 1  # distinguishes this use of the seed from the others
_CACHED_BLOCKS = 4

Ints = NDArray[np.int64]


class Mixture:
    """A fixed interleaving of the sequences of several sources.

    Args:
        weights: positive shares, in any unit.
        seed: seed of the run.

    Raises:
        DataError: a share is below one sequence in half a million.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = [Fraction(weight) for weight in weights]
        total = sum(shares, Fraction(0))
        self._cumulative = [sum(shares[: i + 1], Fraction(0)) / total for i in range(len(shares))]
        self._seed = seed
        self._blocks: LRU[int, tuple[Ints, Ints]] = LRU(_CACHED_BLOCKS)
        smallest = min(shares) / total
        self.block_size = _MIN_BLOCK
        # With at least two sequences to a block the floors above can only grow, so every quota is >= 1.
        while smallest * self.block_size < 2 and self.block_size < _MAX_BLOCK:
            self.block_size *= 2
        if smallest * self.block_size < 2:
            rule = f"must be at least {2 / _MAX_BLOCK:.2g} of the sum of all weights"
            raise DataError(Problem("data.sources.weight", rule, min(weights), "leave this source out"))

    def counts_before_block(self, block: int) -> Ints:
        """Sequences that each source has given before a block: (num_sources,) int64."""
        edges = [(share * block * self.block_size).__floor__() for share in self._cumulative]
        before = np.array([0, *edges], dtype=np.int64)
        return before[1:] - before[:-1]

    def count_before(self, source: int, sequence: int) -> int:
        """How many of the sequences 0..sequence-1 come from a source."""
        if len(self._cumulative) == 1:
            return sequence
        block, inside = divmod(sequence, self.block_size)
        source_of, _ = self._block(block)
        return int(self.counts_before_block(block)[source]) + int(np.count_nonzero(source_of[:inside] == source))

    def locate(self, sequences: Ints) -> tuple[Ints, Ints]:
        """The source (n,) of each sequence (n,), and the index of the sequence within that source (n,)."""
        if len(self._cumulative) == 1:
            return np.zeros(len(sequences), np.int64), sequences
        source, index = np.empty(len(sequences), np.int64), np.empty(len(sequences), np.int64)
        blocks = sequences // self.block_size
        for block in np.unique(blocks):
            here = blocks == block
            source_of, index_of = self._block(int(block))
            inside = sequences[here] - block * self.block_size
            source[here], index[here] = source_of[inside], index_of[inside]
        return source, index

    def _block(self, block: int) -> tuple[Ints, Ints]:
        """Source, and index within the source, of every sequence of a block."""
        cached = self._blocks.get(block)
        if cached is not None:
            return cached
        before = self.counts_before_block(block)
        quotas = self.counts_before_block(block + 1) - before
        order = permutation(self.block_size, self._seed, _MIXTURE_STREAM, block)
        source_of = np.repeat(np.arange(len(quotas)), quotas)[order]
        index_of = np.empty(self.block_size, np.int64)
        for source, first in enumerate(before):
            mine = source_of == source
            index_of[mine] = first + np.arange(np.count_nonzero(mine))
        self._blocks.put(block, (source_of, index_of))
        return source_of, index_of


def lane_sources(weights: Sequence[float], num_lanes: int) -> Ints:
    """The source of each lane (num_lanes,): quotas by largest remainder, at least one lane each, evenly spread.

    Raises:
        DataError: there are fewer lanes than sources.
    """
    if num_lanes < len(weights):
        rule = f"must be at least the number of sources, {len(weights)}, with data.layout lanes"
        raise DataError(Problem("training.batch_size", rule, num_lanes))
    shares = [Fraction(weight) for weight in weights]
    free = num_lanes - len(weights)
    exact = [share * free / sum(shares) for share in shares]
    quotas = [1 + value.__floor__() for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (exact[i].__floor__() - exact[i], i))
    for source in by_remainder[: num_lanes - sum(quotas)]:
        quotas[source] += 1
    # The k-th of n lanes of a source would like to stand at (k + 1/2) / n of the way.
    wishes = [((k + 0.5) / quota, source) for source, quota in enumerate(quotas) for k in range(quota)]
    return np.array([source for _, source in sorted(wishes)], dtype=np.int64)
