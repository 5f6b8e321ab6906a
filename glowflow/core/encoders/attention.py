"""Attention between any queries and keys, with a mask: what encoders and fusions are made of.

Self-attention of text, with its kinds, kernels and caches, is ``glowflow.core.attention``.

Legend: N items (or rows of a batch), Q queries, S keys, D width, H heads, W head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.differentiation import is_twice_differentiable
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["CrossAttention", "attend"]


def attend(q_nhqw: Tensor, k_nhsw: Tensor, v_nhsw: Tensor, seen_n1qs: Tensor | None) -> Tensor:
    """Softmax attention, (N, H, Q, W); every query must see at least one key.

    Args:
        seen_n1qs: (N, 1, Q or 1, S) bool; None: every key.
    """
    if torch.compiler.is_compiling() or not is_twice_differentiable():
        return F.scaled_dot_product_attention(q_nhqw, k_nhsw, v_nhsw, attn_mask=seen_n1qs)
    scores_nhqs = q_nhqw @ k_nhsw.mT * q_nhqw.shape[-1] ** -0.5
    if seen_n1qs is not None:
        scores_nhqs = scores_nhqs.masked_fill(~seen_n1qs, float("-inf"))
    return scores_nhqs.softmax(-1) @ v_nhsw


class CrossAttention(nn.Module):
    """``out(softmax(q k^T) v)`` with queries of one sequence and keys and values of another (or the same).

    Args:
        dim: width D of queries and outputs.
        heads: H.
        source_dim: width of what keys and values are made from; None: D.
        bias: whether the projections have one.
    """

    def __init__(self, dim: int, heads: int, source_dim: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = StackedLinear(source_dim or dim, (dim, dim), bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_nqd: Tensor, source_nsd: Tensor, seen_n1qs: Tensor | None = None) -> Tensor:
        """(N, Q, D), (N, S, source_dim) -> (N, Q, D)."""
        return self.read(x_nqd, *self.keys_and_values(source_nsd), seen_n1qs)

    def keys_and_values(self, source_nsd: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, S, W) each; while decoding they are made once."""
        k_nsd, v_nsd = self.kv(source_nsd).chunk(2, dim=-1)
        return self._by_head(k_nsd), self._by_head(v_nsd)

    def read(self, x_nqd: Tensor, k_nhsw: Tensor, v_nhsw: Tensor, seen_n1qs: Tensor | None = None) -> Tensor:
        """Attend to given keys and values."""
        y_nhqw = attend(self._by_head(self.q(x_nqd)), k_nhsw, v_nhsw, seen_n1qs)
        output: Tensor = self.out(y_nhqw.transpose(1, 2).flatten(2))
        return output

    def _by_head(self, x_nsd: Tensor) -> Tensor:
        return x_nsd.unflatten(-1, (self.heads, -1)).transpose(1, 2)
