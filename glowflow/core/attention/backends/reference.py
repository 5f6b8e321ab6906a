"""Attention as it is defined: the (T, S) weights are materialised. Any kind, any dtype; the oracle of the tests.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """The definition, written out."""

    name = "reference"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return common_reasons(spec, conditions, ("dense", "windowed", "sparse"))

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "materialises the attention weights: memory grows with the square of the context"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        group = spec.heads // spec.kv_heads
        k_bhsd, v_bhsd = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_bhts = q @ k_bhsd.transpose(-2, -1) * spec.softmax_scale
        if spec.softcap is not None:
            scores_bhts = spec.softcap * torch.tanh(scores_bhts / spec.softcap)
        if spec.alibi:
            scores_bhts = scores_bhts + visibility.alibi(spec, scores_bhts.dtype)
        mask_b1ts = visibility.mask(spec)
        scores_bhts = scores_bhts.masked_fill(~mask_b1ts, float("-inf"))
        weights_bhts = torch.softmax(scores_bhts, dim=-1)
        # A query that may look nowhere gets zeros, as in torch's own kernels.
        weights_bhts = weights_bhts.masked_fill(~mask_b1ts.any(-1, keepdim=True), 0.0)
        weights_bhts = F.dropout(weights_bhts, spec.dropout, training)
        return weights_bhts.to(v.dtype) @ v_bhsd
