"""Hands finished checkpoints to whoever runs the worker (Ray's ``report``, the tracker)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glowflow.training.callbacks.base import Callback

__all__ = ["CheckpointHook"]


class CheckpointHook(Callback):
    """Calls ``function(step, path, metrics)`` for every checkpoint that is complete, on every rank."""

    def __init__(self, function: Callable[[int, str, dict[str, float]], None]) -> None:
        self.function = function

    def on_checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        self.function(step, str(path), metrics)
