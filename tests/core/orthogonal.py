"""The zeroth power by another way than the optimiser's: what Newton-Schulz does to each singular value."""

from __future__ import annotations

import torch
from torch import Tensor


def by_svd(x: Tensor, steps: int = 5) -> Tensor:
    """U p(S / |S|) V^T of one matrix, in fp64: s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, so many times over."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return ((u * s) @ vh).to(x.dtype)
