"""S_{n+1} = A_n S_n + U_n over n, with numbers or matrices A_n: what is sequential in chunk-parallel linear attention.

The gradient is the same recurrence from the other end, so forward and backward are one loop that writes in place,
and the function can be differentiated any number of times.

Legend: B batch, H heads, N steps, K x V the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["scan"]


def scan(factor: Tensor, update_bhnkv: Tensor, first_bhkv: Tensor) -> Tensor:
    """All states of the recurrence.

    Args:
        factor: (B, H, N, 1, 1) numbers or (B, H, N, K, K) matrices A_n.
        update_bhnkv: U_n.
        first_bhkv: S_0.

    Returns:
        (B, H, N + 1, K, V): S_0 .. S_N.
    """
    states: Tensor = _Scan.apply(factor, update_bhnkv, first_bhkv, False)
    return states


class _Scan(torch.autograd.Function):
    """To the right S_{n+1} = A_n S_n + U_n from S_0; to the left S_n = A_n S_{n+1} + U_n from S_N."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, update: Tensor, first: Tensor, leftwards: bool) -> Tensor:
        states = _loop(factor, update, first, leftwards)
        ctx.save_for_backward(factor, states)
        ctx.leftwards = leftwards
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        factor, states = ctx.saved_tensors
        steps = factor.shape[2]
        from_later, later = (slice(1, None), 0) if ctx.leftwards else (slice(0, steps), steps)
        total = _Scan.apply(factor.transpose(-2, -1), grad[:, :, from_later], grad[:, :, later], not ctx.leftwards)
        # A step's input is the state before it, its output the one after it, in the direction of the loop.
        before, after = (slice(1, None), slice(0, steps)) if ctx.leftwards else (slice(0, steps), slice(1, None))
        grad_update = total[:, :, after]
        grad_factor = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad.device.type, enabled=False):
                grad_factor = _factor_gradient(factor, grad_update, states[:, :, before])
        return grad_factor, grad_update, total[:, :, steps if ctx.leftwards else 0], None


def _factor_gradient(factor: Tensor, grad_update: Tensor, before: Tensor) -> Tensor:
    if factor.shape[-1] == 1:
        return (grad_update * before).sum((-2, -1), keepdim=True)
    return grad_update @ before.transpose(-2, -1)


def _loop(factor: Tensor, update: Tensor, first: Tensor, leftwards: bool) -> Tensor:
    batch, heads, steps, rows, columns = update.shape
    states = update.new_empty(batch, heads, steps + 1, rows, columns)
    states[:, :, steps if leftwards else 0] = first
    flat, update, factor = states.flatten(0, 1), update.flatten(0, 1), factor.flatten(0, 1)
    with torch.autocast(update.device.type, enabled=False):
        for n in reversed(range(steps)) if leftwards else range(steps):
            source, target = (n + 1, n) if leftwards else (n, n + 1)
            if factor.shape[-1] == 1:
                torch.addcmul(update[:, n], factor[:, n], flat[:, source], out=flat[:, target])
            else:
                torch.baddbmm(update[:, n], factor[:, n], flat[:, source], out=flat[:, target])
    return states
