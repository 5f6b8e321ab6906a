"""Self-attention with a softmax, of any kind: project, give positions, attend, project back.

Legend: B batch, T positions, D width, H heads, K key/value heads, W head width, N channels of q, k and v together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from glowflow.core.attention.backends.base import Backend, Conditions
from glowflow.core.attention.cache import DecodeCache, FullKV, RingKV
from glowflow.core.attention.dispatch import resolve
from glowflow.core.attention.heads import attend, new_kv_cache, split_heads
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.rotary import RotaryTables
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["AttentionContext", "SelfAttention"]


@dataclass
class AttentionContext:
    """What all layers of one forward pass share.

    Not a tensor and no pytree: mixed-precision wrappers leave the tables in it alone.

    Args:
        visibility: who may look at whom, of a pass without a cache; with one, each layer makes its own.
        conditions: where the pass runs; kernels are chosen by them.
        backend: ``model.attention.backend``.
        tables: rotary angles of the new positions; None without RoPE.
        cache: the layers' memories while decoding.
        length: positions of the whole sequence: what ``by_length`` goes by. With a cache what fits into it.
    """

    visibility: Visibility
    conditions: Conditions
    backend: str = "auto"
    tables: RotaryTables | None = None
    cache: DecodeCache | None = None
    length: int = 0
    _chosen: dict[AttentionSpec, Backend] = field(default_factory=dict, repr=False)

    @property
    def named(self) -> str:
        """The backend for this pass: a name is meant for training on whole sequences, all else goes by ``auto``."""
        return "auto" if self.conditions.decoding or self.conditions.second_order else self.backend

    def kernel(self, spec: AttentionSpec) -> Backend:
        """The backend that computes a layer of this pass."""
        if spec not in self._chosen:
            self._chosen[spec] = resolve(spec, self.named, self.conditions)[0]
        return self._chosen[spec]


class SelfAttention(nn.Module):
    """Self-attention; ``qkv.weight`` holds the rows of all queries, then keys, then values.

    Args:
        dim: width D.
        spec: what is computed.
        layer: which part of the cache is this layer's.
        qk_norm_eps: RMSNorm on queries and keys with this epsilon; None: none.
        rotary: turn queries and keys by the context's tables.
        bias: as ``model.bias``; all but false gives ``qkv`` one, all but ``qkv`` then ``out`` too.
        long_spec: what is computed instead for sequences of more than ``dense_up_to`` positions.
        dense_up_to: see ``long_spec``.
    """

    def __init__(
        self,
        dim: int,
        spec: AttentionSpec,
        layer: int,
        qk_norm_eps: float | None = None,
        *,
        rotary: bool = True,
        bias: bool | str = False,
        long_spec: AttentionSpec | None = None,
        dense_up_to: int = 0,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.spec, self.long_spec, self.dense_up_to = spec, long_spec, dense_up_to
        self.layer = layer
        self.qkv = StackedLinear(dim, spec.qkv_rows, bias=bool(bias))
        self.out = nn.Linear(spec.heads * spec.head_dim, dim, bias=bool(bias) and bias != "qkv")
        self.q_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(spec.head_dim, qk_norm_eps)

    def forward(self, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = self.out(self.between(self.qkv(x_btd), x_btd, context))
        return output

    def between(self, qkv_btn: Tensor, x_btd: Tensor | None, context: AttentionContext) -> Tensor:
        """What is between the two projections, (B, T, N) -> (B, T, H*W); ``x_btd`` is not read."""
        q_bhtw, k_bktw, v_bktw = split_heads(
            qkv_btn, self.spec, context.tables if self.rotary else None, self.q_norm, self.k_norm
        )
        part = None if context.cache is None else context.cache.layers[self.layer]
        assert part is None or isinstance(part, FullKV | RingKV)
        y_bhtw = attend(q_bhtw, k_bktw, v_bktw, self.spec_at(context.length), context, part, self.training)
        return y_bhtw.transpose(1, 2).flatten(2)

    def spec_at(self, length: int) -> AttentionSpec:
        """What is computed for a sequence of this length; the same on every rank, since it is a number of the host."""
        return self.spec if self.long_spec is None or length <= self.dense_up_to else self.long_spec

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> FullKV | RingKV:
        """This layer's empty memory: a ring where a window is all that is seen."""
        return new_kv_cache(self.spec_at(max_length), batch_size, max_length, device, dtype)
