"""One log line per log step, validation and checkpoint, with the metrics that the config asks to watch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from glowflow.training.callbacks.base import Callback, LogRecord

__all__ = ["ProgressLog"]

logger = logging.getLogger(__name__)

_ALWAYS = ("train_loss", "lr", "tokens_per_second", "step_time_ms")


class ProgressLog(Callback):
    """Writes to the logger ``glowflow.training.callbacks.progress`` at level INFO."""

    def __init__(self, max_steps: int, monitor_metrics: Sequence[str] = ()) -> None:
        self.max_steps = max_steps
        self.names = (*_ALWAYS, *(name for name in monitor_metrics if name not in _ALWAYS))

    def on_log(self, record: LogRecord) -> None:
        shown = "  ".join(f"{name} {record.metrics[name]:.4g}" for name in self.names if name in record.metrics)
        logger.info("step %d/%d  %s", record.step, self.max_steps, shown)

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        logger.info("step %d/%d  %s", step, self.max_steps, "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def on_checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        logger.info("step %d/%d  checkpoint %s", step, self.max_steps, path.name)
