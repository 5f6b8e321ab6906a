"""Sparse attention by gathering: each group of queries meets only the keys that its pattern shows it.

In: queries, keys, values of one pass, in order. Out: what SDPA with the pattern's mask gives. ``blocks`` gathers the
active tiles of each row and computes the rows of equally many tiles in one call; ``local_global`` is a window with
sinks; ``strided`` and ``fixed``, whose rows are sparse but whose tiles are not, take their far keys by residue class,
(T / stride) of them, and join them to the near ones in one softmax. Where that would save little, and for keys that do
not lie in order, SDPA with a mask.

Legend: B batch, N tiles or classes, R tiles of queries, C tiles of keys, n of them active in a row, H heads,
K key/value heads, T queries, S keys, D head width; t positions of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.blocked import WORTH, beyond, near_attention, tiled_reasons
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.backends.union import Arrangement, Part, softmax_over_both
from glowflow.core.attention.layouts import BlockLayout, block_layout
from glowflow.core.attention.masks import Visibility, visible
from glowflow.core.attention.spec import AttentionSpec, SparsePattern
from glowflow.core.attention.tiles import Residues, near_tiling, tile_bias

__all__ = ["GatherBackend"]

_MASKED = SdpaBackend()
_BY_RESIDUE = ("strided", "fixed")
_LEAST_TILE = 64
"""Positions below which a gathered tile costs more in copies than it saves."""


class GatherBackend:
    """Sparse patterns on long sequences.

    Args:
        block: queries in a tile of near keys, and least positions in a gathered tile; None: by the pattern.
        worth: gather where a query meets at most this share of all keys (of all tiles with ``blocks``).
    """

    name = "gather"

    def __init__(self, block: int | None = None, worth: float = WORTH) -> None:
        self.block, self.worth = block, worth

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = tiled_reasons(spec, conditions, "sparse")
        if spec.sparse is not None and spec.sparse.pattern in _BY_RESIDUE:
            if conditions.device_type != "cpu":
                reasons.append(f"computes pattern {spec.sparse.pattern} on the CPU alone")
            if spec.dropout and conditions.training:
                reasons.append(f"has no dropout on attention weights for pattern {spec.sparse.pattern}")
        return reasons

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return f"torch SDPA on gathered keys; with a mask over all pairs {beyond(self.worth)}"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        assert spec.sparse is not None
        dropout = spec.dropout if training else 0.0
        gather = {"blocks": self._tiles, "local_global": self._near_and_first}
        gathered = None
        if visibility.in_order:
            gathered = gather.get(spec.sparse.pattern, self._near_and_far)(q, k, v, spec, visibility, dropout)
        return _MASKED.run(q, k, v, spec, visibility, training) if gathered is None else gathered

    def _near_and_first(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, dropout: float
    ) -> Tensor | None:
        """``local_global``: a window with sinks; bidirectional the first queries see every key."""
        assert spec.sparse is not None
        num_queries, num_keys = q.shape[2], k.shape[2]
        tiling = near_tiling(spec, min(spec.sparse.local, num_keys), num_queries, num_keys, self.block)
        first = min(spec.sparse.global_tokens, num_keys)
        if first + tiling.span > self.worth * num_keys:
            return None
        y_bhtd = near_attention(q, k, v, spec, visibility, tiling, first, dropout)
        wide = first - (num_keys - num_queries)
        if spec.causal or wide <= 0:
            return y_bhtd
        positions = visibility.queries()[None, :wide], visibility.keys()[None]
        bias = tile_bias("first", spec, visibility, positions, q.shape[0], q.dtype)
        return torch.cat((_attend(q[:, :, :wide], k, v, spec, bias, dropout), y_bhtd[:, :, wide:]), dim=2)

    def _near_and_far(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, dropout: float
    ) -> Tensor | None:
        """``strided`` and ``fixed``: the near keys that are not far ones too, and the far ones."""
        assert spec.sparse is not None and not dropout
        stride, num_keys = spec.sparse.stride, k.shape[2]
        near = near_tiling(spec, min(spec.sparse.local, num_keys), q.shape[2], num_keys, self.block)
        if near.span + num_keys // stride > self.worth * num_keys:
            return None
        if stride > num_keys:  # every key of the pattern is a near one
            return near_attention(q, k, v, spec, visibility, near, 0, dropout)
        near_bias = tile_bias(
            ("near", near), spec, visibility, near.positions(q.device), q.shape[0], q.dtype, _near_only
        )
        far = Residues(q.shape[2], num_keys, stride)
        parts = (
            Part(Arrangement(near, near_bias), near.spans(k), near.spans(v)),
            _far_part(far, q, k, v, spec, visibility),
        )
        return softmax_over_both(q, parts, spec.softmax_scale)

    def _tiles(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, dropout: float
    ) -> Tensor | None:
        """``blocks``: rows of tiles with equally many active ones in one call."""
        assert spec.sparse is not None
        size, num_queries, num_keys = spec.sparse.block_size, q.shape[2], k.shape[2]
        tile = size * -(-(self.block or _LEAST_TILE) // size)
        ahead = (num_keys - num_queries) % tile  # fillings, so that tiles of queries are tiles of positions
        layout = block_layout(spec, num_keys - num_queries - ahead, num_queries + ahead, num_keys, tile)
        if layout.density > self.worth:
            return None
        grid = _TileGrid(tile, num_keys - num_queries - ahead, layout)
        q_brhtd, k_bcktd, v_bcktd = _in_tiles(q, tile, ahead), _in_tiles(k, tile, 0), _in_tiles(v, tile, 0)
        outputs, order = [], []
        for row_r, column_rn in grid.buckets(q.device):
            bias = grid.bias(row_r, column_rn, spec, visibility, q.shape[0], q.dtype)
            q_nhtd = q_brhtd.index_select(1, row_r).flatten(0, 1)
            y_nhtd = _attend(q_nhtd, _beside(k_bcktd, column_rn), _beside(v_bcktd, column_rn), spec, bias, dropout)
            outputs.append(y_nhtd.unflatten(0, (q.shape[0], -1)))
            order.append(row_r)
        y_brhtd = torch.cat(outputs, dim=1).index_select(1, torch.cat(order).argsort())
        return y_brhtd.transpose(1, 2).flatten(2, 3)[:, :, ahead : ahead + num_queries]


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: Tensor | None, dropout: float) -> Tensor:
    gqa = spec.heads != spec.kv_heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=spec.scale, enable_gqa=gqa)


def _is_far(sparse: SparsePattern, query: Tensor, key: Tensor) -> Tensor:
    if sparse.pattern == "strided":
        return (query - key) % sparse.stride == 0
    return (key % sparse.stride == sparse.stride - 1).expand_as(query - key)


def _near_only(spec: AttentionSpec, query: Tensor, key: Tensor) -> Tensor:
    assert spec.sparse is not None
    return visible(spec, query, key) & ~_is_far(spec.sparse, query, key)


def _far_only(spec: AttentionSpec, query: Tensor, key: Tensor) -> Tensor:
    assert spec.sparse is not None
    return visible(spec, query, key) & _is_far(spec.sparse, query, key)


def _far_part(far: Residues, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility) -> Part:
    """Each class of queries with its far keys: its own class of ``strided``, with ``fixed`` the ends of all runs."""
    assert spec.sparse is not None
    query_nt, key_ns = far.positions(q.device)
    if spec.sparse.pattern == "strided":
        k_nksd, v_nksd = far.fold_keys(k), far.fold_keys(v)
        if spec.causal and visibility.everywhere and not spec.alibi and far.num_queries == far.num_keys:
            return Part(Arrangement(far, None), k_nksd, v_nksd)
    else:
        ends = slice(far.stride - 1, None, far.stride)
        key_ns = torch.arange(far.num_keys, device=q.device)[ends].expand(far.stride, -1)
        k_nksd, v_nksd = (x[:, :, ends].repeat_interleave(far.stride, dim=0) for x in (k, v))
    bias = tile_bias("far", spec, visibility, (query_nt, key_ns), q.shape[0], q.dtype, _far_only)
    return Part(Arrangement(far, bias), k_nksd, v_nksd)


@dataclass(frozen=True)
class _TileGrid:
    """Tiles of ``blocks``, which begin with position 0 of the keys and ``first`` of the queries."""

    tile: int
    first: int
    layout: BlockLayout

    def buckets(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(R,) rows with equally many active tiles and (R, n) the tiles' columns."""
        active_rc = self.layout.active_rc.clone()
        active_rc[:, 0] |= ~active_rc.any(1)  # a row that sees nothing meets one tile, of which the mask leaves nothing
        count_r = active_rc.sum(1)
        rows = [(count_r == count).nonzero().flatten() for count in count_r.unique().tolist()]
        columns = [active_rc[row_r].nonzero()[:, 1].unflatten(0, (len(row_r), -1)) for row_r in rows]
        return [(r.to(device), c.to(device)) for r, c in zip(rows, columns, strict=True)]

    def bias(
        self,
        row_r: Tensor,
        column_rn: Tensor,
        spec: AttentionSpec,
        visibility: Visibility,
        batch: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The mask of one bucket; None where every key is seen."""
        full = self.layout.full_rc[row_r.cpu()[:, None], column_rn.cpu()]
        if visibility.everywhere and not spec.alibi and bool(full.all()):
            return None
        within = torch.arange(self.tile, device=row_r.device)
        positions = (
            self.first + row_r[:, None] * self.tile + within,
            (column_rn[..., None] * self.tile + within).flatten(1),
        )
        return tile_bias(("tiles", self.tile, column_rn.shape[1]), spec, visibility, positions, batch, dtype)


def _in_tiles(x_bhtd: Tensor, tile: int, ahead: int) -> Tensor:
    """(B, H, T, D) -> (B, R, H, t, D), with fillings before and behind."""
    padded = F.pad(x_bhtd, (0, 0, ahead, -(ahead + x_bhtd.shape[2]) % tile))
    return padded.unflatten(2, (-1, tile)).transpose(1, 2)


def _beside(x_bcktd: Tensor, column_rn: Tensor) -> Tensor:
    """(B, C, K, t, D), (R, n) -> (B R, K, n t, D): the tiles of keys that each row meets."""
    chosen = x_bcktd.index_select(1, column_rn.flatten()).unflatten(1, column_rn.shape)  # (B, R, n, K, t, D)
    return chosen.transpose(2, 3).flatten(3, 4).flatten(0, 1)
