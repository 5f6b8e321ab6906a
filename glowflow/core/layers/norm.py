"""RMSNorm (arXiv:1910.07467) with a backward pass written by hand for eager CPU code, and LayerNorm.

Of RMSNorm torch has fused kernels for CUDA only; composed from single operations it costs ten passes over the
activations. LayerNorm (arXiv:1607.06450) is fused everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.differentiation import is_twice_differentiable

__all__ = ["LayerNorm", "RMSNorm", "build_norm", "rms_norm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(nn.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension; the bias may be left out."""

    def __init__(self, dim: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.dim,), self.weight.to(x.dtype), bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}"


def build_norm(norm: str, dim: int, eps: float, bias: bool) -> nn.Module:
    """The norm that ``model.norm`` names: ``rmsnorm``, which has no bias, or ``layernorm``."""
    return LayerNorm(dim, eps, bias) if norm == "layernorm" else RMSNorm(dim, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of (..., D) with weight (D,); half precision is computed in fp32 inside torch's kernel."""
    if not torch.compiler.is_compiling() and is_twice_differentiable():
        precise = x.to(weight.dtype)
        return (precise * (precise.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)
    full_precision = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not full_precision:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if not torch.is_grad_enabled():  # a single token costs less than the way through autograd
        return _normed(x, weight, eps)[0]
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised input, and 1/rms(x)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight), r


class _RMSNorm(torch.autograd.Function):
    """With r = 1/rms(x): dx = r (g w) - x r^3/D sum(g w x), dw = sum over positions of g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r, torch.zeros_like(r))
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r, zero = ctx.saved_tensors
        # LayerNorm's fused kernel, told that the mean is 0, gives dx - r mean(g w) in one pass, and dw.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, zero, r, weight, None, (True, True, False)
        )
        with torch.autocast("cpu", enabled=False):  # which would round the product to half precision
            mean = torch.mv(grad.reshape(-1, x.shape[-1]), weight).view_as(r)
        return grad_x.addcmul_(r, mean, value=1 / x.shape[-1]), grad_weight, None
