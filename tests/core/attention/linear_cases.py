"""Specs and drawn inputs of linear attention that several test files share.

Legend: B batch, H heads, T positions, K width of keys, V width of values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.linear.base import LinearInputs
from glowflow.core.attention.spec import AttentionSpec, LinearSpec

VARIANTS = ("gated", "feature_map", "retention", "gated_delta")


def spec_of(variant: str, *, causal: bool = True, heads: int = 3, width: int = 4, chunk: int = 8) -> AttentionSpec:
    linear = LinearSpec(variant, chunk)  # type: ignore[arg-type]
    return AttentionSpec(kind="linear", causal=causal, heads=heads, kv_heads=heads, head_dim=width, linear=linear)


def draw(spec: AttentionSpec, length: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> LinearInputs:
    """Inputs as the layer makes them for the spec's variant, B = 2, V = 5."""
    assert spec.linear is not None
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, spec.heads, length, *shape, dtype=dtype, generator=generator)

    q, k, v = normal(spec.head_dim), normal(spec.head_dim), normal(5)
    inputs = LinearInputs(q, k, v, F.logsigmoid(normal()))
    if spec.linear.variant == "feature_map":
        return replace(inputs, q=F.elu(q) + 1, k=F.elu(k) + 1, decay=None)
    if spec.linear.variant == "gated_delta":
        return replace(inputs, k=F.normalize(k, dim=-1), beta=torch.sigmoid(normal()))
    return inputs


def documents(length: int, seed: int = 1) -> Tensor:
    """(2, T) ids that change at drawn places and are not in order."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(2, length, generator=generator) < 0.3
    return 100 - starts.long().cumsum(1) * 3


def padding(length: int, seed: int = 2) -> Tensor:
    """(2, T) validity with holes; the first position is real."""
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.25
    valid[:, 0] = True
    return valid


def leaves(inputs: LinearInputs) -> tuple[LinearInputs, list[Tensor]]:
    """The same inputs as leaves that want gradients."""
    names = [name for name in ("q", "k", "v", "decay", "beta") if getattr(inputs, name) is not None]
    copies = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in names}
    return replace(inputs, **copies), list(copies.values())
