"""What attention costs in floating-point operations, from the spec alone: nothing is run and no mask is made.

Two counts of the same rule. ``attention_flops`` is the convention of model FLOPs (PaLM, arXiv:2204.02311, appendix B):
per token, forward and backward, as if causality halved nothing, so that utilisations can be compared. ``run_flops`` is
what a kernel cannot do without: the pairs that are seen, each once; divided by a measured time it is a speed.
FlopCounterMode agrees where it can see; it counts nothing for fused kernels on a CPU.

Legend: T queries, S keys, H heads, D head width, C chunk of linear attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glowflow.core.attention.spec import AttentionSpec, SparsePattern

__all__ = ["attention_flops", "keys_per_query", "run_flops"]

_Count = Callable[[Tensor], Tensor]
_BACKWARD = 2  # each product of the forward pass has two in the backward pass


def attention_flops(spec: AttentionSpec, context: int) -> float:
    """Forward and backward of one layer per token, projections aside, by the convention of PaLM.

    12 H D times the keys that count: T for dense attention (no causal halving), min(window + sinks, T) for a window;
    a sparse pattern's mean over the queries, the part below the diagonal counted twice as if it were mirrored above.
    Linear attention does not depend on the context beyond one chunk.

    Args:
        spec: one layer's computation.
        context: T, positions of a sequence.
    """
    train = 1 + _BACKWARD
    if spec.kind == "linear":
        return float(train * _linear_flops(spec, context))
    return train * 4.0 * spec.heads * spec.head_dim * _counted_keys(spec, context)


def _counted_keys(spec: AttentionSpec, context: int) -> float:
    if spec.kind == "dense":
        return context
    if spec.kind == "windowed":
        assert spec.window is not None
        return min((spec.window if spec.causal else 2 * spec.window - 1) + spec.sinks, context)
    pairs = int(keys_per_query(spec, context, context).sum())
    return (2 * pairs - context if spec.causal else pairs) / context


def run_flops(spec: AttentionSpec, num_queries: int, num_keys: int, *, backward: bool = False) -> float:
    """One pass over one sequence, projections aside: 4 D H per visible pair, and twice that again for gradients.

    What a kernel computes anew in its backward pass, and masked pairs that it computes for nothing, do not count.

    Args:
        num_queries, num_keys: T and S; the queries are the last T of the S positions.
        backward: forward and backward instead of forward alone.
    """
    passes = 1 + (_BACKWARD if backward else 0)
    if spec.kind == "linear":
        return float(passes * num_queries * _linear_flops(spec, num_queries))
    pairs = int(keys_per_query(spec, num_queries, num_keys).sum())
    return passes * 4.0 * spec.heads * spec.head_dim * pairs


def _linear_flops(spec: AttentionSpec, context: int) -> int:
    """Forward of one token: within the chunk 2 C (Dk + Dv), to and from the state 4 Dk Dv; keys and values are D wide.

    The delta rule (arXiv:2412.06464) has the products of the keys among themselves, a triangular solve for keys and
    values, and what the state knows already. A bidirectional layer runs both ways.
    """
    assert spec.linear is not None
    chunk, width = min(spec.linear.chunk, context), spec.head_dim
    count = 4 * chunk * width + 4 * width * width
    if spec.linear.variant == "gated_delta":
        count += 2 * chunk * width + chunk * (width + width) + 2 * width * width
    return spec.heads * count * (1 if spec.causal else 2)


def keys_per_query(spec: AttentionSpec, num_queries: int, num_keys: int) -> Tensor:
    """(T,) int64: how many keys each query sees by the spec's own rule; equal to the row sums of ``visible``.

    Takes time and memory of T, not of T times S. Documents and padding are not the spec's matter.

    Raises:
        ValueError: kind ``linear``, which has no pairs.
    """
    query_t = torch.arange(num_keys - num_queries, num_keys)
    if spec.kind == "linear":
        raise ValueError("linear attention has no pairs of queries and keys")
    if spec.kind == "dense":
        return _near(query_t, num_keys, num_keys, spec.causal)
    if spec.kind == "windowed":
        assert spec.window is not None
        first = min(spec.sinks, num_keys)
        far = _far(query_t, num_keys, spec.window, spec.causal, lambda end_t: end_t.clamp(max=first))
        return _near(query_t, num_keys, spec.window, spec.causal) + far
    assert spec.sparse is not None
    return _sparse_keys(spec.sparse, query_t, num_keys, spec.causal)


def _near(query_t: Tensor, num_keys: int, width: int, causal: bool) -> Tensor:
    """Keys at a distance below ``width``."""
    past_t = (query_t + 1).clamp(max=width)
    return past_t if causal else past_t + (num_keys - 1 - query_t).clamp(max=width - 1)


def _far(query_t: Tensor, num_keys: int, width: int, causal: bool, count: _Count) -> Tensor:
    """Keys at a distance of ``width`` or more that lie in a set; ``count(n)``: how many of it are below n."""
    past_t = count((query_t - width + 1).clamp(min=0))
    if causal:
        return past_t
    end_t = torch.full_like(query_t, num_keys)
    return past_t + count(end_t) - count((query_t + width).clamp(max=num_keys))


def _sparse_keys(sparse: SparsePattern, query_t: Tensor, num_keys: int, causal: bool) -> Tensor:
    if sparse.pattern == "blocks":
        return _block_keys(sparse, query_t, num_keys, causal)
    near_t = _near(query_t, num_keys, sparse.local, causal)
    if sparse.pattern == "strided":
        # Multiples of the stride among the distances from `local` to the ends of the sequence.
        reaches = [query_t] if causal else [query_t, num_keys - 1 - query_t]
        skipped = (sparse.local - 1) // sparse.stride
        return near_t + sum((reach_t // sparse.stride - skipped).clamp(min=0) for reach_t in reaches)
    if sparse.pattern == "fixed":
        return near_t + _far(query_t, num_keys, sparse.local, causal, lambda end_t: end_t // sparse.stride)
    first = min(sparse.global_tokens, num_keys)
    total_t = near_t + _far(query_t, num_keys, sparse.local, causal, lambda end_t: end_t.clamp(max=first))
    return total_t if causal else torch.where(query_t < first, num_keys, total_t)


def _block_keys(sparse: SparsePattern, query_t: Tensor, num_keys: int, causal: bool) -> Tensor:
    """Sum over the columns of the table, shifted for the rows beyond it, of what lies of each before the end."""
    size, width = len(sparse.blocks), sparse.block_size
    row_t = query_t // width
    shift_t = (row_t - (size - 1)).clamp(min=0)
    end_t = query_t + 1 if causal else torch.full_like(query_t, num_keys)
    table = torch.tensor(sparse.blocks, dtype=torch.bool)[row_t.clamp(max=size - 1)]  # (T, columns)
    total_t = torch.zeros_like(query_t)
    for column in range(size):
        total_t += table[:, column] * (end_t - (column + shift_t) * width).clamp(0, width)
    return total_t
