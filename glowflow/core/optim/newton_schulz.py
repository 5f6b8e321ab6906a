"""The zeroth power of matrices, U V^T of U S V^T, about: five Newton-Schulz steps (Jordan, Muon, 2024).

    X <- X / |X|_F,  then  X <- a X + (b A + c A^2) X  with A = X X^T

Every singular value s becomes a s + b s^3 + c s^5 in each step. The coefficients make small ones grow fastest, at the
price that all but the smallest end between 0.7 and 1.2 or so and not at 1, which training does not feel.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COEFFICIENTS", "working_dtype", "zeropower"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

_SMALLEST = 1e-7  # norm; a matrix of zeros stays one


def working_dtype(tensor: Tensor) -> torch.dtype:
    """In what the steps are computed: bf16 on a GPU, fp32 on a CPU, whose bf16 products are slow; fp64 stays."""
    if tensor.dtype == torch.float64:
        return torch.float64
    return torch.float32 if tensor.device.type == "cpu" else torch.bfloat16


def zeropower(x: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise each matrix of a batch, in the batch's own type.

    Args:
        x: (..., rows, cols); where there are more rows than columns the transpose is worked on.
        steps: number of Newton-Schulz steps.

    Returns:
        (..., rows, cols), whose singular values are near 1.
    """
    if x.shape[-2] > x.shape[-1]:
        return zeropower(x.mT, steps).mT.contiguous()
    a, b, c = COEFFICIENTS
    x_nrc = x.reshape(-1, *x.shape[-2:])
    x_nrc = x_nrc / torch.linalg.vector_norm(x_nrc, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST)
    for _ in range(steps):
        a_nrr = torch.bmm(x_nrc, x_nrc.mT)
        a_nrr = torch.baddbmm(a_nrr, a_nrr, a_nrr, beta=b, alpha=c)
        x_nrc = torch.baddbmm(x_nrc, a_nrr, x_nrc, beta=a)
    return x_nrc.reshape(x.shape)
