"""torch's FlexAttention (arXiv:2412.05496): any rule of a spec as a mask function, compiled into one kernel.

The rule becomes a ``BlockMask``, which says block by block of 128 x 128 what need not be computed; caps and ALiBi
become a function of the scores. Kernel and mask builder are compiled once per process, anew for each length.

Legend: B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.backends.fused import HALF, capability_reason, slopes_on
from glowflow.core.attention.masks import Visibility, visible
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["FlexBackend", "mask_function", "score_function"]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_VARIANTS = 128
"""Kinds, lengths and types that one process may compile; torch's own limit of 8 is soon met by layers of two kinds."""


class FlexBackend:
    """FlexAttention; on the CPU uncompiled, for inference alone."""

    name = "flex"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = common_reasons(spec, conditions, ("dense", "windowed", "sparse"))
        if conditions.device_type == "cuda":
            reasons += self._cuda_reasons(spec, conditions)
        elif conditions.device_type != "cpu":
            reasons.append(f"runs on CUDA and on the CPU, not on {conditions.device_type}")
        elif conditions.training:
            reasons.append("cannot train on the CPU: torch has no backward pass for it there")
        if spec.dropout:
            reasons.append("cannot drop attention weights (dropout)")
        if conditions.decoding:
            reasons.append("would be compiled anew for each length of a cache")
        if conditions.second_order:
            reasons.append("its kernels have no second derivative")
        return reasons

    @staticmethod
    def _cuda_reasons(spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = capability_reason(conditions, "8.0 or later", lambda it: it >= (8, 0))
        if conditions.dtype.is_floating_point and conditions.dtype not in (*HALF, torch.float32):
            reasons.append(f"needs float16, bfloat16 or float32 on CUDA, not {conditions.dtype}")
        if spec.head_dim < 16:
            reasons.append(f"needs heads of at least 16 channels on CUDA, not {spec.head_dim}")
        if importlib.util.find_spec("triton") is None:
            reasons.append("the package triton is not installed, into which torch compiles it")
        return reasons

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        if conditions.device_type == "cpu":
            return "FlexAttention, uncompiled on the CPU: materialises the attention weights"
        return "FlexAttention, compiled at the first step and for each new length"

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        assert visibility.in_order
        compiled = q.device.type == "cuda"
        out: Tensor = _kernel(compiled)(
            q,
            k,
            v,
            score_mod=score_function(spec, visibility, torch.float64 if q.dtype == torch.float64 else torch.float32),
            block_mask=_block_mask(spec, visibility, q.shape[0], compiled),
            scale=spec.softmax_scale,
            enable_gqa=spec.heads != spec.kv_heads,
        )
        return out


@lru_cache(maxsize=2)
def _kernel(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    _raise_variants()
    # With fullgraph a kernel that cannot be compiled is an error; without it torch would run the unfused one instead.
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=False, fullgraph=True) if compiled else kernel


@lru_cache(maxsize=2)
def _mask_builder(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    # Uncompiled it would write out all T x S pairs before it looks at blocks.
    return torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask


def _raise_variants() -> None:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)


def _block_mask(spec: AttentionSpec, visibility: Visibility, batch: int, compiled: bool) -> Any:
    """The BlockMask of a spec: kept for good where only lengths count, else for the pass; None: everything is seen."""
    rule = AttentionSpec(spec.kind, spec.causal, window=spec.window, sinks=spec.sinks, sparse=spec.sparse)
    if visibility.everywhere:
        lengths = visibility.num_queries, visibility.num_keys
        free = rule.kind == "dense" and not rule.causal
        return None if free else _lasting_mask(rule, *lengths, visibility.device, compiled)
    return visibility.kept(("flex", rule), lambda: _build(rule, visibility, batch, compiled))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _lasting_mask(rule: AttentionSpec, num_queries: int, num_keys: int, device: torch.device, compiled: bool) -> Any:
    return _build(rule, Visibility(num_queries, num_keys, device), None, compiled)


def _build(rule: AttentionSpec, visibility: Visibility, batch: int | None, compiled: bool) -> Any:
    lengths = visibility.num_queries, visibility.num_keys
    return _mask_builder(compiled)(mask_function(rule, visibility), batch, None, *lengths, device=visibility.device)


def mask_function(spec: AttentionSpec, visibility: Visibility) -> MaskFunction:
    """(batch, head, query, key) indices -> bool: the rule of the spec, documents and padding.

    Holds the tensors of the visibility, not the visibility.
    """
    shift = visibility.num_keys - visibility.num_queries  # the queries are the last of the keys
    rule = _rule(spec, visibility)
    documents_bs, valid_bs = visibility.documents, visibility.key_valid

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = rule(query + shift, key)
        if documents_bs is not None:
            seen = seen & (documents_bs[batch, query + shift] == documents_bs[batch, key])
        if valid_bs is not None:
            seen = seen & valid_bs[batch, key]
        return seen

    return allowed


def _rule(spec: AttentionSpec, visibility: Visibility) -> Callable[[Tensor, Tensor], Tensor]:
    """``visible``; of given blocks as a table over blocks, since a compiled function must not make tensors."""
    if spec.sparse is None or spec.sparse.pattern != "blocks":
        return lambda query, key: visible(spec, query, key)
    size, causal = spec.sparse.block_size, spec.causal
    first = torch.arange(-(-visibility.num_keys // size), device=visibility.device) * size
    table_nn = visible(replace(spec, causal=False), first[:, None], first[None, :])

    def rule(query: Tensor, key: Tensor) -> Tensor:
        seen = table_nn[query // size, key // size]
        return seen & (query >= key) if causal else seen

    return rule


def score_function(spec: AttentionSpec, visibility: Visibility, dtype: torch.dtype) -> ScoreFunction | None:
    """Cap, then ALiBi, on a scaled score; None where neither is asked for. The same object for the same arguments, so
    that nothing is compiled twice."""
    if spec.softcap is None and not spec.alibi:
        return None
    heads = spec.heads if spec.alibi else 0
    shift = visibility.num_keys - visibility.num_queries
    return _score_function(spec.softcap, heads, shift, visibility.device, dtype)


@lru_cache(maxsize=64)
def _score_function(
    softcap: float | None, alibi_heads: int, shift: int, device: torch.device, dtype: torch.dtype
) -> ScoreFunction:
    slopes_h = slopes_on(alibi_heads, device, dtype) if alibi_heads else None

    def changed(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_h is not None:
            score = score - slopes_h[head] * (query + shift - key).abs()
        return score

    return changed
