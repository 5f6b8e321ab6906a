"""Goodput: the time in steps that were never repeated, over the wall time since the run was first started.

The useful seconds of a step count when a checkpoint holds it; steps replayed after a restart replace the lost ones.
The first start is kept in RUN/progress.json, because a run may die before its first checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.training.callbacks.base import Callback, LogRecord

if TYPE_CHECKING:
    from glowflow.training.loop import LoopResult

__all__ = ["Goodput", "first_start"]


def first_start(run_dir: Path, *, write: bool) -> float:
    """Unix time at which the run was first started; remembered in RUN/progress.json by the rank that writes."""
    path = run_dir / "progress.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["started_at"])
    except (OSError, ValueError, KeyError, TypeError):
        now = time.time()
    if write:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"started_at": now}), encoding="utf-8")
        os.replace(temporary, path)
    return now


class Goodput(Callback):
    """Adds the metric ``goodput``, in (0, 1]."""

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        self.started_at = first_start(run_dir, write=rank == 0)
        self.useful_seconds = 0.0

    @property
    def goodput(self) -> float:
        return min(self.useful_seconds / max(time.time() - self.started_at, 1e-9), 1.0)

    def on_log(self, record: LogRecord) -> None:
        self.useful_seconds += sum(record.step_seconds)
        record.metrics["goodput"] = self.goodput

    def on_train_end(self, result: LoopResult) -> None:
        result.goodput = self.goodput

    def state_dict(self) -> dict[str, Any]:
        return {"useful_seconds": self.useful_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.useful_seconds = float(state["useful_seconds"])
