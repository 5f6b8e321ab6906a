"""Linear attention in chunks of C positions: matrix products inside a chunk, a short recurrence from chunk to chunk.

With b_i the sum of the log-decays from the start of a chunk to position i (so that every exponent is <= 0), S the state
that enters it and G_ij = exp(b_i - b_j) for j <= i:

    gated, retention, feature_map    O = (Q K^T * G) V + (Q e^b) S,    S' = e^{b_C} S + (K e^{b_C - b})^T V

The delta rule (arXiv:2406.06484, 2412.06464) subtracts from each value what the state recalls; with
A = strictly lower part of diag(beta) (K K^T * G), [U, W] = (I + A)^-1 diag(beta) [V, K e^b], the same holds for
V - ... = U - W S in place of V, and S' is an affine function of S: (e^{b_C} I - (K e^{b_C - b})^T W) S + ...

Everything but S -> S' runs for all chunks at once. Documents are masks: no pair across a border, nothing of the state
after one.

Legend: B batch, H heads, N chunks, C positions of a chunk, K width of keys, V width of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.linear.base import LinearInputs, linear_reasons
from glowflow.core.attention.linear.passes import Stream, accumulation_dtype, compute
from glowflow.core.attention.linear.recurrent import recurrent_pass
from glowflow.core.attention.linear.scan import scan
from glowflow.core.attention.linear.within import pair_weights, within_chunks
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["ChunkBackend", "chunked_pass"]

_CACHED_BYTES = 2**20  # of weights between positions, the largest of a dozen tensors that are alive at a time
_FEWEST_CHUNKS = 16  # shorter segments cost more in calls and copies than the cache saves


class ChunkBackend:
    """Chunk-parallel, in plain torch operations: any device, any order of derivatives."""

    name = "chunk"

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        return linear_reasons(spec, conditions)

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        size = spec.linear.chunk if spec.linear else 0
        return f"torch, chunks of {size} positions in parallel, in {_precision(conditions.dtype)}"

    def run(self, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert spec.linear is not None
        single = inputs.q.shape[2] == 1  # the recurrence itself is the cheapest way to take one step
        with torch.autocast(inputs.q.device.type, enabled=False):
            causal_pass = recurrent_pass if single else partial(chunked_pass, chunk=spec.linear.chunk)
            return compute(causal_pass, inputs, spec, state)


def _precision(dtype: torch.dtype) -> str:
    return "fp64" if dtype == torch.float64 else "fp32"


@dataclass
class _Weights:
    """How much flows between the positions of a chunk, into it and out of it."""

    total: Tensor | None  # (B or 1, H, N, C) log-decays up to each position; None: nothing decays
    visible: Tensor  # (C, C) or (B, 1, N, C, C) which keys j a query i sees
    inflow: Tensor | None  # (B or 1, H or 1, N, C, 1) from the entering state to position i; None: all of it
    outflow: Tensor | None  # (B or 1, H or 1, N, C, 1) from position j to the leaving state; None: all of it
    through: Tensor  # (B or 1, H or 1, N, 1, 1) from the entering to the leaving state


def chunked_pass(stream: Stream, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """See ``CausalPass``."""
    segments = stream.split(_segment(stream, chunk))
    if len(segments) == 1:
        return _segment_pass(stream, state, chunk, None)
    outputs, run = [], None
    for segment in segments:
        y_bhtv, state = _segment_pass(segment, state, chunk, run)
        outputs.append(y_bhtv)
        run = None if segment.runs is None else segment.runs[:, -1:]
    assert state is not None
    return torch.cat(outputs, dim=2), state


def _segment(stream: Stream, chunk: int) -> int:
    """Positions to compute at a time: on CPUs as many as stay in the cache from one operation to the next."""
    batch, heads, length = stream.q.shape[:3]
    if stream.q.device.type != "cpu":
        return length
    chunks = _CACHED_BYTES // (batch * heads * chunk**2 * accumulation_dtype(stream.q).itemsize)
    return max(_FEWEST_CHUNKS, chunks) * chunk


def _segment_pass(stream: Stream, state: Tensor | None, chunk: int, run: Tensor | None) -> tuple[Tensor, Tensor]:
    """``chunked_pass`` for all chunks at once; ``run`` (B, 1) is the run of the position before, if there is one."""
    full, length = accumulation_dtype(stream.q), stream.q.shape[2]
    size = min(chunk, length)
    q, k, v = (_chunks(x.to(full), size, 2) for x in (stream.q, stream.k, stream.v))
    decay = None if stream.decay is None else _chunks(stream.decay.to(full), size, 2)
    runs = None if stream.runs is None else _chunks(stream.runs, size, 1, repeat_last=True)
    weights = _weights(decay, runs, run, q)
    first = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state.to(full)
    if stream.beta is None:
        v, states = v, _add(k, v, weights, first)
    else:
        v, states = _correct(k, v, _chunks(stream.beta.to(full), size, 2), weights, first)
    y_bhncv = within_chunks(q, k, v, weights.total, weights.visible) + _times(q, weights.inflow) @ states[:, :, :-1]
    # A copy: a view, kept as a decoding state, would keep the states of all chunks.
    return y_bhncv.flatten(2, 3)[:, :, :length], states[:, :, -1].clone()


def _add(k: Tensor, v: Tensor, weights: _Weights, first: Tensor) -> Tensor:
    """The states before each chunk and after the last, when every chunk adds its keys and values."""
    update = _times(k, weights.outflow).transpose(-2, -1) @ v
    return scan(weights.through.expand(*update.shape[:3], 1, 1), update, first)


def _correct(k: Tensor, v: Tensor, beta_bhnc: Tensor, weights: _Weights, first: Tensor) -> tuple[Tensor, Tensor]:
    """Delta rule: values less what was recalled, and the states as in ``_add``."""
    beta = beta_bhnc.unsqueeze(-1)
    pairs = pair_weights(weights.total, weights.visible, k.dtype)
    overlap = (beta * (k @ k.transpose(-2, -1)) * pairs).tril(-1)
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    right = beta * torch.cat((v, _times(k, weights.inflow)), dim=-1)
    solved = torch.linalg.solve_triangular(identity + overlap, right, upper=False, unitriangular=True)
    own, recall = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    written = _times(k, weights.outflow).transpose(-2, -1)
    keep = weights.through * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    states = scan(keep - written @ recall, written @ own, first)
    return own - recall @ states[:, :, :-1], states


def _weights(decay_bhnc: Tensor | None, runs_bnc: Tensor | None, run_b1: Tensor | None, like: Tensor) -> _Weights:
    size = like.shape[-2]
    visible = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    enters = leaves = passes = None
    if runs_bnc is not None:
        # A state that nothing here has made is of the first position's document.
        run_b1 = runs_bnc[:, 0, :1] if run_b1 is None else run_b1
        before = torch.cat((run_b1, runs_bnc[:, :-1, -1]), dim=1)[:, None, :, None]
        runs_b1nc, last = runs_bnc[:, None], runs_bnc[:, None, :, -1:]
        visible = visible & (runs_b1nc[..., :, None] == runs_b1nc[..., None, :])
        enters, leaves, passes = runs_b1nc == before, runs_b1nc == last, before == last
    if decay_bhnc is None:
        ones = like.new_ones(1, 1, like.shape[2], 1)
        through = ones if passes is None else passes.to(like.dtype)
        return _Weights(None, visible, _column(enters, like), _column(leaves, like), through.unsqueeze(-1))
    total = _sums(decay_bhnc, visible)
    inflow, through, out_exponents = total.exp(), total[..., -1:].exp(), total[..., -1:] - total
    if enters is not None and leaves is not None and passes is not None:
        inflow, through = inflow * enters, through * passes
        out_exponents = out_exponents.masked_fill(~leaves, float("-inf"))
    outflow = out_exponents.exp()
    return _Weights(total, visible, inflow.unsqueeze(-1), outflow.unsqueeze(-1), through.unsqueeze(-1))


def _sums(decay_bhnc: Tensor, visible: Tensor) -> Tensor:
    """Log-decays summed from the start of the chunk, or of the document in it, to each position."""
    if visible.ndim == 2:
        return decay_bhnc.cumsum(-1)
    # Differences of sums over all documents would hold the rounding of earlier ones, and so would the gradients.
    same_bncc = visible[:, 0].to(decay_bhnc.dtype)
    return (same_bncc @ decay_bhnc.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _column(flags: Tensor | None, like: Tensor) -> Tensor | None:
    return None if flags is None else flags.to(like.dtype).unsqueeze(-1)


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _chunks(x: Tensor, size: int, dim: int, repeat_last: bool = False) -> Tensor:
    """Cut a dimension into (N, C); a ragged end gets zeros, which leave the state alone, or repeats its last value."""
    missing = -x.shape[dim] % size
    if missing:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        shape = [*last.shape[:dim], missing, *last.shape[dim + 1 :]]
        x = torch.cat((x, last.expand(shape) if repeat_last else x.new_zeros(shape)), dim=dim)
    return x.unflatten(dim, (-1, size))
