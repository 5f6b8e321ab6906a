"""Adapter to the Triton kernels of flash-linear-attention (package ``fla-core``), for CUDA.

``chunk_simple_gla`` is a causal pass with or without a decay per head and position, ``chunk_gated_delta_rule`` with the
delta rule; both take (B, T, H, D) and the state as (B, H, K, V). Documents are sequences of different length there:
the batch is laid out as one row, and the borders of the runs are its ``cu_seqlens``.

Legend: B batch, H heads, T positions, K width of keys, V width of values, R runs in the whole batch.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.packages import import_reasons, package_reasons
from glowflow.core.attention.linear.base import LinearInputs, linear_reasons
from glowflow.core.attention.linear.passes import Stream, accumulation_dtype, compute
from glowflow.core.attention.linear.recurrent import recurrent_pass
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["FlaBackend", "fla_pass"]

_OLDEST = "0.4"  # the first whose functions take (B, T, H, D) alone
_WIDEST_HEAD = 256
_FAMILIES = ("simple_gla", "gated_delta_rule")


class FlaBackend:
    """flash-linear-attention."""

    name = "fla"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        reasons = linear_reasons(spec, conditions)
        if conditions.device_type != "cuda":
            reasons.append(f"its Triton kernels run on CUDA alone, not on {conditions.device_type}")
        if conditions.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(f"computes in fp16, bf16 or fp32, not in {conditions.dtype}")
        if spec.head_dim > _WIDEST_HEAD:
            reasons.append(f"takes heads of at most {_WIDEST_HEAD} channels, not {spec.head_dim}")
        if conditions.second_order:
            reasons.append("its kernels have no second derivative")
        reasons += package_reasons("fla-core", _OLDEST)
        if not reasons:
            reasons += [why for family in _FAMILIES for why in import_reasons(f"fla.ops.{family}")]
        return reasons

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        delta = spec.linear is not None and spec.linear.variant == "gated_delta"
        kernel = "chunk_gated_delta_rule" if delta else "chunk_simple_gla"
        return f"flash-linear-attention, {kernel}"

    def run(self, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        single = inputs.q.shape[2] == 1
        with torch.autocast(inputs.q.device.type, enabled=False):
            return compute(recurrent_pass if single else fla_pass, inputs, spec, state)


def fla_pass(stream: Stream, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``CausalPass``."""
    full, dtype = accumulation_dtype(stream.v), stream.v.dtype
    batch, heads, length, _ = stream.q.shape
    first = None if state is None else state.to(full)
    given: dict[str, Any] = {
        "q": _by_position(stream.q.to(dtype)),
        "k": _by_position(stream.k.to(dtype)),
        "v": _by_position(stream.v),
    }
    if stream.decay is not None:
        given["g"] = _by_position(stream.decay.to(full).expand(batch, -1, -1))
    if stream.beta is not None:
        given["beta"] = _by_position(stream.beta.to(dtype))
    simple, delta = _FAMILIES
    kernel = _kernel(simple if stream.beta is None else delta)
    run = partial(kernel, scale=1.0, output_final_state=True)  # q is scaled already
    if stream.runs is None:
        y_bthv, last = run(**given, initial_state=first)
        return y_bthv.transpose(1, 2), last
    borders, row_start, row_end = _borders(stream.runs)
    entering = None
    if first is not None:
        entering = first.new_zeros(len(borders) - 1, *first.shape[1:]).index_copy(0, row_start, first)
    flat = {name: x.flatten(0, 1).unsqueeze(0) for name, x in given.items()}
    y, last = run(**flat, initial_state=entering, cu_seqlens=borders)
    return y.view(batch, length, heads, -1).transpose(1, 2), last[row_end]


def _by_position(x: Tensor) -> Tensor:
    """(B, H, T, ...) -> (B, T, H, ...) in one piece."""
    return x.transpose(1, 2).contiguous()


def _borders(runs_bt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R + 1,) int64 borders of the runs of all rows in one row; (B,) each row's first run; (B,) its last."""
    starts_bt = torch.ones_like(runs_bt, dtype=torch.bool)
    starts_bt[:, 1:] = runs_bt[:, 1:] != runs_bt[:, :-1]
    positions = starts_bt.flatten().nonzero().flatten()
    borders = torch.cat((positions, positions.new_tensor([runs_bt.numel()])))
    last = starts_bt.sum(1).cumsum(0) - 1
    return borders, torch.cat((last.new_zeros(1), last[:-1] + 1)), last


def _kernel(family: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{family}"), f"chunk_{family}")
