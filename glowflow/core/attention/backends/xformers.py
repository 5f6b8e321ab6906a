"""xformers' ``memory_efficient_attention`` with its own biases (no materialised masks); the package is optional.

Queries, keys and values go in as [B, T, H, D], or as one row of all documents end to end. Underneath run torch's own
flash and CUTLASS kernels, or flash-attn where it is installed: what this adds is mostly the variety of biases.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.fused import (
    HALF,
    capability_reason,
    document_runs,
    fused_reasons,
)
from glowflow.core.attention.backends.packages import import_reasons, package_reasons, version_of
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["XformersBackend", "attention_bias"]


class XformersBackend:
    """The package xformers."""

    name = "xformers"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = fused_reasons(spec, conditions, (*HALF, torch.float32))
        if spec.softcap is not None:
            reasons.append("cannot cap the scores (softcap)")
        if spec.alibi:
            reasons.append("has ALiBi only as a materialised bias")
        if spec.kind == "windowed" and not spec.causal and conditions.documents:
            reasons.append("has no bias for a window to both sides inside documents")
        half = conditions.dtype in HALF
        reasons += self._flash_reasons(spec, conditions) if half else self._cutlass_reasons(spec, conditions)
        reasons += self._installed()
        return reasons or import_reasons("xformers.ops")

    @staticmethod
    def _flash_reasons(spec: AttentionSpec, conditions: Conditions) -> list[str]:
        """Limits of the flash kernels, which serve the half types."""
        reasons = capability_reason(conditions, "8.0 or later", lambda it: it >= (8, 0))
        if spec.head_dim % 8 or spec.head_dim > 256:
            reasons.append(f"needs heads of at most 256 channels in steps of 8, not {spec.head_dim}")
        return reasons

    @staticmethod
    def _cutlass_reasons(spec: AttentionSpec, conditions: Conditions) -> list[str]:
        """Limits of the CUTLASS kernels, which serve float32."""
        reasons = capability_reason(conditions, "5.0 to 9.0 in float32", lambda it: (5, 0) <= it <= (9, 0))
        if spec.head_dim % 4:
            reasons.append(f"needs heads in steps of 4 channels in float32, not {spec.head_dim}")
        if spec.kind == "windowed" and not spec.causal:
            reasons.append("has windows to both sides in float16 and bfloat16 alone")
        elif spec.kind == "windowed" and conditions.training and not conditions.documents:
            reasons.append("trains windows in float16 and bfloat16 alone")
        return reasons

    @staticmethod
    def _installed() -> list[str]:
        """Its distribution, and the trap: xformers takes flash-attn-4's namespace ``flash_attn`` for flash-attn."""
        reasons = package_reasons("xformers", "0.0.30")
        if not reasons and version_of("flash-attn-4") and not version_of("flash-attn"):
            reasons = ["cannot be imported beside flash-attn-4 unless flash-attn (2.x) is installed too"]
        return reasons

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        repeated = "; repeats the key/value heads for each query head" if spec.heads != spec.kv_heads else ""
        return f"xformers memory_efficient_attention{repeated}"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        assert visibility.in_order
        group = spec.heads // spec.kv_heads  # its grouped layout has no backward pass
        k_bhsd, v_bhsd = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        q_bthd, k_bshd, v_bshd = (x.transpose(1, 2) for x in (q, k_bhsd, v_bhsd))
        if visibility.documents is not None:
            q_bthd, k_bshd, v_bshd = (x.flatten(0, 1)[None] for x in (q_bthd, k_bshd, v_bshd))
        attend = importlib.import_module("xformers.ops").memory_efficient_attention
        out_bthd: Tensor = attend(
            q_bthd,
            k_bshd,
            v_bshd,
            attn_bias=attention_bias(spec, visibility),
            p=spec.dropout if training else 0.0,
            scale=spec.softmax_scale,
        )
        return out_bthd.reshape(q.shape[0], q.shape[2], *out_bthd.shape[2:]).transpose(1, 2)


def attention_bias(spec: AttentionSpec, visibility: Visibility) -> Any:
    """xformers' own bias of what the spec and the documents let through; None: everything."""
    key = (spec.kind, spec.causal, spec.window)
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    if visibility.documents is None:
        return _of_rows(biases, spec)
    runs = document_runs(visibility)

    def make() -> Any:
        bias = biases.BlockDiagonalMask.from_seqlens(runs.borders.diff().tolist(), device=runs.borders.device)
        if spec.kind == "windowed":
            return bias.make_local_attention(spec.window)
        return bias.make_causal() if spec.causal else bias

    return visibility.kept(("xformers", key), make)


def _of_rows(biases: Any, spec: AttentionSpec) -> Any:
    """Without documents: aligned at the ends, as ours are."""
    if spec.kind == "windowed":
        assert spec.window is not None
        if not spec.causal:
            return biases.LocalAttentionFromBottomRightMask(window_left=spec.window - 1, window_right=spec.window - 1)
        return biases.LowerTriangularFromBottomRightMask().make_local_attention(spec.window)
    return biases.LowerTriangularFromBottomRightMask() if spec.causal else None
