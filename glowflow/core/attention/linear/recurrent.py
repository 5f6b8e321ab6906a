"""Linear attention as it is defined: one position after the other. Any variant, any dtype; the oracle of the tests.

Legend: B batch, H heads, T positions, K width of keys, V width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.linear.base import LinearInputs, linear_reasons
from glowflow.core.attention.linear.passes import Stream, accumulation_dtype, compute
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["RecurrentBackend", "recurrent_pass"]


class RecurrentBackend:
    """The definition, written out."""

    name = "reference"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return linear_reasons(spec, conditions)

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "one step per position: slow, and in training it keeps the state of every position"

    def run(self, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs.q.device.type, enabled=False):
            return compute(recurrent_pass, inputs, spec, state)


def recurrent_pass(stream: Stream, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``CausalPass``."""
    full = accumulation_dtype(stream.q)
    q, k, v = (x.to(full) for x in (stream.q, stream.k, stream.v))
    state_bhkv = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state.to(full)
    outputs = []
    for t in range(q.shape[2]):
        k_bhk1, added_bhv = k[:, :, t, :, None], v[:, :, t]
        if stream.decay is not None:
            state_bhkv = state_bhkv * stream.decay[:, :, t, None, None].to(full).exp()
        if stream.runs is not None and t:
            goes_on_b = stream.runs[:, t] == stream.runs[:, t - 1]
            state_bhkv = torch.where(goes_on_b[:, None, None, None], state_bhkv, 0.0)
        if stream.beta is not None:
            recalled_bhv = (state_bhkv * k_bhk1).sum(2)
            added_bhv = stream.beta[:, :, t, None].to(full) * (added_bhv - recalled_bhv)
        state_bhkv = state_bhkv + k_bhk1 * added_bhv[:, :, None]
        outputs.append((q[:, :, t, None] @ state_bhkv).squeeze(2))
    return torch.stack(outputs, dim=2), state_bhkv
