"""Linear attention as a layer: project, convolve, recur, normalise, gate, project back.

    q, k, v = silu(conv(W x))                       each channel over its last few positions
    decay   = logsigmoid(w_h . x + b_h) / 16        per head and position (gated, gated_delta)
    y       = norm(recurrence(q, k, v, decay)) * silu(W_g x)

Legend: B batch, T positions, D width, H heads, K key/value heads, W head width, N channels of q, k and v together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.architectures.base import InitSpec
from glowflow.core.attention.cache import StateCache
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.linear.base import LinearInputs
from glowflow.core.attention.linear.convolution import ShortConvolution
from glowflow.core.attention.linear.kernels import resolve_linear
from glowflow.core.attention.linear.passes import accumulation_dtype, runs_of
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.rotary import Rotary, RotaryTables, rotate
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["LinearAttention", "LinearOptions", "Recurrence"]

_DECAY_DIVISOR = 16.0  # slow decays from the start: exp(logsigmoid(0) / 16) = 0.958 (arXiv:2312.06635, section 4.4)


@dataclass(frozen=True)
class LinearOptions:
    """What is around the recurrence.

    Args:
        conv: width of the short convolution on q, k and v, with SiLU after it; 0: neither.
        output_gate: multiply the normalised output by silu(W x).
        norm_eps: epsilon of the norm of each head's output.
        qk_norm: RMSNorm on queries and keys too.
        rope_theta: base of the rotary frequencies of ``retention``, where the context brings no tables.
    """

    conv: int = 4
    output_gate: bool = True
    norm_eps: float = 1e-6
    qk_norm: bool = False
    rope_theta: float = 10000.0


class Recurrence(nn.Module):
    """From projected queries, keys and values to the heads' outputs; what `linear` and `gated` layers share.

    Args:
        dim: width D of the layer's input, which decays and gates are made from.
        spec: of kind ``linear``.
    """

    def __init__(self, dim: int, spec: AttentionSpec, options: LinearOptions) -> None:
        super().__init__()
        assert spec.linear is not None
        self.spec, self.variant = spec, spec.linear.variant
        width, channels = spec.head_dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.convolution = ShortConvolution(channels, options.conv) if options.conv else None
        self.q_norm = RMSNorm(width, options.norm_eps) if options.qk_norm else None
        self.k_norm = RMSNorm(width, options.norm_eps) if options.qk_norm else None
        self.decay = nn.Linear(dim, spec.heads) if self.variant in ("gated", "gated_delta") else None
        self.beta = nn.Linear(dim, spec.heads) if self.variant == "gated_delta" else None
        self.norm = RMSNorm(width, options.norm_eps)
        self.gate = nn.Linear(dim, spec.heads * width, bias=False) if options.output_gate else None
        self.rotary = Rotary(width, options.rope_theta) if self.variant == "retention" else None

    def forward(self, qkv_btn: Tensor, x_btd: Tensor, context: AttentionContext, memory: StateCache | None) -> Tensor:
        """(B, T, N), (B, T, D) -> (B, T, H, W); ``memory`` is read and written."""
        visibility = context.visibility
        if memory is None:
            documents, key_valid = visibility.documents, visibility.key_valid
        else:
            documents = key_valid = None  # while decoding a row is one document without padding
        qkv_btn = self._convolve(qkv_btn, documents, key_valid, memory)
        q, k, v = self._heads(qkv_btn, context)
        inputs = LinearInputs(q, k, v, self._decay(x_btd), self._beta(x_btd), documents, key_valid)
        kernel = resolve_linear(self.spec, context.named, context.conditions)[0]
        y_bhtw, state = kernel.run(inputs, self.spec, None if memory is None else memory.state.get("state"))
        if memory is not None:
            memory.state["state"] = state
        y_bthw = self.norm(y_bhtw.transpose(1, 2))
        return y_bthw if self.gate is None else y_bthw * F.silu(self.gate(x_btd)).view_as(y_bthw)

    def _convolve(
        self, qkv_btn: Tensor, documents: Tensor | None, key_valid: Tensor | None, memory: StateCache | None
    ) -> Tensor:
        if self.convolution is None:
            return qkv_btn
        if key_valid is not None:
            qkv_btn = qkv_btn.masked_fill(~key_valid.unsqueeze(-1), 0.0)
        runs = None if documents is None else runs_of(documents)
        tail = None if memory is None else memory.state.get("tail")
        qkv_btn, tail = self.convolution(qkv_btn, runs, tail)
        if memory is not None:
            memory.state["tail"] = tail.clone()  # not a view, which would keep the whole prompt
        return F.silu(qkv_btn)

    def _heads(self, qkv_btn: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, T, W) each, as the variant wants them."""
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        q, k, v = qkv_btn.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.variant == "feature_map":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        elif self.variant == "gated_delta":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.variant == "retention":
            tables = self._tables(context, q)
            q, k = rotate(q, tables), rotate(k, tables)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2) if heads != kv_heads else x for x in (k, v))
        return q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)

    def _tables(self, context: AttentionContext, q_bthw: Tensor) -> RotaryTables:
        """The context's angles, or one's own in a model whose positions are not rotary."""
        if context.tables is not None:
            return context.tables
        assert self.rotary is not None
        length, cache = q_bthw.shape[1], context.cache
        start, known = (0, length) if cache is None else (cache.length, cache.max_length)
        # Of the whole cache at once: a table that grew by one position would be computed anew at every step.
        return self.rotary.tables(known, q_bthw.device, q_bthw.dtype).slice(start, start + length)

    def _decay(self, x_btd: Tensor) -> Tensor | None:
        """(B or 1, H, T) logarithms, in the precision of the state."""
        full = accumulation_dtype(x_btd)
        if self.decay is not None:
            return F.logsigmoid(self.decay(x_btd).to(full)).transpose(1, 2) / _DECAY_DIVISOR
        if self.variant == "retention":
            # 1 - 2^(-5-h), h = 0 .. H-1 (arXiv:2307.08621, eq. 8)
            lost = 2.0 ** -(5.0 + torch.arange(self.spec.heads, dtype=torch.float64, device=x_btd.device))
            return torch.log1p(-lost).to(full)[None, :, None].expand(1, -1, x_btd.shape[1])
        return None

    def _beta(self, x_btd: Tensor) -> Tensor | None:
        return None if self.beta is None else torch.sigmoid(self.beta(x_btd)).transpose(1, 2)

    def init_spec(self, name: str) -> InitSpec | None:
        """How a parameter of this module starts; None: as any other of its sort."""
        if name == "convolution.weight" and self.convolution is not None:
            return InitSpec("normal", self.convolution.init_std)
        return InitSpec("zeros") if name.endswith("bias") else None


