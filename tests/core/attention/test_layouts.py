"""Tiles that hold anything to compute: the formulas against every pair of positions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glowflow.core.attention.layouts import block_layout
from glowflow.core.attention.spec import AttentionSpec, SparsePattern
from tests.core.attention.definition import PATTERNS, sees

MORE = {
    **PATTERNS,
    "strided-dense": AttentionSpec(kind="sparse", sparse=SparsePattern("strided", local=2, stride=2)),
    "fixed-dense": AttentionSpec(kind="sparse", sparse=SparsePattern("fixed", local=4, stride=2)),
    "many-sinks": AttentionSpec(kind="windowed", window=2, sinks=11),
}


def tiles(spec: AttentionSpec, first: int, queries: int, keys: int, tile: int) -> tuple[list[list[bool]], ...]:
    """Active and full tiles, pair by pair."""
    active, full = [], []
    for row in range(first, first + queries, tile):
        inside = range(row, min(row + tile, first + queries))
        cells = [
            [sees(spec, i, j) for i in inside for j in range(column, min(column + tile, keys))]
            for column in range(0, keys, tile)
        ]
        whole = [column + tile <= keys for column in range(0, keys, tile)]
        active.append([any(cell) for cell in cells])
        full.append([all(cell) and fits for cell, fits in zip(cells, whole, strict=True)])
    return active, full


@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 30, 30), (0, 37, 37), (15, 16, 31)])
@pytest.mark.parametrize("tile", [1, 3, 5])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", [name for name in MORE if not name.startswith("blocks")])
def test_tiles_are_those_of_all_pairs(name: str, causal: bool, tile: int, first: int, queries: int, keys: int) -> None:
    spec = replace(MORE[name], causal=causal)
    layout = block_layout(spec, first, queries, keys, tile)
    assert (layout.active_rc.tolist(), layout.full_rc.tolist()) == tiles(spec, first, queries, keys, tile)


@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 60, 60), (0, 37, 37), (30, 16, 46)])
@pytest.mark.parametrize("tile", [5, 15])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_tiles_of_whole_blocks_are_exact(causal: bool, tile: int, first: int, queries: int, keys: int) -> None:
    spec = replace(PATTERNS["blocks"], causal=causal)
    layout = block_layout(spec, first, queries, keys, tile)
    assert (layout.active_rc.tolist(), layout.full_rc.tolist()) == tiles(spec, first, queries, keys, tile)


@pytest.mark.parametrize("tile", [2, 4, 7])
def test_no_tile_is_missed_where_tiles_cut_blocks(tile: int) -> None:
    layout = block_layout(PATTERNS["blocks"], 3, 40, 43, tile)
    active, full = tiles(PATTERNS["blocks"], 3, 40, 43, tile)
    got = layout.active_rc.tolist(), layout.full_rc.tolist()
    for row, wanted in enumerate(active):
        assert all(not w or g for w, g in zip(wanted, got[0][row], strict=True))
        assert all(not g or w for w, g in zip(full[row], got[1][row], strict=True))


def test_density_is_the_share_of_active_tiles() -> None:
    window = block_layout(AttentionSpec(kind="windowed", window=4), 0, 32, 32, 4)
    assert window.density == pytest.approx((8 + 7) / 64)
    assert block_layout(AttentionSpec(causal=False), 0, 32, 32, 4).density == 1.0
    matrix = SparsePattern("blocks", block_size=4, blocks=((True, True), (True, True)))
    ones = block_layout(AttentionSpec(kind="sparse", causal=False, sparse=matrix), 0, 8, 8, 4)
    assert ones.density == 1.0 and bool(ones.full_rc.all())
