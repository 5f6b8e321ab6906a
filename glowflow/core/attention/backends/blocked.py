"""Windows in tiles: torch SDPA on each tile of queries and the few keys beside it, so that cost grows linearly.

In: queries, keys, values of one pass, in order. Out: what SDPA with the window's mask gives. Sinks are further columns
of every tile. Short sequences, where the tiles would cover nearly everything, and keys that do not lie in order
(ring buffers) go to SDPA with a mask.

Legend: B batch, N tiles, H heads, K key/value heads, T queries, S keys, D head width; s keys beside one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.attention.tiles import Tiling, near_tiling, tile_bias

__all__ = ["WORTH", "BlockedBackend", "beyond", "near_attention", "tiled_reasons"]

WORTH = 0.5
"""Largest share of all keys that a query may meet for less work to be faster than one call with a mask."""
_MASKED = SdpaBackend()


def beyond(worth: float) -> str:
    """When SDPA with a mask takes over, in words."""
    return f"where a query would meet over {worth:.0%} of the keys"


def tiled_reasons(spec: AttentionSpec, conditions: Conditions, kind: str) -> list[str]:
    """Why a kernel for long sequences of one kind, which leaves the rest to SDPA with a mask, cannot serve."""
    if spec.kind != kind:
        return common_reasons(spec, conditions, (kind,))
    reasons = _MASKED.reasons(spec, conditions)
    if conditions.decoding:
        reasons.append("serves no decoding, where few queries meet all keys of a cache")
    return reasons


def near_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    visibility: Visibility,
    tiling: Tiling,
    first: int,
    dropout: float,
) -> Tensor:
    """(B, H, T, D): attention to the keys beside each tile of queries and to the first of the sequence.

    Args:
        tiling: must cover everything that the spec shows to a query, but for the first keys.
        first: how many first keys every tile gets too.
        dropout: probability of dropping a weight.
    """
    part = ("near", tiling, first)
    bias_n1ts = tile_bias(part, spec, visibility, _positions(tiling, first, q.device), q.shape[0], q.dtype)
    y_nhtd = F.scaled_dot_product_attention(
        tiling.fold(q),
        _with_first(tiling, k, first),
        _with_first(tiling, v, first),
        attn_mask=bias_n1ts,
        dropout_p=dropout,
        scale=spec.scale,
        enable_gqa=spec.heads != spec.kv_heads,
    )
    return tiling.unfold(y_nhtd, q.shape[0])


def _positions(tiling: Tiling, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys; the first keys are fillings (-1) in tiles that have them in their span."""
    query_nt, key_ns = tiling.positions(device)
    first_nf = torch.arange(first, device=device).expand(tiling.count, first)
    first_nf = torch.where(first_nf < key_ns[:, :1], first_nf, -1)
    return query_nt, torch.cat((first_nf, key_ns), dim=1)


def _with_first(tiling: Tiling, x_bksd: Tensor, first: int) -> Tensor:
    """(B N, K, s, D): the first keys of the sequence before each span."""
    spans_nksd = tiling.spans(x_bksd)
    if not first:
        return spans_nksd
    first_nkfd = x_bksd[:, :, :first].repeat_interleave(tiling.count, dim=0)
    return torch.cat((first_nkfd, spans_nksd), dim=2)


class BlockedBackend:
    """Sliding windows on long sequences.

    Args:
        block: queries in a tile; None: by the window.
        worth: compute in tiles where a query meets at most this share of all keys.
    """

    name = "blocked"

    def __init__(self, block: int | None = None, worth: float = WORTH) -> None:
        self.block, self.worth = block, worth

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return tiled_reasons(spec, conditions, "windowed")

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return f"torch SDPA on tiles of the window; with a mask over all pairs {beyond(self.worth)}"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        assert spec.window is not None
        num_keys = k.shape[2]
        tiling = near_tiling(spec, min(spec.window, num_keys), q.shape[2], num_keys, self.block)
        first = min(spec.sinks, num_keys)
        if not visibility.in_order or first + tiling.span > self.worth * num_keys:
            return _MASKED.run(q, k, v, spec, visibility, training)
        return near_attention(q, k, v, spec, visibility, tiling, first, spec.dropout if training else 0.0)
