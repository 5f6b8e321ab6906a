"""Who may look at whom: the one definition that all kernels, caches and tests go by.

``visible`` is the rule of a spec for pairs of positions, written with broadcasting comparisons alone, so that it works
on whole grids (the reference), on the tiles of a block-sparse kernel, on FlexAttention's scalar indices, and on a ring
buffer whose keys lie out of order. ``Visibility`` adds what depends on the batch: documents, padding, positions.

Legend: B batch, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from glowflow.core.attention.spec import AttentionSpec, SparsePattern

__all__ = ["Visibility", "alibi_slopes", "causal_mask", "visible"]

T = TypeVar("T")


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(T, S) bool, aligned at the ends: the last query sees every key."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def visible(spec: AttentionSpec, query: Tensor, key: Tensor) -> Tensor:
    """Whether the spec lets a query at one position see a key at another; documents and padding aside.

    Args:
        query, key: int64 positions in the sequence, broadcast against each other.

    Returns:
        bool of the broadcast shape.
    """
    distance = query - key
    allowed = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.kind == "windowed":
        assert spec.window is not None
        near = distance.abs() < spec.window
        allowed = allowed & (near | (key < spec.sinks) if spec.sinks else near)
    elif spec.kind == "sparse":
        assert spec.sparse is not None
        allowed = allowed & _in_pattern(spec.sparse, query, key, spec.causal)
    return allowed


def _in_pattern(sparse: SparsePattern, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    distance = query - key
    if sparse.pattern == "blocks":
        return _in_blocks(sparse, query // sparse.block_size, key // sparse.block_size)
    near = distance.abs() < sparse.local
    if sparse.pattern == "strided":
        return near | (distance % sparse.stride == 0)
    if sparse.pattern == "fixed":
        return near | (key % sparse.stride == sparse.stride - 1)
    far = key < sparse.global_tokens
    return near | far if causal else near | far | (query < sparse.global_tokens)


def _in_blocks(sparse: SparsePattern, row: Tensor, column: Tensor) -> Tensor:
    table = torch.tensor(sparse.blocks, dtype=torch.bool, device=row.device)
    size = table.shape[0]
    beyond = (row - (size - 1)).clamp(min=0)  # later rows are the last one, shifted along the diagonal
    shifted = column - beyond
    inside = (shifted >= 0) & (shifted < size)
    return inside & table[row.clamp(max=size - 1), shifted.clamp(0, size - 1)]


def alibi_slopes(heads: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """(H,) slopes of ALiBi (arXiv:2108.12409): 2^(-8 i / H), and the authors' interleaving where H is no power of 2."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, device=device, dtype=dtype)


@dataclass
class Visibility:
    """What the masks of one forward pass are made of. All layers share one object, which keeps what it has computed.

    Not a tensor and no pytree: mixed-precision wrappers and checkpointing leave it alone.

    Args:
        num_queries, num_keys: T and S. Without ``query_positions`` and ``key_positions`` the queries are the last T
            of S positions that lie in order.
        device: where masks are made.
        query_positions, key_positions: (T,) and (S,) int64 positions in the sequence; needed where keys do not lie in
            order (ring buffers). A negative key position is an empty slot, which nobody sees.
        documents: (B, S) int64 document of each key; a query sees its own document alone. None: one document.
        key_valid: (B, S) bool, False for padding, which nobody sees. None: no padding.
    """

    num_queries: int
    num_keys: int
    device: torch.device
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    documents: Tensor | None = None
    key_valid: Tensor | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def in_order(self) -> bool:
        """Keys are the positions 0 .. S-1 and queries the last T of them."""
        return self.query_positions is None and self.key_positions is None

    @property
    def everywhere(self) -> bool:
        """Nothing but the spec's own rule counts: no documents, no padding, no positions given."""
        return self.in_order and self.documents is None and self.key_valid is None

    def queries(self) -> Tensor:
        """(T,) positions of the queries."""
        if self.query_positions is not None:
            return self.query_positions
        return torch.arange(self.num_keys - self.num_queries, self.num_keys, device=self.device)

    def keys(self) -> Tensor:
        """(S,) positions of the keys."""
        return torch.arange(self.num_keys, device=self.device) if self.key_positions is None else self.key_positions

    def query_documents(self) -> Tensor | None:
        """(B, T) document of each query: the queries are the last T of the keys."""
        return None if self.documents is None else self.documents[:, self.num_keys - self.num_queries :]

    def mask(self, spec: AttentionSpec) -> Tensor:
        """(B or 1, 1, T, S) bool: everything at once, the spec's rule included. Kept per rule."""
        rule = (spec.kind, spec.causal, spec.window, spec.sinks, spec.sparse)
        return self.kept(rule, lambda: self._compute(spec))

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made by the first layer that asks and gone with the pass."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def _compute(self, spec: AttentionSpec) -> Tensor:
        key = self.keys()
        mask = visible(spec, self.queries()[:, None], key[None, :])
        if self.key_positions is not None:
            mask = mask & (key >= 0)
        mask_b1ts = mask[None, None]
        if self.documents is not None:
            queries = self.documents[:, self.num_keys - self.num_queries :]
            mask_b1ts = mask_b1ts & (queries[:, None, :, None] == self.documents[:, None, None, :])
        if self.key_valid is not None:
            mask_b1ts = mask_b1ts & self.key_valid[:, None, None, :]
        return mask_b1ts

    def alibi(self, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
        """(1, H, T, S) what ALiBi adds to the scores; 0 or negative."""

        def make() -> Tensor:
            distance = (self.queries()[:, None] - self.keys()[None, :]).abs().to(dtype)
            return -(alibi_slopes(spec.heads, self.device, dtype)[:, None, None] * distance)[None]

        return self.kept(("alibi", spec.heads, dtype), make)
