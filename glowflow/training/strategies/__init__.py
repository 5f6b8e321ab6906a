"""Strategies by name: ``single``, ``ddp``, ``fsdp``; ``auto`` chooses by the number of workers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from glowflow.config.errors import ConfigError, Problem
from glowflow.training.strategies.base import Strategy
from glowflow.training.strategies.ddp import DDPStrategy
from glowflow.training.strategies.fsdp import FSDPStrategy
from glowflow.training.strategies.single import SingleStrategy

__all__ = ["DDPStrategy", "FSDPStrategy", "SingleStrategy", "Strategy", "make_strategy"]

_STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (SingleStrategy, DDPStrategy, FSDPStrategy)
}


def make_strategy(name: str, *, device: torch.device, precision: str) -> Strategy:
    """The strategy that ``training.strategy`` names; the process group, if any, must be up.

    Args:
        name: ``single``, ``ddp``, ``fsdp``, or ``auto``: fsdp with several workers, single with one.
        device: where this rank computes.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: no such strategy, or one that cannot serve this number of workers.
    """
    if name == "auto":
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        name = "fsdp" if distributed else "single"
    if name not in _STRATEGIES:
        known = ", ".join(["auto", *_STRATEGIES])
        raise ConfigError(Problem("training.strategy", f"must be one of: {known}", name))
    return _STRATEGIES[name](device=device, precision=precision)
