"""``torch.nn.functional.scaled_dot_product_attention``: flash, cuDNN or memory-efficient, whichever fits.

A rule that is more than causal is a mask of (T, S) here, which costs more than dense attention without one: for
windows and patterns this is what serves short sequences and decoding steps; ``blocked`` and ``gather`` serve long ones.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["SdpaBackend", "sdpa_reasons"]


def sdpa_reasons(spec: AttentionSpec, conditions: Conditions, kinds: tuple[str, ...]) -> list[str]:
    """Why torch's attention cannot compute one of these kinds."""
    reasons = common_reasons(spec, conditions, kinds)
    if conditions.device_type == "meta":
        reasons.append("the meta device has no kernels")
    if spec.softcap is not None:
        reasons.append("cannot cap the scores (softcap)")
    if conditions.second_order:
        reasons.append("its fused kernels have no second derivative")
    return reasons


class SdpaBackend:
    """torch's own fused attention."""

    name = "sdpa"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return sdpa_reasons(spec, conditions, ("dense", "windowed", "sparse"))

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        if conditions.device_type == "cpu" and spec.dropout:
            return "torch SDPA; dropout on attention weights leaves the CPU its unfused maths kernel"
        if spec.kind != "dense":
            return "torch SDPA with a mask over all pairs: slower than dense on long sequences"
        return "torch SDPA, fused kernel" if conditions.device_type in ("cpu", "cuda") else "torch SDPA"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        mask, is_causal = _mask(q, spec, visibility)
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


def _mask(q: Tensor, spec: AttentionSpec, visibility: Visibility) -> tuple[Tensor | None, bool]:
    """torch's mask, and its flag for the plain causal one."""
    if spec.plain and visibility.everywhere:
        if not spec.causal or visibility.num_queries == 1:
            return None, False
        # torch aligns is_causal at the top left: right only where queries and keys are equally many.
        if visibility.num_queries == visibility.num_keys:
            return None, True
    mask_b1ts = visibility.mask(spec)
    if not spec.alibi:
        return mask_b1ts, False
    return visibility.alibi(spec, q.dtype).masked_fill(~mask_b1ts, float("-inf")), False
