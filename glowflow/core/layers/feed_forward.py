"""The feed-forward of a block: ``down(act(gate(x)) * up(x))`` (arXiv:2002.05202), or plain ``down(act(up(x)))``.

Gate and up are one matrix, and on the CPU their gradient goes straight into one buffer, with no concatenation.

Legend: B batch, T positions, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.differentiation import is_twice_differentiable
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["ACTIVATIONS", "Activation", "GatedFeedForward", "PlainFeedForward", "build_feed_forward", "gated"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A pointwise function, and its gradient written into a given buffer (which may be the incoming gradient's)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], object]  # (gradient of the value, input, where it goes)


_SILU = Activation(F.silu, lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out))
_GELU = Activation(F.gelu, lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out))
_GELU_TANH = Activation(
    partial(F.gelu, approximate="tanh"),
    lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out),
)
_RELU = Activation(F.relu, lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out))

ACTIVATIONS = {
    "swiglu": _SILU,
    "geglu": _GELU,
    "reglu": _RELU,
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "relu": _RELU,
}
"""``model.ffn`` -> the function of its gate or, in a plain one, of its hidden layer; ``gelu`` is the exact one."""


class GatedFeedForward(nn.Module):
    """Feed-forward with a gated hidden layer; ``gate_up.weight`` is (2F, D), the gate's rows first."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = StackedLinear(dim, (hidden_dim, hidden_dim), bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        output: Tensor = self.down(gated(self.gate_up(x), self.activation))
        return output


class PlainFeedForward(nn.Module):
    """Feed-forward with one hidden layer; ``up.weight`` is (F, D)."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        output: Tensor = self.down(self.activation.value(self.up(x)))
        return output


def build_feed_forward(dim: int, hidden_dim: int, ffn: str, bias: bool = False) -> nn.Module:
    """The feed-forward that ``model.ffn`` names.

    Args:
        dim: width D.
        hidden_dim: hidden width F.
        ffn: ``swiglu``, ``geglu``, ``reglu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        bias: both projections have one.
    """
    sort = GatedFeedForward if ffn.endswith("glu") else PlainFeedForward
    return sort(dim, hidden_dim, ACTIVATIONS[ffn], bias)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """``act(gate) * up`` of (..., 2F) -> (..., F)."""
    by_hand = gate_up.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not by_hand or is_twice_differentiable():
        gate, up = gate_up.chunk(2, dim=-1)
        return activation.value(gate) * up
    hidden: Tensor = _Gated.apply(gate_up, activation)
    return hidden


class _Gated(torch.autograd.Function):
    """Eager CPU: both halves of the gradient are written where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = activation.value(gate)
        ctx.activation = activation
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        ctx.activation.gradient(grad_gate, gate, grad_gate)
        torch.mul(grad, activated, out=grad_up)
        return grad_gate_up, None
