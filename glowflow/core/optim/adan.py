"""Adan (arXiv:2208.06677, algorithm 1): Nesterov momentum that needs no second gradient.

With the gradient g, d = g - g_before (0 in the first step) and betas as Adam writes them, the paper's being 1 - beta:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) d
    n <- beta3 n + (1 - beta3) (g + beta2 d)^2
    u = (m / (1 - beta1^t) + beta2 v / (1 - beta2^t)) / (sqrt(n / (1 - beta3^t)) + eps)
    theta <- (theta - lr u) / (1 + lr wd)        the proximal decay of the paper
    theta <- (1 - lr wd) theta - lr u            AdamW's, with ``proximal: false``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.optimizers import AdanConfig
from glowflow.core.optim.foreach import ForeachOptimizer, bias_corrections, unless
from glowflow.core.optim.groups import parameter_groups

__all__ = ["Adan", "adan_update", "build_adan"]


def build_adan(module: nn.Module, config: AdanConfig, lr: float) -> Adan:
    """Adan over plain or sharded (DTensor) parameters.

    Args:
        module: whose parameters are trained.
        config: betas, eps, weight decay and its form.
        lr: learning rate of the first step; schedules set it anew.
    """
    groups = parameter_groups(module, config.weight_decay)
    return Adan(groups, lr=lr, betas=config.betas, eps=config.eps, proximal=config.proximal)


class Adan(ForeachOptimizer):
    """See the module; parameter groups may set every option. State: 4 times the parameters."""

    state_names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "grad_before")
    counts_steps = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        proximal: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "proximal": proximal}
        super().__init__(params, defaults)

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """See ``adan_update``."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "proximal")}
        adan_update(params, grads, *states, **options, skip=skip)


def adan_update(
    theta: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    n: list[Tensor],
    g_before: list[Tensor],
    t: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    proximal: bool = True,
    skip: Tensor | None = None,
) -> None:
    """One step in place, in the symbols of the paper; ``t`` counts the steps done, ``skip`` as in ``update``."""
    beta1, beta2, beta3 = betas
    d = torch._foreach_sub(g, g_before)
    torch._foreach_mul_(d, [(count > 0).to(change.dtype) for count, change in zip(t, d, strict=True)])
    squares = torch._foreach_add(g, d, alpha=beta2)
    torch._foreach_mul_(squares, squares)
    torch._foreach_lerp_(m, unless(skip, m, g), 1.0 - beta1)
    torch._foreach_lerp_(v, unless(skip, v, list(d)), 1.0 - beta2)
    torch._foreach_lerp_(n, unless(skip, n, list(squares)), 1.0 - beta3)
    torch._foreach_copy_(g_before, unless(skip, g_before, g))
    keep: float | Tensor = 1.0 if skip is None else (~skip).to(t[0].dtype)
    torch._foreach_add_(t, keep)
    step = torch._foreach_div(m, bias_corrections(t, beta1, m))
    torch._foreach_add_(step, torch._foreach_div(v, bias_corrections(t, beta2, v)), alpha=beta2)
    root = torch._foreach_sqrt(n)
    torch._foreach_div_(root, [correction.sqrt() for correction in bias_corrections(t, beta3, n)])
    torch._foreach_add_(root, eps)
    decay: float | Tensor = 1.0 + lr * weight_decay if proximal else 1.0 - lr * weight_decay
    if skip is not None:
        torch._foreach_mul_(step, keep)
        decay = torch.where(skip, 1.0, decay)
    if not proximal:
        torch._foreach_mul_(theta, decay)
    torch._foreach_addcdiv_(theta, step, root, value=-lr)
    if proximal:
        torch._foreach_div_(theta, decay)
