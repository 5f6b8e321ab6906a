"""Long sequences in pieces: queries in tiles, and beside each tile the keys that it may see, folded into the batch.

In: queries, keys and values in order. Out: tensors that one call of a dense kernel computes, and the additive mask of
each tile, made from the one definition in ``masks``. The idea: a pattern whose rows are short becomes many small dense
problems, so that cost and memory grow with the rows' length and no longer with the square of the sequence.

Legend: B batch, N tiles (or groups of another layout), H heads, T queries, S keys, D head width; t queries and
s keys of one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.masks import Visibility, alibi_slopes, visible
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["Residues", "Rule", "Tiling", "near_tiling", "tile_bias"]

Rule = Callable[[AttentionSpec, Tensor, Tensor], Tensor]
"""Whether queries see keys at the given positions; ``masks.visible`` and parts of it."""


class Folding(Protocol):
    """An arrangement of the queries: what ``fold`` does to (B, H, T, D), ``unfold`` takes back."""

    def fold(self, x_bhtd: Tensor) -> Tensor: ...

    def unfold(self, x_nhtd: Tensor, batch: int) -> Tensor: ...


@dataclass(frozen=True)
class Tiling:
    """Consecutive queries in tiles of ``block``; each sees the keys from ``before`` its first to ``after`` its last.

    Args:
        num_queries, num_keys: T and S; the queries are the last T positions.
        block: queries in a tile.
        before, after: multiples of ``block``.
    """

    num_queries: int
    num_keys: int
    block: int
    before: int
    after: int

    @property
    def count(self) -> int:
        """N, the last tile filled up."""
        return -(-self.num_queries // self.block)

    @property
    def span(self) -> int:
        """Keys beside one tile."""
        return self.before + self.block + self.after

    @property
    def first(self) -> int:
        """Position of the first key of the first tile; negative where there is none."""
        return self.num_keys - self.num_queries - self.before

    def fold(self, x_bhtd: Tensor) -> Tensor:
        """(B, H, T, D) -> (B N, H, t, D), zeros behind the last query."""
        padded = F.pad(x_bhtd, (0, 0, 0, self.count * self.block - self.num_queries))
        return padded.unflatten(2, (self.count, self.block)).transpose(1, 2).flatten(0, 1)

    def unfold(self, x_nhtd: Tensor, batch: int) -> Tensor:
        """(B N, H, t, D) -> (B, H, T, D)."""
        return x_nhtd.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, : self.num_queries]

    def spans(self, x_bksd: Tensor) -> Tensor:
        """(B, K, S, D) -> (B N, K, s, D), zeros where there is no key."""
        spans: Tensor = _Spans.apply(x_bksd, self)
        return spans

    def pads(self) -> tuple[int, int, int, int]:
        """What ``F.pad`` puts around (S, D) to get the keys of all tiles; negative: cut off."""
        end = self.first + (self.count - 1) * self.block + self.span
        return 0, 0, -self.first, end - self.num_keys

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N, t) positions of queries and (N, s) of keys; those outside 0 .. S-1 are fillings."""
        starts = torch.arange(self.count, device=device)[:, None] * self.block + self.first
        query_nt = starts + self.before + torch.arange(self.block, device=device)
        return query_nt, starts + torch.arange(self.span, device=device)


