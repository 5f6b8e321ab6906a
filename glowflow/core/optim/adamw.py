"""AdamW (arXiv:1711.05101): ``theta <- (1 - lr wd) theta - lr m^ / (sqrt(v^) + eps)``, by torch's fused kernel."""

from __future__ import annotations

import torch
from torch import nn

from glowflow.config.optimizers import AdamWConfig
from glowflow.core.optim.groups import parameter_groups

__all__ = ["build_adamw"]


def build_adamw(module: nn.Module, config: AdamWConfig, lr: float) -> torch.optim.AdamW:
    """Fused AdamW over plain or sharded (DTensor) parameters.

    Args:
        module: whose parameters are trained.
        config: betas, eps, weight decay.
        lr: learning rate of the first step; schedules set it anew.
    """
    groups = parameter_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