class LinearAttention(nn.Module):
    """Self-attention of kind ``linear``; ``qkv.weight`` holds the rows of all queries, then keys, then values.

    Args:
        dim: width D.
        spec: what is computed, of kind ``linear``.
        layer: which part of the cache is this layer's.
        options: convolution, norms and gate.
    """

    def __init__(self, dim: int, spec: AttentionSpec, layer: int, options: LinearOptions | None = None) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.qkv = StackedLinear(dim, spec.qkv_rows, bias=False)
        self.recurrence = Recurrence(dim, spec, options or LinearOptions())
        self.out = nn.Linear(spec.heads * spec.head_dim, dim, bias=False)

    def forward(self, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = self.out(self.between(self.qkv(x_btd), x_btd, context))
        return output

    def between(self, qkv_btn: Tensor, x_btd: Tensor, context: AttentionContext) -> Tensor:
        """What is between the two projections, (B, T, N), (B, T, D) -> (B, T, H*W)."""
        memory = None
        if context.cache is not None:
            memory = context.cache.layers[self.layer]
            assert isinstance(memory, StateCache)
        y_bthw: Tensor = self.recurrence(qkv_btn, x_btd, context, memory)
        return y_bthw.flatten(2)

    def new_cache(self, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        """This layer's empty memory; it grows to one state per head with the first position, and then no more."""
        return StateCache()

    def init_spec(self, name: str) -> InitSpec | None:
        """How a parameter of this module starts; None: as any other of its sort."""
        prefix, _, rest = name.partition(".")
        return self.recurrence.init_spec(rest) if prefix == "recurrence" else None
