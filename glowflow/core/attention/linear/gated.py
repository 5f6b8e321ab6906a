"""A window and linear attention side by side, mixed per head and position by a learned gate.

Both read the same queries, keys and values, as in Infini-attention (arXiv:2404.07143), whose gate is one number per
head; here it is sigmoid(w_h . x + b_h), and starts at one half:

    y_h = g_h * window_h(x) + (1 - g_h) * linear_h(x)

Legend: B batch, T positions, D width, H heads, K key/value heads, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.core.architectures.base import InitSpec
from glowflow.core.attention.cache import FullKV, RingKV, StateCache
from glowflow.core.attention.heads import attend, new_kv_cache, split_heads
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.linear.layer import LinearOptions, Recurrence
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["GatedAttention", "GatedCache"]


@dataclass
class GatedCache:
    """What both branches remember: of constant size together."""

    window: FullKV | RingKV
    linear: StateCache

    def nbytes(self) -> int:
        return self.window.nbytes() + self.linear.nbytes()

    def select(self, rows: Tensor) -> None:
        self.window.select(rows)
        self.linear.select(rows)

    def save(self) -> tuple[Any, Any]:
        return self.window.save(), self.linear.save()

    def restore(self, saved: tuple[Any, Any]) -> None:
        self.window.restore(saved[0])
        self.linear.restore(saved[1])

    def cut(self, length: int) -> bool:
        return False  # a state holds all positions in one


class GatedAttention(nn.Module):
    """Learned mixture of a window and linear attention; ``qkv.weight`` is laid out as in ``SelfAttention``.

    Args:
        dim: width D.
        window_spec: what the window computes, of kind ``windowed``.
        linear_spec: what the other branch computes, of kind ``linear``.
        layer: which part of the cache is this layer's.
        options: convolution, norms and gate of the linear branch; ``qk_norm`` and ``norm_eps`` hold for both.
        rotary: turn the window's queries and keys by the context's tables.
    """

    def __init__(
        self,
        dim: int,
        window_spec: AttentionSpec,
        linear_spec: AttentionSpec,
        layer: int,
        options: LinearOptions | None = None,
        *,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        options = options or LinearOptions()
        self.window_spec, self.layer, self.rotary = window_spec, layer, rotary
        heads, width = window_spec.heads, window_spec.head_dim
        self.qkv = StackedLinear(dim, window_spec.qkv_rows, bias=False)
        self.q_norm = RMSNorm(width, options.norm_eps) if options.qk_norm else None
        self.k_norm = RMSNorm(width, options.norm_eps) if options.qk_norm else None
        self.recurrence = Recurrence(dim, linear_spec, options)
        self.mix = nn.Linear(dim, heads)
        self.out = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = self.out(self.between(self.qkv(x_btd), x_btd, context))
        return output

    def between(self, qkv_btn: Tensor, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """What is between the two projections, (B, T, N), (B, T, D) -> (B, T, H*W)."""
        state = ring = None
        if context.cache is not None:
            memory = context.cache.layers[self.layer]
            assert isinstance(memory, GatedCache)
            state, ring = memory.linear, memory.window
        linear_bthw = self.recurrence(qkv_btn, x_btd, context, state)
        window_bthw = self._window(qkv_btn, context, ring)
        gate_bth1 = torch.sigmoid(self.mix(x_btd)).unsqueeze(-1)
        y_bthw = torch.lerp(linear_bthw, window_bthw.to(linear_bthw.dtype), gate_bth1.to(linear_bthw.dtype))
        return y_bthw.flatten(2)

    def _window(self, qkv_btn: Tensor, context: AttentionContext, memory: FullKV | RingKV | None) -> Tensor:
        tables = context.tables if self.rotary else None
        q, k, v = split_heads(qkv_btn, self.window_spec, tables, self.q_norm, self.k_norm)
        return attend(q, k, v, self.window_spec, context, memory, self.training).transpose(1, 2)

    def new_cache(self, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> GatedCache:
        """This layer's empty memory: the window's ring and the linear state."""
        return GatedCache(new_kv_cache(self.window_spec, batch_size, max_length, device, dtype), StateCache())

    def init_spec(self, name: str) -> InitSpec | None:
        """How a parameter of this module starts; None: as any other of its sort."""
        prefix, _, rest = name.partition(".")
        if prefix == "recurrence":
            return self.recurrence.init_spec(rest)
        return InitSpec("zeros") if prefix == "mix" else None
