"""What can be hooked into the training loop. A callback sees plain floats, and only at log steps.

``step`` counts optimiser steps that are done, so the first one is 1. ``on_log`` may add metrics to the record it
gets; callbacks run in the order in which they are given, so those that add come before those that deliver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.core.batch import StepBatches

if TYPE_CHECKING:
    from glowflow.training.loop import LoopResult, TrainLoop

__all__ = ["Callback", "LogRecord"]


@dataclass
class LogRecord:
    """What one log step hands to the callbacks.

    Args:
        step: optimiser steps done.
        metrics: values at this step; callbacks may add some.
        curve: values of every step since the last log step: metric -> [(step, value)]. Not finite values included.
        step_seconds: duration of each step since the last log step, without validation and checkpoints.
        wait_seconds: how long the slowest rank waited for data in these steps.
        tokens: tokens of these steps over all ranks.
    """

    step: int
    metrics: dict[str, float]
    curve: dict[str, list[tuple[int, float]]]
    step_seconds: list[float]
    wait_seconds: float
    tokens: int


class Callback:
    """Does nothing; override what you need. An exception of a callback ends the run."""

    def on_train_start(self, loop: TrainLoop) -> None:
        """State is restored; no step was run."""

    def on_step_end(self, batches: StepBatches) -> None:
        """A step was issued (on a GPU it may still run). Must not read the device."""

    def on_log(self, record: LogRecord) -> None:
        """Metrics were read from the device; after the same steps on every rank."""

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Validation is done; the same numbers on every rank."""

    def on_checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """A checkpoint is complete on disk; every rank gets the call, in the same order."""

    def on_train_end(self, result: LoopResult) -> None:
        """The run is finished or was stopped cleanly; may fill in fields of the result."""

    def close(self) -> None:
        """Always called last, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that goes into the checkpoint, under the name of the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave; called before ``on_train_start`` of a resumed run."""
