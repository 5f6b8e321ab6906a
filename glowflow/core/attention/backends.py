"""The kernels behind dense attention: each says why it cannot serve, or runs.

Legend: q_bhtd queries, k_bksd / v_bksd keys and values (B batch, H heads, K key/value heads, T queries, S keys,
D head width); mask_b1ts bool, True where a query may look.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.spec import AttentionSpec

__all__ = ["BACKENDS", "Backend", "ReferenceBackend", "SdpaBackend", "causal_mask"]


class Backend(Protocol):
    """One kernel. ``auto`` tries backends in the order of ``BACKENDS``."""

    name: str

    def reasons(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot serve; empty when it can."""

    def advice(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str:
        """One line about what runs underneath, for the log and ``glowflow plan``."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """(B, H, T, D), (B, K, S, D), (B, K, S, D) -> (B, H, T, D). A given mask must already hold the causal rule."""


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(T, S) bool, aligned at the ends: the last query sees every key."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _common_reasons(spec: AttentionSpec, dtype: torch.dtype) -> list[str]:
    reasons = []
    kind: str = spec.kind
    if kind != "dense":
        reasons.append(f"computes only kind 'dense', not {kind!r}")
    if not dtype.is_floating_point:
        reasons.append(f"needs a floating-point dtype, not {dtype}")
    if spec.heads % spec.kv_heads:
        reasons.append(f"needs kv_heads ({spec.kv_heads}) to divide heads ({spec.heads})")
    return reasons


class SdpaBackend:
    """``torch.nn.functional.scaled_dot_product_attention``: flash, cuDNN or memory-efficient, whichever fits."""

    name = "sdpa"

    def reasons(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> list[str]:
        reasons = _common_reasons(spec, dtype)
        if device_type == "meta":
            reasons.append("the meta device has no kernels")
        return reasons

    def advice(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str:
        if device_type == "cpu" and spec.dropout:
            return "torch SDPA; dropout on attention weights leaves the CPU its unfused maths kernel"
        return "torch SDPA, fused kernel" if device_type in ("cpu", "cuda") else "torch SDPA"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        num_queries, num_keys = q.shape[2], k.shape[2]
        is_causal = False
        if mask is None and spec.causal and num_queries > 1:
            # torch aligns is_causal at the top left: right only where queries and keys are equally many.
            is_causal = num_queries == num_keys
            mask = None if is_causal else causal_mask(num_queries, num_keys, q.device)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=spec.dropout if training else 0.0,
            is_causal=is_causal,
            scale=spec.scale,
            enable_gqa=spec.heads != spec.kv_heads,
        )


class ReferenceBackend:
    """The definition, written out: the (T, S) weights are materialised. Any dtype; the oracle of the tests."""

    name = "reference"

    def reasons(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> list[str]:
        return _common_reasons(spec, dtype)

    def advice(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str:
        return "materialises the attention weights: memory grows with the square of the context"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        group = spec.heads // spec.kv_heads
        k_bhsd, v_bhsd = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores_bhts = q @ k_bhsd.transpose(-2, -1) * spec.softmax_scale
        if mask is None and spec.causal:
            mask = causal_mask(q.shape[2], k.shape[2], q.device)
        if mask is not None:
            scores_bhts = scores_bhts.masked_fill(~mask, float("-inf"))
        weights_bhts = torch.softmax(scores_bhts, dim=-1)
        if mask is not None:
            # A query that may look nowhere gets zeros, as in torch's own kernels.
            weights_bhts = weights_bhts.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        weights_bhts = F.dropout(weights_bhts, spec.dropout, training)
        return weights_bhts.to(v.dtype) @ v_bhsd


BACKENDS: tuple[Backend, ...] = (SdpaBackend(), ReferenceBackend())
