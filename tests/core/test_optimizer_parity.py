"""Our optimisers against other people's: fifty steps on drawn gradients, in fp32 and fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from glowflow.core.optim.adan import Adan
from glowflow.core.optim.lion import Lion

Make = Callable[..., torch.optim.Optimizer]


def lion(params: Any, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = pytest.importorskip("lion_pytorch").Lion(params, **options)
    return made


def adan(params: Any, proximal: bool, **options: Any) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    made: torch.optim.Optimizer = package.Adan(params, weight_decouple=not proximal, foreach=False, **options)
    return made


CASES: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "lion": (Lion, lion, {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.3}),
    "adan": (Adan, adan, {"lr": 0.01, "weight_decay": 0.3, "proximal": True}),
    "adan, AdamW's decay": (
        Adan,
        adan,
        {"lr": 0.01, "betas": (0.9, 0.8, 0.95), "weight_decay": 0.1, "proximal": False},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fifty_steps_are_those_of_an_independent_implementation(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 7), (5,), (3, 2, 4)]
    start = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    mine, yours = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    one, other = ours(mine, **options), theirs(yours, **options)
    for _ in range(50):
        for a, b in zip(mine, yours, strict=True):
            a.grad = torch.randn(a.shape, dtype=dtype, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, x in zip(mine, yours, start, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(a, x, rtol=0.01)
