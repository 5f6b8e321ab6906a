"""Causal self-attention with rotary positions: project, turn, attend, project back.

Legend: B batch, T positions, D width, H heads, K key/value heads, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from glowflow.core.attention.backends import Backend
from glowflow.core.attention.cache import KVCache
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.rotary import RotaryTables, rotate, split_rotate

__all__ = ["AttentionContext", "SelfAttention"]


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share.

    Not a tensor and no pytree: mixed-precision wrappers leave the tables in it alone.
    """

    tables: RotaryTables
    backend: Backend
    mask_b1ts: Tensor | None = None  # bool; None: plain causal
    cache: KVCache | None = None


class SelfAttention(nn.Module):
    """Self-attention; ``qkv.weight`` holds the rows of all queries, then keys, then values."""

    def __init__(self, dim: int, spec: AttentionSpec, layer: int, qk_norm_eps: float | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.qkv = nn.Linear(dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, bias=False)
        self.out = nn.Linear(spec.heads * spec.head_dim, dim, bias=False)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)

    def forward(self, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q_bhtw, k_bktw, v_bktw = self._project(x_btd, context.tables)
        if context.cache is not None:
            k_bktw, v_bktw = context.cache.update(self.layer, k_bktw, v_bktw)
        y_bhtw = context.backend.run(q_bhtw, k_bktw, v_bktw, self.spec, context.mask_b1ts, self.training)
        output: Tensor = self.out(y_bhtw.transpose(1, 2).flatten(2))
        return output

    def _project(self, x_btd: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        qkv = self.qkv(x_btd)
        if self.q_norm is None or self.k_norm is None:
            return split_rotate(qkv, heads, kv_heads, tables)
        parts = qkv.view(*qkv.shape[:-1], heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=2)
        q_bthw, k_btkw = rotate(self.q_norm(parts[0]), tables), rotate(self.k_norm(parts[1]), tables)
        v_btkw = parts[2]
        q_bthw, k_btkw = q_bthw.to(v_btkw.dtype), k_btkw.to(v_btkw.dtype)
        return q_bthw.transpose(1, 2), k_btkw.transpose(1, 2), v_btkw.transpose(1, 2)
