"""The decoder-only transformer: embed, N x (attend, feed forward), norm, score.

By default pre-norm blocks with RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), SwiGLU
(arXiv:2002.05202) and grouped-query attention (arXiv:2305.13245); no biases. With LayerNorm, biases, ``gelu_tanh`` and
learned positions it is GPT-2. Every matrix starts as N(0, init_std), the two projections that write into the residual
stream as N(0, init_std / sqrt(2 * depth)) (GPT-2), every norm as ones, every bias as zeros.

Legend: B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig, TransformerConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import Carry
from glowflow.core.architectures.decoder import Decoder
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.build import build_attention
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.differentiation import is_twice_differentiable
from glowflow.core.layers.rotary import Rotary, RotaryTables

__all__ = ["Transformer"]


class Transformer(Decoder):
    """Decoder-only transformer, registered as ``transformer``."""

    config_class: ClassVar[type[ArchitectureConfig]] = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, (build_attention(config, layer) for layer in range(config.depth)))
        heads = config.heads + config.num_kv_heads
        turns = config.position == "rope"
        self.rotary = Rotary(config.head_dim, config.rope_theta, heads, config.rope_scaling) if turns else None
        rows = config.longest_context
        self.position_embedding = None if rows is None else nn.Embedding(rows, config.dim)

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        documents = None if batch.single_document else batch.document_ids
        context = self._context(batch.tokens, documents=documents)
        hidden, balances = self._hidden(batch.tokens, context, batch.positions)
        return self.output(hidden, batch, balances, compute_loss), carry

    def _hidden(
        self, tokens_bt: Tensor, context: AttentionContext, positions_bt: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The normed output of the last block, and the balance losses of all blocks."""
        x_btd, balances = self.embed(tokens_bt, self._places(tokens_bt, context.cache, positions_bt)), []
        for block in self.blocks:
            x_btd, balance_b = block(x_btd, context)
            balances.append(balance_b)
        return self.norm(x_btd), balances

    def _context(
        self, tokens_bt: Tensor, *, documents: Tensor | None = None, cache: DecodeCache | None = None
    ) -> AttentionContext:
        """Rotary tables, masks and kernels of one pass."""
        device, dtype = tokens_bt.device, self.embedding.weight.dtype
        start, length = cache.length if cache else 0, tokens_bt.shape[1]
        tables = self._tables(start, start + length, device, dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        conditions = Conditions.here(
            device,
            dtype,
            training=torch.is_grad_enabled(),
            documents=documents is not None,
            decoding=cache is not None and not (start == 0 and length > 1),  # a prompt is an ordinary pass
            second_order=is_twice_differentiable(),
        )
        visibility, backend = Visibility(length, length, device, documents=documents), self.config.attention.backend
        whole = cache.max_length if cache else length
        context = AttentionContext(visibility, conditions, backend, tables, cache, whole)
        for spec in self._softmax_specs(whole):
            context.kernel(spec)  # chosen here, because choosing logs, which a compiled block cannot
        return context

    def _places(self, tokens_bt: Tensor, cache: DecodeCache | None, positions_bt: Tensor | None) -> Tensor | None:
        """Learned vectors of the positions, (B or 1, T, D): counted in each document, or on from the cache's end.

        Raises:
            ConfigError: the sequence is longer than the table.
        """
        if self.position_embedding is None:
            return None
        start, rows = cache.length if cache else 0, self.position_embedding.num_embeddings
        stop = start + tokens_bt.shape[1]
        if stop > rows:
            hint = "take a shorter context"
            raise ConfigError(Problem("data.context", f"must be at most model.max_positions ({rows})", stop, hint))
        places_1t = torch.arange(start, stop, device=tokens_bt.device).unsqueeze(0)
        if positions_bt is not None:
            # A document that began before this sequence starts anew here: what is before it cannot be seen either.
            places_1t = torch.minimum(positions_bt, places_1t)
        vectors: Tensor = self.position_embedding(places_1t)
        return vectors

    def num_embedding_parameters(self) -> int:
        places = 0 if self.position_embedding is None else self.position_embedding.weight.numel()
        return super().num_embedding_parameters() + places

    def _softmax_specs(self, length: int) -> list[AttentionSpec]:
        specs = [spec for layer in range(self.config.depth) for spec in self.attention_specs(layer, length)]
        return [spec for spec in dict.fromkeys(specs) if spec.kind != "linear"]

    def _tables(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> RotaryTables | None:
        """Angles of a run of positions; None where positions are not rotary.

        Scores depend on distances only, so that positions may run on across the documents of a row.
        """
        if self.rotary is None:
            return None
        tables = self.rotary.tables(stop, device, dtype)
        return tables.slice(start, stop) if start else tables

    def decode(self, tokens: Tensor, cache: DecodeCache, *, last_only: bool = False) -> Tensor:
        cache.require(tokens.shape[1])
        hidden, _ = self._hidden(tokens, self._context(tokens, cache=cache))
        cache.advance(tokens.shape[1])
        return self.logits(hidden[:, -1:] if last_only else hidden)
