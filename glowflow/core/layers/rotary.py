"""Rotary position embedding (RoPE, arXiv:2104.09864): each pair of neighbouring channels turns by position x frequency.

A pair (x[2i], x[2i+1]) is one complex number, so the turn is one complex product: a single pass over memory on the
CPU. Under ``torch.compile`` and in half precision the same product is written with real numbers.

Legend: B batch, T positions, N heads (queries then keys), D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glowflow.config.architectures import RopeScalingConfig
from glowflow.core.differentiation import is_twice_differentiable

__all__ = ["Rotary", "RotaryTables", "frequencies", "rotate", "split_rotate", "temperature"]


@dataclass(frozen=True)
class RotaryTables:
    """Angles of a run of positions. Not a tensor, so that mixed-precision wrappers leave its precision alone."""

    cos: Tensor  # (T, D/2)
    sin: Tensor  # (T, D/2)
    turn: Tensor  # (T, N, D/2) complex, cos + i sin, for every head or (N = 1) for all
    turn_back: Tensor  # (T, N, D/2) complex, cos - i sin

    def slice(self, start: int, stop: int) -> RotaryTables:
        part = slice(start, stop)
        return RotaryTables(self.cos[part], self.sin[part], self.turn[part], self.turn_back[part])


class Rotary:
    """Makes and keeps the tables, per device and precision; no parameters and no buffers, so nothing to restore.

    Args:
        head_dim: width D of a head.
        theta: base of the frequencies.
        num_heads: N, queries and keys together.
        scaling: for contexts longer than in training.
    """

    def __init__(
        self, head_dim: int, theta: float, num_heads: int = 1, scaling: RopeScalingConfig | None = None
    ) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.num_heads = num_heads
        self.scaling = scaling
        self._tables: dict[tuple[torch.device, torch.dtype], RotaryTables] = {}

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTables:
        """Tables of positions 0 .. length-1, in fp32, or fp64 for a model in fp64."""
        real = torch.float64 if dtype == torch.float64 else torch.float32
        kept = self._tables.get((device, real))
        if kept is None or kept.cos.shape[0] < length:
            kept = self._tables[device, real] = self._compute(max(64, 1 << (length - 1).bit_length()), device, real)
        return kept if kept.cos.shape[0] == length else kept.slice(0, length)

    def _compute(self, length: int, device: torch.device, real: torch.dtype) -> RotaryTables:
        # A table that sampling has made must serve training too. In fp64 on the host: angles of late positions keep
        # their precision, and every device has the same table.
        with torch.inference_mode(False), torch.no_grad():
            each = frequencies(self.head_dim, self.theta, self.scaling)
            angles, factor = torch.outer(torch.arange(length, dtype=torch.float64), each), temperature(self.scaling)
            cos, sin = (angles.cos() * factor).to(device, real), (angles.sin() * factor).to(device, real)
            # A broadcast dimension in the middle costs the CPU its long inner loops, other devices nothing.
            repeats = self.num_heads if device.type == "cpu" else 1
            turn = torch.complex(cos, sin).unsqueeze(1).expand(-1, repeats, -1).contiguous()
            return RotaryTables(cos, sin, turn, turn.conj().resolve_conj())

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return Rotary(self.head_dim, self.theta, self.num_heads, self.scaling)


def frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig | None = None) -> Tensor:
    """(D/2,) float64 angles per position: theta^(-2i/D), stretched for a context that is s times longer.

    ``linear``: over s (arXiv:2306.15595). ``ntk``: with the base theta s^(D / (D-2)), so that the slowest is over s
    and the fastest as it was. ``yarn``: what turns over 32 times within the original context stays, what turns less
    than once goes over s, between them linear in the number of turns (arXiv:2309.00071, sections 3.1 to 3.4).
    """
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    each = theta ** -(2 * pair / head_dim)
    if scaling is None:
        return each
    if scaling.method == "linear":
        return each / scaling.factor
    if scaling.method == "ntk":
        return each * scaling.factor ** -(2 * pair / max(head_dim - 2, 1))
    turns = scaling.original_context * each / (2 * math.pi)
    kept = ((turns - _YARN_SLOW) / (_YARN_FAST - _YARN_SLOW)).clamp(0, 1)
    return each * (kept + (1 - kept) / scaling.factor)


_YARN_SLOW, _YARN_FAST = 1.0, 32.0
"""Turns within the original context: alpha and beta of the paper, its values for LLaMA."""


def temperature(scaling: RopeScalingConfig | None) -> float:
    """What ``yarn`` multiplies queries and keys by: 0.1 ln s + 1, so that scores grow by its square, 1/t."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling is not None and scaling.method == "yarn" else 1.0


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn (B, T, N, D) by its positions; computed in the precision of the tables, returned in that of ``x``."""
    pairs = _in_pairs(x.to(tables.cos.dtype))
    even, odd = pairs.unbind(-1)
    cos, sin = tables.cos.unsqueeze(1), tables.sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def split_rotate(qkv: Tensor, heads: int, kv_heads: int, tables: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
    """Cut (B, T, N*D) into queries, keys and values and turn the first two.

    Returns:
        q (B, H, T, D), k (B, K, T, D), v (B, K, T, D).
    """
    if torch.compiler.is_compiling() or qkv.dtype != tables.cos.dtype or is_twice_differentiable():
        q, k, v = _by_head(qkv, heads + 2 * kv_heads).split((heads, kv_heads, kv_heads), dim=2)
        q, k = rotate(q, tables), rotate(k, tables)
    else:
        if torch.is_grad_enabled():
            q, k, v = _SplitRotate.apply(qkv, heads, kv_heads, tables.turn, tables.turn_back)
        else:
            q, k, v = _split_rotated(qkv, heads, kv_heads, tables.turn)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], num_heads, -1)


def _in_pairs(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, 2)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(_in_pairs(x))


def _split_rotated(qkv: Tensor, heads: int, kv_heads: int, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over queries and keys; (B, T, heads, D) each."""
    heads_btnd = _by_head(qkv, heads + 2 * kv_heads)
    turned = torch.view_as_real(_as_complex(heads_btnd[:, :, : heads + kv_heads]) * turn).flatten(-2)
    return turned[:, :, :heads], turned[:, :, heads:], heads_btnd[:, :, heads + kv_heads :]


class _SplitRotate(torch.autograd.Function):
    """``_split_rotated``; backward writes all three gradients into one buffer."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, kv_heads: int, turn: Tensor, turn_back: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads, ctx.kv_heads, ctx.turn_back = heads, kv_heads, turn_back
        return _split_rotated(qkv, heads, kv_heads, turn)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_q, grad_k, grad_v = grads
        heads, kv_heads = ctx.heads, ctx.kv_heads
        batch, length, _, width = grad_q.shape
        grad = grad_q.new_empty(batch, length, heads + 2 * kv_heads, width)
        for part, start, stop in ((grad_q, 0, heads), (grad_k, heads, heads + kv_heads)):
            part = part if part.stride(-1) == 1 else part.contiguous()
            turn_back = ctx.turn_back[:, start:stop] if ctx.turn_back.shape[1] > 1 else ctx.turn_back
            torch.mul(_as_complex(part), turn_back, out=_as_complex(grad[:, :, start:stop]))
        grad[:, :, heads + kv_heads :] = grad_v
        return grad.flatten(-2), None, None, None, None
