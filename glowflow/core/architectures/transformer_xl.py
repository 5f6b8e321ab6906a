"""Transformer-XL (arXiv:1901.02860): the decoder of ``transformer`` with a memory and relative positions.

The text of a lane is read in segments. Each layer attends to the segment and to its own inputs at the last ``memory``
positions before it, as they were then: no gradient goes back into them. So a layer looks back over ``memory``
positions and the whole model over depth times as many. Block, norms and feed-forward are those of ``transformer``;
embeddings are not scaled and nothing but ``attention/relative.py`` knows of positions.

Legend: B lanes, T positions of the segment, M remembered ones, S = M + T, L layers, D width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import ArchitectureConfig, TransformerXLConfig
from glowflow.core.architectures.base import Carry
from glowflow.core.architectures.decoder import Decoder
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.build import layer_spec
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.flops import attention_flops
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.relative import (
    DistanceEncoding,
    RelativeAttention,
    RelativeCache,
    RelativeContext,
    resolve_relative,
)
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.differentiation import is_twice_differentiable

__all__ = ["Memory", "TransformerXL"]

NOWHERE = torch.iinfo(torch.int64).min
"""The document of a slot that holds nothing: no query is in it."""


@dataclass
class Memory:
    """What a batch of lanes remembers; as a carry these are its tensors by name.

    Args:
        states: (B, L, M, D) inputs of each layer at the last M positions, oldest first.
        documents: (B, M) int64 document of each of these positions.
        length: (B,) int64 how many of them count: the last ones.
    """

    states: Tensor
    documents: Tensor
    length: Tensor

    @classmethod
    def empty(cls, lanes: int, layers: int, size: int, like_x: Tensor) -> Memory:
        """Room for ``size`` positions that hold nothing yet."""
        states = like_x.new_zeros(lanes, layers, size, like_x.shape[-1])
        return cls(states, *(torch.zeros(s, dtype=torch.int64, device=like_x.device) for s in ((lanes, size), lanes)))

    @property
    def size(self) -> int:
        """M."""
        return self.states.shape[2]

    def resized(self, size: int) -> Memory:
        """The last ``size`` positions; a longer memory has room in front that holds nothing."""
        more = size - self.size
        if more == 0:
            return self
        documents = F.pad(self.documents, (more, 0))
        return Memory(F.pad(self.states, (0, 0, more, 0)), documents, self.length.clamp(max=size))

    def forget(self, lanes_b: Tensor) -> Memory:
        """The same with nothing remembered in some lanes."""
        return Memory(self.states, self.documents, self.length.masked_fill(lanes_b, 0))

    def seen_documents(self) -> Tensor:
        """(B, M) documents, ``NOWHERE`` for what does not count."""
        held = torch.arange(self.size, device=self.length.device) >= self.size - self.length[:, None]
        return self.documents.masked_fill(~held, NOWHERE)

    def followed_by(self, inputs: list[Tensor], documents_bt: Tensor) -> Memory:
        """The memory after a segment: the last M positions of what was remembered and what came.

        Args:
            inputs: input of each layer, (B, T, D), detached.
            documents_bt: document of each position.
        """
        kept = max(0, self.size - documents_bt.shape[1])  # of the M positions from before
        first = self.size - kept
        layers = [
            torch.cat((self.states[:, index, first:], x_btd[:, x_btd.shape[1] - first :]), dim=1)
            for index, x_btd in enumerate(inputs)
        ]
        states = torch.stack(layers, dim=1)
        # A lane that came out infinite would stay so for ever: it starts anew, as the skipped step of the loop does.
        finite_b = states.flatten(1).sum(1, dtype=torch.float32).isfinite()
        states = torch.where(finite_b[:, None, None, None], states, 0.0)
        documents = torch.cat((self.documents[:, first:], documents_bt[:, documents_bt.shape[1] - first :]), dim=1)
        length = (self.length + documents_bt.shape[1]).clamp(max=self.size)
        return Memory(states, documents, length.masked_fill(~finite_b, 0))


class TransformerXL(Decoder):
    """Transformer-XL, registered as ``transformer-xl``; its carry holds the fields of ``Memory``."""

    config_class: ClassVar[type[ArchitectureConfig]] = TransformerXLConfig
    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig) -> None:
        spec, eps = layer_spec(config, "dense"), config.norm_eps if config.qk_norm else None
        memory = config.evaluation_memory
        super().__init__(
            config, (RelativeAttention(config.dim, spec, layer, memory, eps) for layer in range(config.depth))
        )
        self.content_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))  # u of the paper
        self.position_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))  # v
        self.distances = DistanceEncoding(config.dim, config.clamp_distance)

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        x_btd = self.embed(batch.tokens)
        memory = self._memory(batch, carry, x_btd)
        context = self._context(x_btd, memory.size, self._documents(batch, memory))
        inputs, balances = [], []
        for layer, block in enumerate(self.blocks):
            inputs.append(x_btd.detach())
            x_btd, balance_b = block(x_btd, context, memory.states[:, layer] if memory.size else None)
            balances.append(balance_b)
        output = self.output(self.norm(x_btd), batch, balances, compute_loss)
        return output, vars(memory.followed_by(inputs, batch.document_ids)) if memory.size else None

    def _memory(self, batch: Batch, carry: Carry, x_btd: Tensor) -> Memory:
        """What the lanes remember before this segment; longer in evaluation than in training where the config says."""
        size = self.config.memory if self.training else self.config.evaluation_memory
        if carry is None:
            return Memory.empty(x_btd.shape[0], self.config.depth, size, x_btd)
        given = Memory(carry["states"].detach().to(x_btd.dtype), carry["documents"], carry["length"])
        return given.resized(size).forget(batch.reset)

    def _documents(self, batch: Batch, memory: Memory) -> Tensor | None:
        """(B, S) document of every position that can be seen; None where there is only one and no memory."""
        if memory.size:
            return torch.cat((memory.seen_documents(), batch.document_ids), dim=1)
        return None if batch.single_document else batch.document_ids

    def _context(
        self, x_btd: Tensor, before: int, documents_bs: Tensor | None, cache: DecodeCache | None = None
    ) -> RelativeContext:
        """Distances, masks and the kernel of one pass.

        Args:
            before: positions that can be seen before the first of ``x_btd``.
        """
        device, dtype, length = x_btd.device, x_btd.dtype, x_btd.shape[1]
        encoding_pd = self.distances.rows(before + length, device, dtype)
        if self.config.dropout:
            encoding_pd = F.dropout(encoding_pd, self.config.dropout, self.training)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        second = is_twice_differentiable()
        facts = {"documents": documents_bs is not None, "decoding": cache is not None, "second_order": second}
        conditions = Conditions.here(device, dtype, training=torch.is_grad_enabled(), **facts)
        backend = "auto" if second else self.config.attention.backend
        return RelativeContext(
            Visibility(length, before + length, device, documents=documents_bs),
            conditions,
            backend,
            cache=cache,
            length=length,
            encoding_pd=encoding_pd,
            content_bias_h1w=self.content_bias.unsqueeze(1),
            position_bias_h1w=self.position_bias.unsqueeze(1),
            relative=resolve_relative(layer_spec(self.config, "dense"), backend, conditions)[0],
        )

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DecodeCache:
        """With a memory the text may grow for ever: each position sees the last ones, and nothing fills up."""
        cache = super().new_cache(batch_size, max_length, device, dtype)
        return DecodeCache(cache.layers, sys.maxsize if self.config.evaluation_memory else max_length)

    def decode(self, tokens: Tensor, cache: DecodeCache, *, last_only: bool = False) -> Tensor:
        cache.require(tokens.shape[1])
        x_btd, part = self.embed(tokens), cache.layers[0]
        assert isinstance(part, RelativeCache)
        context = self._context(x_btd, part.reach, None, cache)
        for block in self.blocks:
            x_btd, _ = block(x_btd, context)
        cache.advance(tokens.shape[1])
        hidden: Tensor = self.norm(x_btd)
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def attention_specs(self, layer: int, context: int) -> list[AttentionSpec]:
        return [layer_spec(self.config, "dense")]

    def flops_per_token(self, context: int) -> float:
        """6 N, attention to S = M + T keys, the scores of as many distances, and keys and values of the memory.

        The remembered positions are projected again for every segment; no gradient goes into them, but one goes as
        far as the gain of the norm before. W_r R, one product for the whole batch, counts once per token (in N).
        """
        c = self.config
        spec, keys = layer_spec(c, "dense"), c.memory + context
        distances = 6.0 * c.heads * c.head_dim * keys
        projected = 6.0 * c.dim * 2 * c.num_kv_heads * c.head_dim * c.memory / context
        return 6.0 * self.num_active_parameters() + c.depth * (attention_flops(spec, keys) + distances + projected)
