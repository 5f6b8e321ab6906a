"""Which tiles of (queries, keys) hold anything to compute, by formula: no mask over all pairs is ever made.

In: a spec, the tiles' size, how many queries and keys. Out: per pair of tiles whether some pair of positions is visible
(``active``) and whether all are (``full``). What block-sparse kernels skip, compute and compute without a mask.

Legend: R tiles of queries, C tiles of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.spec import AttentionSpec, SparsePattern

__all__ = ["BlockLayout", "block_layout"]


@dataclass(frozen=True)
class BlockLayout:
    """The tiles of one rule.

    Args:
        active_rc: (R, C) bool, some visible pair of positions in the tile.
        full_rc: (R, C) bool, every pair visible, and no key of the tile beyond the last.
    """

    active_rc: Tensor
    full_rc: Tensor

    @property
    def density(self) -> float:
        """Share of the tiles that are active."""
        return self.active_rc.float().mean().item()


@dataclass(frozen=True)
class _Grid:
    """First and last position of each tile of queries, (R, 1), and of keys, (1, C)."""

    query_from: Tensor
    query_to: Tensor
    key_from: Tensor
    key_to: Tensor


@lru_cache(maxsize=64)
def block_layout(spec: AttentionSpec, first_query: int, num_queries: int, num_keys: int, tile: int) -> BlockLayout:
    """The tiles of a spec's rule; documents and padding aside. On the CPU, and kept: not to be changed in place.

    ``blocks`` is exact where tiles are whole blocks and begin with one; elsewhere ``active`` may be True for a tile
    of which causality hides what the matrix shows.

    Args:
        first_query: position of the first query, where the first tile of queries begins.
        num_queries, num_keys: the keys are positions 0 .. num_keys - 1.
        tile: positions per tile.
    """
    query_from = torch.arange(first_query, first_query + num_queries, tile)[:, None]
    key_from = torch.arange(0, num_keys, tile)[None, :]
    query_to = (query_from + tile).clamp(max=first_query + num_queries) - 1
    grid = _Grid(query_from, query_to, key_from, (key_from + tile).clamp(max=num_keys) - 1)
    sparse = spec.sparse
    if sparse is not None and sparse.pattern == "blocks":
        active, full = _blocks(sparse, grid)
    elif sparse is not None and sparse.pattern == "strided":
        active, full = _strided(sparse, spec.causal, grid)
    elif sparse is not None and sparse.pattern == "fixed":
        active, full = _fixed(sparse, spec.causal, grid)
    else:
        active, full = _near_and_first(spec, grid)
    if spec.causal:
        active = active & (grid.query_to >= grid.key_from)
        full = full & (grid.query_from >= grid.key_to)
    return BlockLayout(active, full & (grid.key_to - grid.key_from == tile - 1))


def _near(reach: int, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Tiles with some pair, and with only pairs, of distance below ``reach``, on whichever side."""
    nearest = torch.maximum(grid.query_from - grid.key_to, grid.key_from - grid.query_to)
    farthest = torch.maximum(grid.query_to - grid.key_from, grid.key_to - grid.query_from)
    return nearest < reach, farthest < reach


def _near_and_first(spec: AttentionSpec, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Dense attention, windows with sinks, and ``local_global``."""
    reach, first_keys, first_queries = 1 << 62, 0, 0
    if spec.kind == "windowed":
        assert spec.window is not None
        reach, first_keys = spec.window, spec.sinks
    elif spec.sparse is not None:
        reach, first_keys = spec.sparse.local, spec.sparse.global_tokens
        first_queries = 0 if spec.causal else first_keys
    active = _near(reach, grid)[0] | (grid.key_from < first_keys) | (grid.query_from < first_queries)
    rest = _Grid(  # neither the query nor the key is among the first
        grid.query_from.clamp(min=first_queries), grid.query_to, grid.key_from.clamp(min=first_keys), grid.key_to
    )
    empty = (rest.query_from > rest.query_to) | (rest.key_from > rest.key_to)
    return active, _near(reach, rest)[1] | empty


def _strided(sparse: SparsePattern, causal: bool, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Distances in a tile are an interval: count those that are near or a multiple of the stride."""
    lowest, highest = grid.query_from - grid.key_to, grid.query_to - grid.key_from
    low = lowest.clamp(min=0) if causal else lowest
    near_low, near_high = low.clamp(min=1 - sparse.local), highest.clamp(max=sparse.local - 1)
    near = (near_high - near_low + 1).clamp(min=0)
    multiples = _multiples(low, highest, sparse.stride) - _multiples(near_low, near_high, sparse.stride)
    count = near + multiples
    return count > 0, count == highest - lowest + 1


def _multiples(low: Tensor, high: Tensor, stride: int) -> Tensor:
    """How many multiples of ``stride`` lie between, both ends included."""
    counted = high.div(stride, rounding_mode="floor") - (low - 1).div(stride, rounding_mode="floor")
    return torch.where(high >= low, counted, 0)


def _fixed(sparse: SparsePattern, causal: bool, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Keys that close a run, as far as some query reaches, and the near ones."""
    stride = sparse.stride
    last = torch.minimum(grid.key_to, grid.query_to) if causal else grid.key_to.expand_as(grid.query_to + grid.key_to)
    near_active, _ = _near(sparse.local, grid)
    active = near_active | (_multiples(grid.key_from + 1, last + 1, stride) > 0)
    others_from = grid.key_from + (grid.key_from % stride == stride - 1).long()
    others_to = grid.key_to - (grid.key_to % stride == stride - 1).long()
    others = _Grid(grid.query_from, grid.query_to, others_from, others_to)
    return active, _near(sparse.local, others)[1] | (others_from > others_to)


def _blocks(sparse: SparsePattern, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Counts of allowed blocks in each rectangle of blocks, by cumulative sums."""
    size = sparse.block_size
    rows, columns = (int(last.max()) // size + 1 for last in (grid.query_to, grid.key_to))
    table = torch.tensor(sparse.blocks, dtype=torch.int64)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    shifted = column - (row - (len(table) - 1)).clamp(min=0)  # later rows are the last one, shifted
    inside = (shifted >= 0) & (shifted < len(table))
    allowed = table[row.clamp(max=len(table) - 1), shifted.clamp(0, len(table) - 1)] * inside
    sums = F.pad(allowed.cumsum(0).cumsum(1), (1, 0, 1, 0))
    top, bottom = grid.query_from // size, grid.query_to // size + 1
    left, right = grid.key_from // size, grid.key_to // size + 1
    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return count > 0, count == (bottom - top) * (right - left)
