"""From the config's optimiser section to the optimiser, through the registry."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.registry import OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig

__all__ = ["build_optimizer"]


def build_optimizer(module: nn.Module, config: GlowFlowConfig) -> Optimizer:
    """The optimiser that ``training.optimizer`` names, at ``training.lr``.

    Raises:
        ConfigError: the name is not registered.
    """
    section = config.training.optimizer
    entry = OPTIMIZERS.get(section.name)
    if entry is None:
        registered = ", ".join(OPTIMIZERS.names())
        raise ConfigError(Problem("training.optimizer", f"is not registered; registered: {registered}", section.name))
    optimizer: Optimizer = entry.target()(module, section, config.training.lr)
    return optimizer
