"""The blocks of the encoders: a bidirectional transformer, and the Perceiver's layers that read into few tokens.

Legend: N items, S tokens, D width, R latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.encoders.attention import CrossAttention
from glowflow.core.layers.feed_forward import build_feed_forward
from glowflow.core.layers.norm import LayerNorm

__all__ = ["EncoderBlock", "Resampler", "ResamplerLayer"]

_EPS = 1e-6
_WIDENING = 4


class EncoderBlock(nn.Module):
    """Pre-norm and bidirectional, as in arXiv:2010.11929: x + attn(norm(x)), then x + ffn(norm(x)), with GELU.

    Args:
        dim: width D.
        heads: attention heads.
        dropout: on both residual branches.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = LayerNorm(dim, _EPS)
        self.attention = CrossAttention(dim, heads)
        self.feed_forward_norm = LayerNorm(dim, _EPS)
        self.feed_forward = build_feed_forward(dim, _WIDENING * dim, "gelu", bias=True)

    def forward(self, x_nsd: Tensor, valid_ns: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D); nobody sees the tokens that are not ``valid_ns``. Each item has a valid one."""
        y_nsd = self.attention_norm(x_nsd)
        x_nsd = x_nsd + self._drop(self.attention(y_nsd, y_nsd, valid_ns[:, None, None, :]))
        return x_nsd + self._drop(self.feed_forward(self.feed_forward_norm(x_nsd)))

    def _drop(self, x_nsd: Tensor) -> Tensor:
        return F.dropout(x_nsd, self.dropout, self.training) if self.dropout else x_nsd


class ResamplerLayer(nn.Module):
    """z + Attn(q=z, kv=[v; z]), then z + FFW(z), each with its norms (arXiv:2204.14198, section 2.1)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.media_norm = LayerNorm(dim, _EPS)
        self.latent_norm = LayerNorm(dim, _EPS)
        self.attention = CrossAttention(dim, heads)
        self.feed_forward_norm = LayerNorm(dim, _EPS)
        self.feed_forward = build_feed_forward(dim, _WIDENING * dim, "gelu", bias=True)

    def forward(self, z_nrd: Tensor, v_nsd: Tensor, valid_ns: Tensor) -> Tensor:
        """(N, R, D) latents and (N, S, D) tokens -> (N, R, D)."""
        q_nrd = self.latent_norm(z_nrd)
        source_nsd = torch.cat((self.media_norm(v_nsd), q_nrd), dim=1)
        seen_ns = torch.cat((valid_ns, valid_ns.new_ones(q_nrd.shape[:2])), dim=1)
        z_nrd = z_nrd + self.attention(q_nrd, source_nsd, seen_ns[:, None, None, :])
        output: Tensor = z_nrd + self.feed_forward(self.feed_forward_norm(z_nrd))
        return output


class Resampler(nn.Module):
    """Perceiver resampler: any number of tokens in, ``tokens`` out (arXiv:2103.03206, arXiv:2204.14198).

    Args:
        dim: width D.
        tokens: R.
        depth: layers.
        heads: attention heads of each.
    """

    def __init__(self, dim: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(tokens, dim))
        self.layers = nn.ModuleList(ResamplerLayer(dim, heads) for _ in range(depth))
        self.norm = LayerNorm(dim, _EPS)

    def forward(self, v_nsd: Tensor, valid_ns: Tensor) -> Tensor:
        """(N, S, D), (N, S) -> (N, R, D)."""
        z_nrd = self.latents.to(v_nsd.dtype).expand(v_nsd.shape[0], -1, -1)
        for layer in self.layers:
            z_nrd = layer(z_nrd, v_nsd, valid_ns)
        output: Tensor = self.norm(z_nrd)
        return output