def near_tiling(spec: AttentionSpec, reach: int, num_queries: int, num_keys: int, block: int | None) -> Tiling:
    """The tiling for queries that see the last ``reach`` keys, their own among them, and bidirectional the next.

    Args:
        block: queries in a tile. None: half the reach as a power of two between 32 and 128, measured to be fastest on
            CPUs: larger tiles see more keys in vain, smaller ones read each key more often.
    """
    if block is None:
        block = min(128, max(32, (1 << (reach - 1).bit_length()) // 2))
    before = -(-(reach - 1) // block) * block
    return Tiling(num_queries, num_keys, block, before, 0 if spec.causal else before)


class _Spans(torch.autograd.Function):
    """Overlapping spans of keys as a view; torch's own gradient of ``unfold`` is slow and of slices needs a copy."""

    @staticmethod
    def forward(ctx: Any, x_bksd: Tensor, tiling: Tiling) -> Tensor:
        ctx.tiling, ctx.batch = tiling, x_bksd.shape[0]
        padded = F.pad(x_bksd, tiling.pads())
        return padded.unfold(2, tiling.span, tiling.block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        tiling: Tiling = ctx.tiling
        parts, count = tiling.span // tiling.block, tiling.count
        grad = grads[0].unflatten(0, (ctx.batch, count)).unflatten(3, (parts, tiling.block))  # (B, N, K, parts, t, D)
        total = grad.new_zeros(ctx.batch, grad.shape[2], count + parts - 1, tiling.block, grad.shape[-1])
        for part in range(parts):
            total[:, :, part : part + count] += grad[:, :, :, part].transpose(1, 2)
        return F.pad(total.flatten(2, 3), [-pad for pad in tiling.pads()]), None


@dataclass(frozen=True)
class Residues:
    """Positions in classes of equal position modulo ``stride``: N = stride classes, each in order.

    Args:
        num_queries, num_keys: T and S; the queries are the last T positions.
    """

    num_queries: int
    num_keys: int
    stride: int

    @property
    def _ahead(self) -> int:
        """Fillings before the first query, so that it lands in its class."""
        return (self.num_keys - self.num_queries) % self.stride

    def fold(self, x_bhtd: Tensor) -> Tensor:
        """(B, H, T, D) of the queries -> (B N, H, t, D)."""
        return self._classes(x_bhtd, self._ahead)

    def fold_keys(self, x_bksd: Tensor) -> Tensor:
        """(B, K, S, D) -> (B N, K, s, D)."""
        return self._classes(x_bksd, 0)

    def unfold(self, x_nhtd: Tensor, batch: int) -> Tensor:
        """(B N, H, t, D) -> (B, H, T, D)."""
        x_bhatd = x_nhtd.unflatten(0, (batch, self.stride)).permute(0, 2, 3, 1, 4)
        return x_bhatd.flatten(2, 3)[:, :, self._ahead : self._ahead + self.num_queries]

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N, t) positions of queries and (N, s) of keys."""
        residue = torch.arange(self.stride, device=device)[:, None]
        first = (self.num_keys - self.num_queries) // self.stride
        last = -(-self.num_keys // self.stride)
        query = torch.arange(first, last, device=device) * self.stride
        return query + residue, torch.arange(last, device=device) * self.stride + residue

    def _classes(self, x_bhtd: Tensor, ahead: int) -> Tensor:
        behind = -(ahead + x_bhtd.shape[2]) % self.stride
        padded = F.pad(x_bhtd, (0, 0, ahead, behind))
        return padded.unflatten(2, (-1, self.stride)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def tile_bias(
    part: Hashable,
    spec: AttentionSpec,
    visibility: Visibility,
    positions: tuple[Tensor, Tensor],
    batch: int,
    dtype: torch.dtype,
    rule: Rule = visible,
) -> Tensor:
    """What is added to the scores of each tile: 0 or ALiBi's slope where a key is seen, -inf elsewhere.

    Args:
        part: names the arrangement; under it the bias is kept for all layers of the pass.
        visibility: documents and padding of the pass, whose keys lie in order.
        positions: (N, t) of queries and (N, s) of keys; keys outside 0 .. S-1 are fillings, which nobody sees.
        batch: B.

    Returns:
        (B N, 1, t, s), and (B N, H, t, s) with ALiBi.
    """

    def make() -> Tensor:
        seen_n1ts = _seen(spec, visibility, positions, batch, rule)
        bias = torch.zeros((), dtype=dtype, device=seen_n1ts.device)
        if spec.alibi:
            distance_n1ts = (positions[0][:, None, :, None] - positions[1][:, None, None, :]).abs().to(dtype)
            slopes_h11 = alibi_slopes(spec.heads, bias.device, dtype)[:, None, None]
            bias = -(slopes_h11 * distance_n1ts).repeat(batch, 1, 1, 1)
        return torch.where(seen_n1ts, bias, float("-inf"))

    return visibility.kept((part, spec, batch, dtype), make)


def _seen(
    spec: AttentionSpec, visibility: Visibility, positions: tuple[Tensor, Tensor], batch: int, rule: Rule
) -> Tensor:
    """(B N, 1, t, s) bool: the rule, documents and padding."""
    query_nt1, key_n1s = positions[0][:, :, None], positions[1][:, None, :]
    there = (key_n1s >= 0) & (key_n1s < visibility.num_keys)
    seen_bnts = (rule(spec, query_nt1, key_n1s) & there).expand(batch, -1, -1, -1)
    query_at, key_at = (x.clamp(0, visibility.num_keys - 1) for x in positions)
    if visibility.documents is not None:
        documents = visibility.documents
        seen_bnts = seen_bnts & (documents[:, query_at][..., None] == documents[:, key_at][:, :, None, :])
    if visibility.key_valid is not None:
        seen_bnts = seen_bnts & visibility.key_valid[:, key_at][:, :, None, :]
    return seen_bnts.flatten(0, 1)[:, None]
