"""SwiGLU feed-forward (arXiv:2002.05202): ``down(silu(gate(x)) * up(x))``, gate and up as one matrix.

Legend: B batch, T positions, D width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SwiGLU", "swiglu"]


class SwiGLU(nn.Module):
    """Feed-forward with a gated hidden layer; ``gate_up.weight`` is (2F, D), the gate's rows first."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(swiglu(self.gate_up(x)))
        return output


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of (..., 2F) -> (..., F)."""
    if torch.compiler.is_compiling() or gate_up.device.type != "cpu":
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    hidden: Tensor = _SwiGLU.apply(gate_up)
    return hidden


class _SwiGLU(torch.autograd.Function):
    """Eager CPU: both halves of the gradient go straight into one buffer, with no concatenation."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.mul(grad, activated, out=grad_up)
        return grad_gate_up
