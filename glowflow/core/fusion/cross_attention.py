"""``cross_attention``: gated cross-attention between the blocks of the text decoder (Flamingo, arXiv:2204.14198).

Before every n-th block, with media v and gates a_x = a_d = 0 at the start:

    y = y + tanh(a_x) * Attn(q=norm(y), kv=norm(v))
    y = y + tanh(a_d) * FFW(norm(y))

so that the model starts as the text decoder it is built around, bit for bit. A position of text sees the media of its
own row that stand at it or before it: all of them, or only the latest of each modality. Where none does, it sees the
modality's vector of a missing medium. Text-only positions are as they would be without media; each kind of attention
works in the blocks.

Legend: B rows, T positions, L tokens of media in a row, D width, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.architectures.base import InitSpec
from glowflow.core.batch import Batch
from glowflow.core.encoders.attention import CrossAttention
from glowflow.core.fusion.base import Fused, Fusion, MediaCache, Trunk
from glowflow.core.fusion.media import Media, MediaRows, joined
from glowflow.core.layers.feed_forward import build_feed_forward
from glowflow.core.layers.norm import build_norm

__all__ = ["GatedCrossAttention", "GatedLayer"]


class GatedLayer(nn.Module):
    """One gated cross-attention with its feed-forward; see the module."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        dim, bias = config.dim, config.bias is True
        self.dropout = config.dropout
        self.norm, self.media_norm, self.feed_forward_norm = (
            build_norm(config.norm, dim, config.norm_eps, bias) for _ in range(3)
        )
        self.attention = CrossAttention(dim, config.heads, bias=bias)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = build_feed_forward(dim, config.hidden_dim, config.ffn, bias)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, y_btd: Tensor, media_bld: Tensor, seen_b1tl: Tensor) -> Tensor:
        """(B, T, D), (B, L, D), (B, 1, T, L) bool -> (B, T, D)."""
        return self.read(y_btd, *self.keys_and_values(media_bld), seen_b1tl)

    def keys_and_values(self, media_bld: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, L, W) each; while decoding they are made once."""
        return self.attention.keys_and_values(self.media_norm(media_bld))

    def read(self, y_btd: Tensor, k_bhlw: Tensor, v_bhlw: Tensor, seen_b1tl: Tensor) -> Tensor:
        """Read from given keys and values."""
        read_btd = self.attention.read(self.norm(y_btd), k_bhlw, v_bhlw, seen_b1tl)
        y_btd = y_btd + self._gated(self.attention_gate, read_btd)
        return y_btd + self._gated(self.feed_forward_gate, self.feed_forward(self.feed_forward_norm(y_btd)))

    def _gated(self, gate: Tensor, x_btd: Tensor) -> Tensor:
        x_btd = torch.tanh(gate).to(x_btd.dtype) * x_btd
        return F.dropout(x_btd, self.dropout, self.training) if self.dropout else x_btd


class GatedCrossAttention(Fusion):
    """See the module."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        every, depth = config.cross_attention.every, config.depth
        self.layers = nn.ModuleDict(
            {str(layer): GatedLayer(config) for layer in range(depth) if (depth - 1 - layer) % every == 0}
        )

    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        y_btd = trunk.dropped(trunk.vectors(batch.tokens))
        rows, context, balances = self._rows(media), trunk.context_of(y_btd, batch), []
        seen_b1tl = rows.seen(0, y_btd.shape[1])
        for index, block in enumerate(trunk.blocks):
            if str(index) in self.layers:
                y_btd = self.layers[str(index)](y_btd, rows.tokens, seen_b1tl)
            y_btd, balance_b = block(y_btd, context)
            balances.append(balance_b)
        return Fused(trunk.norm(y_btd), balances)

    def _rows(self, media: Sequence[Media]) -> MediaRows:
        latest = self.config.cross_attention.attends == "latest"
        return joined([one.rows(latest=latest) for one in media])

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        rows = self._rows(media)
        cache.rows |= {"start": rows.start, "stop": rows.stop}
        for index, layer in self.layers.items():
            assert isinstance(layer, GatedLayer)
            cache.rows[f"keys.{index}"], cache.rows[f"values.{index}"] = layer.keys_and_values(rows.tokens)

    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        y_btd = trunk.dropped(trunk.vectors(tokens_bt))
        kept, context = cache.rows, trunk.context_of(y_btd, None, cache)
        lines = MediaRows(kept["start"], kept["start"], kept["start"], kept["stop"])
        seen_b1tl = lines.seen(cache.length, cache.length + tokens_bt.shape[1])
        for index, block in enumerate(trunk.blocks):
            if str(index) in self.layers:
                layer = self.layers[str(index)]
                assert isinstance(layer, GatedLayer)
                y_btd = layer.read(y_btd, kept[f"keys.{index}"], kept[f"values.{index}"], seen_b1tl)
            y_btd, _ = block(y_btd, context)
        hidden: Tensor = trunk.norm(y_btd)
        return hidden

    def units(self, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        found: list[nn.Module] = []
        for index, block in enumerate(blocks):
            found += [self.layers[str(index)]] if str(index) in self.layers else []
            found.append(block)
        return found

    def parameters_per_token(self) -> int:
        """All but the projections of media to keys and values."""
        layers = [layer for layer in self.layers.values() if isinstance(layer, GatedLayer)]
        total = sum(p.numel() for p in self.parameters())
        return total - sum(p.numel() for layer in layers for p in layer.attention.kv.parameters())

    def init_spec(self, name: str) -> InitSpec:
        return InitSpec("zeros") if name.endswith("_gate") else super().init_spec(name)
