"""Lion (arXiv:2302.06675, algorithm 2): the sign of an interpolated momentum.

c <- beta1 m + (1 - beta1) g
theta <- (1 - lr wd) theta - lr sign(c)
m <- beta2 m + (1 - beta2) g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.optimizers import LionConfig
from glowflow.core.optim.foreach import ForeachOptimizer, unless
from glowflow.core.optim.groups import parameter_groups

__all__ = ["Lion", "build_lion", "lion_update"]


def build_lion(module: nn.Module, config: LionConfig, lr: float) -> Lion:
    """Lion over plain or sharded (DTensor) parameters.

    Args:
        module: whose parameters are trained.
        config: betas, weight decay.
        lr: learning rate of the first step; schedules set it anew.
    """
    return Lion(parameter_groups(module, config.weight_decay), lr=lr, betas=config.betas)


class Lion(ForeachOptimizer):
    """See the module; parameter groups may set ``lr``, ``betas`` and ``weight_decay``."""

    state_names = ("exp_avg",)

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """See ``lion_update``."""
        (momenta,) = states
        lion_update(
            params, grads, momenta, lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"], skip=skip
        )


def lion_update(
    theta: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """One step in place, in the symbols of the paper; ``skip`` as in ``ForeachOptimizer.update``."""
    beta1, beta2 = betas
    decay: float | Tensor = 1.0 - lr * weight_decay
    g = unless(skip, m, g)  # then m stays as it is
    if skip is not None:
        decay = torch.where(skip, 1.0, decay)
    c = torch._foreach_lerp(m, g, 1.0 - beta1)
    torch._foreach_sign_(c)
    if skip is not None:
        torch._foreach_mul_(c, (~skip).to(c[0].dtype))
    torch._foreach_mul_(theta, decay)
    torch._foreach_add_(theta, c, alpha=-lr)
    torch._foreach_lerp_(m, g, 1.0 - beta2)
