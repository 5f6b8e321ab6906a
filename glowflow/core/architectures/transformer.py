"""The decoder-only transformer: embed, N x (attend, feed forward), norm, score.

Pre-norm blocks with RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), SwiGLU (arXiv:2002.05202) and
grouped-query attention (arXiv:2305.13245); no biases. Every matrix starts as N(0, init_std), the two projections that
write into the residual stream as N(0, init_std / sqrt(2 * depth)) (GPT-2), every norm as ones.

Legend: B batch, T positions, S keys, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import ArchitectureConfig, TransformerConfig
from glowflow.core.architectures.base import BaseArchitecture, Carry, InitSpec
from glowflow.core.attention.backends import causal_mask
from glowflow.core.attention.cache import KVCache
from glowflow.core.attention.dispatch import resolve
from glowflow.core.attention.layer import AttentionContext, SelfAttention
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.layers.head import OutputHead
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.rotary import Rotary
from glowflow.core.layers.swiglu import SwiGLU

__all__ = ["Transformer", "TransformerBlock", "attention_spec"]


def attention_spec(config: TransformerConfig) -> AttentionSpec:
    """What the attention of every block computes."""
    return AttentionSpec(
        kind=config.attention.kind, heads=config.heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(
            config.dim, attention_spec(config), layer, config.norm_eps if config.qk_norm else None
        )
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x_btd: Tensor, context: AttentionContext) -> Tensor:
        x_btd = x_btd + self._drop(self.attention(self.attention_norm(x_btd), context))
        return x_btd + self._drop(self.feed_forward(self.feed_forward_norm(x_btd)))

    def _drop(self, x_btd: Tensor) -> Tensor:
        return F.dropout(x_btd, self.dropout, self.training) if self.dropout else x_btd


class Transformer(BaseArchitecture):
    """Decoder-only transformer, registered as ``transformer``."""

    config_class: ClassVar[type[ArchitectureConfig]] = TransformerConfig
    config: TransformerConfig
    head: OutputHead

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(self.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = OutputHead(config.dim, self.vocab_size, self.embedding if config.tie_embeddings else None)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.heads + config.num_kv_heads)

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        mask = None if batch.single_document else document_mask(batch.document_ids)
        hidden = self._hidden(batch.tokens, self._context(batch.tokens, mask=mask))
        if not compute_loss:
            return ModelOutput(hidden), carry
        loss_sum, weight_sum = self.head.loss(hidden, batch.targets, batch.loss_weights)
        return ModelOutput(hidden, loss_sum, weight_sum), carry

    def _hidden(self, tokens_bt: Tensor, context: AttentionContext) -> Tensor:
        x_btd = self.embedding(tokens_bt)
        if self.config.dropout:
            x_btd = F.dropout(x_btd, self.config.dropout, self.training)
        for block in self.blocks:
            x_btd = block(x_btd, context)
        hidden: Tensor = self.norm(x_btd)
        return hidden

    def _context(
        self, tokens_bt: Tensor, *, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> AttentionContext:
        """Rotary tables, kernel and mask of one pass.

        Rotary scores depend on distances only, so that positions may run on across the documents of a row.
        """
        device, dtype = tokens_bt.device, self.embedding.weight.dtype
        start, length = cache.length if cache else 0, tokens_bt.shape[1]
        tables = self.rotary.tables(start + length, device, dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        backend, _ = resolve(attention_spec(self.config), self.config.attention.backend, device.type, dtype)
        return AttentionContext(tables.slice(start, start + length) if start else tables, backend, mask, cache)

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def init_spec(self, name: str) -> InitSpec:
        if "norm" in name:
            return InitSpec("ones")
        writes_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        depth_factor = 1 / math.sqrt(2 * self.config.depth) if writes_residual else 1.0
        return InitSpec("normal", self.config.init_std * depth_factor)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> KVCache:
        c = self.config
        return KVCache.empty(c.depth, batch_size, c.num_kv_heads, max_length, c.head_dim, device, dtype)

    def decode(self, tokens: Tensor, cache: KVCache, *, last_only: bool = False) -> Tensor:
        cache.require(tokens.shape[1])
        hidden = self._hidden(tokens, self._context(tokens, cache=cache))
        cache.advance(tokens.shape[1])
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def num_embedding_parameters(self) -> int:
        return 0 if self.config.tie_embeddings else self.embedding.weight.numel()

    def flops_per_token(self, context: int) -> float:
        """6 N + 12 L H Q T (PaLM, appendix B): N without the look-up but with the output matrix; no causal halving."""
        c = self.config
        multiplied = self.num_parameters() - self.num_embedding_parameters()
        return 6.0 * multiplied + 12.0 * c.depth * c.heads * c.head_dim * context


def document_mask(document_ids_bt: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T) bool: a position sees itself and what is earlier in its own document."""
    length = document_ids_bt.shape[1]
    same_document = document_ids_bt[:, None, :, None] == document_ids_bt[:, None, None, :]
    return same_document & causal_mask(length, length, document_ids_bt.device)
