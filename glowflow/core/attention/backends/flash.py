"""FlashAttention 2, 3 and 4: packages that are optional, one adapter each.

Queries, keys and values go in as [B, T, H, D], or end to end as [B * T, H, D] where documents are to be kept apart.
A window of W keys, the query's own among them, is ``window_size=(W - 1, 0)``; causal masks are aligned at the ends, as
ours are. FlashAttention 2 and 4 are called; 3 is put underneath torch's own operators, for the whole process.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width, N = B * T positions end to end.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional as F

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.fused import (
    HALF,
    DocumentRuns,
    capability_reason,
    document_runs,
    fused_reasons,
    slopes_on,
)
from glowflow.core.attention.backends.packages import import_reasons, package_reasons
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["FlashAttention2", "FlashAttention3", "FlashAttention4", "window_of"]

logger = logging.getLogger(__name__)


def window_of(spec: AttentionSpec, everything: int | None) -> tuple[int | None, int | None]:
    """Keys to the left and right of the query's own that it may see; ``everything``: how the kernel says "all"."""
    if spec.kind != "windowed":
        return everything, everything
    assert spec.window is not None
    return spec.window - 1, 0 if spec.causal else spec.window - 1


class FlashAttention2:
    """The package flash-attn (arXiv:2307.08691)."""

    name = "flash_attn_2"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = fused_reasons(spec, conditions, HALF)
        reasons += capability_reason(conditions, "8.0 or later", lambda it: it >= (8, 0))
        if spec.head_dim > 256:
            reasons.append(f"needs heads of at most 256 channels, not {spec.head_dim}")
        if spec.softcap is not None and spec.dropout:
            reasons.append("cannot cap the scores (softcap) and drop weights (dropout) together")
        large, server = spec.head_dim > 192, conditions.capability in (None, (8, 0), (9, 0))
        if large and spec.dropout and conditions.training and not server:
            reasons.append("trains heads of more than 192 channels with dropout on A100 and H100 alone")
        reasons += package_reasons("flash-attn", "2.6")
        return reasons or import_reasons("flash_attn")

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "flash-attn 2" + (", documents end to end" if conditions.documents else "")

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        package = importlib.import_module("flash_attn")
        options = {
            "dropout_p": spec.dropout if training else 0.0,
            "softmax_scale": spec.softmax_scale,
            "causal": spec.causal,
            "window_size": window_of(spec, -1),
            "softcap": spec.softcap or 0.0,
            "alibi_slopes": slopes_on(spec.heads, q.device, torch.float32) if spec.alibi else None,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return _call(package.flash_attn_func, package.flash_attn_varlen_func, q, k, v, visibility, options)


class FlashAttention4:
    """The package flash-attn-4, written in CuTe; an alpha release."""

    name = "flash_attn_4"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = fused_reasons(spec, conditions, HALF)
        oldest = 9 if conditions.training else 8
        rule = f"{oldest}.x to 12.x" + (" to train" if conditions.training else "")
        reasons += capability_reason(conditions, rule, lambda it: oldest <= it[0] <= 12)
        reasons += self._width_reasons(spec, conditions)
        if spec.alibi:
            reasons.append("has no ALiBi")
        if spec.dropout:
            reasons.append("cannot drop attention weights (dropout)")
        reasons += package_reasons("flash-attn-4", "4.0.0b1")
        return reasons or import_reasons("flash_attn.cute")

    @staticmethod
    def _width_reasons(spec: AttentionSpec, conditions: Conditions) -> list[str]:
        major = conditions.capability[0] if conditions.capability else 9
        reasons = []
        if spec.head_dim % 8 or not 8 <= spec.head_dim <= 256:
            reasons.append(f"needs heads of 8 to 256 channels in steps of 8, not {spec.head_dim}")
        elif major in (10, 11) and 128 < spec.head_dim < 256:
            reasons.append(f"needs heads of at most 128 or of 256 channels on this GPU, not {spec.head_dim}")
        if spec.softcap is not None and conditions.training:
            if major == 12 or (major in (10, 11) and spec.head_dim == 256):
                reasons.append("cannot train with capped scores (softcap) on this GPU")
        return reasons

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "flash-attn-4, an alpha release; compiles per shape of the heads"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        package = importlib.import_module("flash_attn.cute")
        options = {
            "softmax_scale": spec.softmax_scale,
            "causal": spec.causal,
            "window_size": window_of(spec, None),
            "softcap": spec.softcap or 0.0,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return _call(package.flash_attn_func, package.flash_attn_varlen_func, q, k, v, visibility, options)


class FlashAttention3:
    """The package flash-attn-3 (arXiv:2407.08608) underneath torch's flash operators.

    ``activate_flash_attention_impl`` changes them for the whole process, so that ``auto`` never takes this one.
    """

    name = "flash_attn_3"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = fused_reasons(spec, conditions, HALF)
        reasons += capability_reason(conditions, "9.x (Hopper)", lambda it: it[0] == 9)
        if spec.head_dim % 8 or spec.head_dim > 256:
            reasons.append(f"needs heads of at most 256 channels in steps of 8, not {spec.head_dim}")
        if spec.alibi:
            reasons.append("has no ALiBi")
        if spec.softcap is not None:
            reasons.append("torch does not hand it a cap of the scores (softcap)")
        if spec.dropout:
            reasons.append("cannot drop attention weights (dropout)")
        listed: Callable[[], list[str]] = getattr(torch_attention, "list_flash_attention_impls", list)
        if "FA3" not in listed():
            reasons.append(f"torch {torch.__version__} cannot put it underneath its flash operators")
        reasons += package_reasons("flash-attn-3", "3.0.0b1")
        return reasons or import_reasons("flash_attn_interface")

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        return "torch's flash operators on FlashAttention 3, for the whole process"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        _activate("FA3")
        square = visibility.num_queries == visibility.num_keys
        if spec.kind == "dense" and visibility.everywhere and (square or not spec.causal):
            # Naming the flash kernel keeps torch from taking another one, which would not be FlashAttention 3.
            with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
                gqa = spec.heads != spec.kv_heads
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=spec.causal, scale=spec.softmax_scale, enable_gqa=gqa
                )
        left, right = window_of(spec, -1)
        options = {"scale": spec.softmax_scale, "window_size": (left, 0 if spec.causal else right)}
        return _call_varlen_attn(q, k, v, spec, visibility, options)


def _call(
    dense: Callable[..., Any],
    varlen: Callable[..., Any],
    q_bhtd: Tensor,
    k_bksd: Tensor,
    v_bksd: Tensor,
    visibility: Visibility,
    options: dict[str, Any],
) -> Tensor:
    """The package's function for whole rows, or the one for documents end to end."""
    assert visibility.in_order
    q_bthd, k_bskd, v_bskd = (x.transpose(1, 2) for x in (q_bhtd, k_bksd, v_bksd))
    if visibility.documents is None:
        return _output(dense(q_bthd, k_bskd, v_bskd, **options)).transpose(1, 2)
    runs = document_runs(visibility)
    out_nhd = varlen(
        q_bthd.flatten(0, 1),
        k_bskd.flatten(0, 1),
        v_bskd.flatten(0, 1),
        cu_seqlens_q=runs.borders,
        cu_seqlens_k=runs.borders,
        max_seqlen_q=runs.longest,
        max_seqlen_k=runs.longest,
        **options,
    )
    return _output(out_nhd).unflatten(0, q_bthd.shape[:2]).transpose(1, 2)


def _output(returned: Any) -> Tensor:
    """FlashAttention 4 gives its log-sum-exp along, asked for or not; the others the output alone."""
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return output


def _activate(name: str) -> None:
    """Put a flash implementation underneath torch's operators, once per process."""
    if torch_attention.current_flash_attention_impl() != name:
        torch_attention.activate_flash_attention_impl(name)
        logger.warning("torch's flash attention is %s from now on, in the whole process: also for backend sdpa", name)


def _call_varlen_attn(
    q_bhtd: Tensor, k_bksd: Tensor, v_bksd: Tensor, spec: AttentionSpec, visibility: Visibility, options: dict[str, Any]
) -> Tensor:
    """torch's operator for sequences of different lengths; whole rows are sequences of the same length."""
    from torch.nn.attention.varlen import varlen_attn

    assert visibility.in_order
    q_bthd, k_bskd, v_bskd = (x.transpose(1, 2) for x in (q_bhtd, k_bksd, v_bksd))
    if visibility.documents is None:
        queries, keys = (_rows(x.shape[0], x.shape[1], x.device) for x in (q_bthd, k_bskd))
    else:
        queries = keys = document_runs(visibility)
    if spec.heads != spec.kv_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = options | {"enable_gqa": True}  # torch 2.11 takes fewer key/value heads without being told
    out_nhd = varlen_attn(
        q_bthd.flatten(0, 1),
        k_bskd.flatten(0, 1),
        v_bskd.flatten(0, 1),
        queries.borders,
        keys.borders,
        queries.longest,
        keys.longest,
        **options,
    )
    return _output(out_nhd).unflatten(0, q_bthd.shape[:2]).transpose(1, 2)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rows(batch: int, length: int, device: torch.device) -> DocumentRuns:
    """Rows of the same length as runs; kept, so that autograd must be able to save them."""
    return DocumentRuns(torch.arange(batch + 1, device=device, dtype=torch.int32) * length, length)
