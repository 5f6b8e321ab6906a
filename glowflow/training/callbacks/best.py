"""Remembers the best validation: which step it was, and every metric at that step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from glowflow.training.callbacks.base import Callback, LogRecord

if TYPE_CHECKING:
    from glowflow.config.schema import TrainingConfig
    from glowflow.training.loop import LoopResult

__all__ = ["BestTracker", "monitored_metric"]

VALIDATION_METRICS = ("val_loss", "perplexity", "val_bits_per_byte")


def monitored_metric(training: TrainingConfig) -> str:
    """The metric that chooses the best checkpoint: the first monitored one that validation measures."""
    return next((name for name in training.monitor_metrics if name in VALIDATION_METRICS), "val_loss")


class BestTracker(Callback):
    """``best`` is empty until the first validation; then {"step", "metric" values at that step}."""

    def __init__(self, training: TrainingConfig) -> None:
        self.metric = monitored_metric(training)
        self.sign = 1.0 if training.monitor_mode == "min" else -1.0
        self.best: dict[str, float] = {}
        self._latest: dict[str, float] = {}

    def on_log(self, record: LogRecord) -> None:
        self._latest = record.metrics

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return
        if not self.best or self.sign * value < self.sign * self.best[self.metric]:
            self.best = {"step": step, **{k: v for k, v in self._latest.items() if math.isfinite(v)}, **metrics}

    def on_train_end(self, result: LoopResult) -> None:
        result.best = dict(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] == self.metric:
            self.best = dict(state["best"])
