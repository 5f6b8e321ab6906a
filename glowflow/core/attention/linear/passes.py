"""From a recurrence that runs left to right to whole linear attention: padding, documents, normaliser, directions.

A kernel computes one causal pass over a ``Stream``; ``compute`` prepares the stream and puts the passes together, the
same way for every kernel.

Legend: B batch, H heads, T positions, K width of keys, V width of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.linear.base import LinearInputs
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["CausalPass", "Stream", "accumulation_dtype", "compute", "runs_of"]

_EPSILON = 1e-10  # on a normaliser that is a sum of positive numbers: what a position that sees no key divides by


@dataclass
class Stream:
    """One pass from left to right.

    Args:
        q, k: (B, H, T, K), q already scaled.
        v: (B, H, T, V), for ``feature_map`` with a column of ones; 0 at padding.
        decay: (B or 1, H, T) logarithm, 0 at padding; None: no decay.
        beta: (B, H, T), 0 at padding; None: no delta rule.
        runs: (B, T) int64, another number from each document's start on; None: one document.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    runs: Tensor | None

    def reversed(self) -> Stream:
        """The same from right to left."""
        decay = None if self.decay is None else self.decay.flip(2)
        beta = None if self.beta is None else self.beta.flip(2)
        runs = None if self.runs is None else self.runs.flip(1)
        return Stream(self.q.flip(2), self.k.flip(2), self.v.flip(2), decay, beta, runs)

    def split(self, length: int) -> list[Stream]:
        """Into streams of ``length`` positions, the last with what is left."""
        q, k, v, decay, beta = (
            itertools.repeat(None) if x is None else x.split(length, dim=2)
            for x in (self.q, self.k, self.v, self.decay, self.beta)
        )
        runs = itertools.repeat(None) if self.runs is None else self.runs.split(length, dim=1)
        return [Stream(*parts) for parts in zip(q, k, v, decay, beta, runs, strict=False)]


CausalPass: TypeAlias = Callable[[Stream, "Tensor | None"], tuple[Tensor, Tensor]]
"""(stream, state or None) -> outputs (B, H, T, V) and state, in any floating-point dtype."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What states are kept in: fp32, or fp64 for inputs in fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def runs_of(documents_bt: Tensor) -> Tensor:
    """(B, T) number of the run of equal documents that a position is in: a document that comes again is a new run."""
    starts = documents_bt[:, 1:] != documents_bt[:, :-1]
    return F.pad(starts.long().cumsum(1), (1, 0))


def compute(
    causal_pass: CausalPass, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Linear attention by means of a kernel's causal pass; see ``LinearBackend.run``."""
    assert spec.linear is not None and (spec.causal or state is None)
    variant = spec.linear.variant
    stream = _stream(inputs, spec)
    y_bhtv, state = causal_pass(stream, state)
    if not spec.causal:
        back_bhtv, _ = causal_pass(stream.reversed(), None)
        both = y_bhtv + back_bhtv.flip(2)
        y_bhtv = both / 2 if variant == "gated_delta" else both - _own(stream)
    if variant == "feature_map":
        y_bhtv = y_bhtv[..., :-1] / (y_bhtv[..., -1:] + _EPSILON)
    return y_bhtv.to(inputs.v.dtype), state


def _stream(inputs: LinearInputs, spec: AttentionSpec) -> Stream:
    q, v, decay, beta = inputs.q, inputs.v, inputs.decay, inputs.beta
    assert spec.linear is not None
    if spec.linear.variant == "feature_map":
        v = F.pad(v, (0, 1), value=1.0)  # the normaliser is the attention's value of 1
    else:
        q = q * spec.softmax_scale
    if inputs.key_valid is not None:
        padding_b1t = ~inputs.key_valid[:, None]
        v = v.masked_fill(padding_b1t[..., None], 0.0)
        decay = None if decay is None else decay.masked_fill(padding_b1t, 0.0)
        beta = None if beta is None else beta.masked_fill(padding_b1t, 0.0)
    runs = None if inputs.documents is None else runs_of(inputs.documents)
    return Stream(q, inputs.k, v, decay, beta, runs)


def _own(stream: Stream) -> Tensor:
    """What each position gets from itself."""
    full = accumulation_dtype(stream.v)
    return (stream.q.to(full) * stream.k.to(full)).sum(-1, keepdim=True) * stream.v.to(full)
