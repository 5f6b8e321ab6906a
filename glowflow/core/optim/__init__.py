"""Optimisers, each behind its registered name."""

from glowflow.core.optim.build import build_optimizer

__all__ = ["build_optimizer"]
