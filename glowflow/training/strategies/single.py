"""One process, one device: nothing is sent."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from glowflow.config.errors import ConfigError, Problem
from glowflow.training.strategies.base import Strategy

__all__ = ["SingleStrategy"]


class SingleStrategy(Strategy):
    """The model as it is.

    Raises:
        ConfigError: there are several workers, which would train apart from each other.
    """

    name = "single"

    def __init__(self, *, device: torch.device, precision: str) -> None:
        super().__init__(device=device, precision=precision)
        if self.world_size > 1:
            raise ConfigError(
                Problem(
                    "training.strategy",
                    f"`single` trains in one process, there are {self.world_size} workers",
                    self.name,
                    "use auto, fsdp or ddp, or set resources.workers to 1",
                )
            )

    def accumulate(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()
