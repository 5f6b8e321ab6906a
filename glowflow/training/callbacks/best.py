"""Remembers the best validation: which step it was, and every metric at that step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.training.callbacks.base import Callback, LogRecord

if TYPE_CHECKING:
    from glowflow.config.schema import TrainingConfig
    from glowflow.training.loop import LoopResult

__all__ = ["BestTracker", "monitored_metric"]

_MEASURED = {
    "language_modelling": ("val_loss", "perplexity", "val_bits_per_byte"),
    "classification": ("val_loss", "val_accuracy"),
    "contrastive": ("val_loss", "val_recall_at_1"),
}
_LARGER_IS_BETTER = ("val_accuracy", "val_recall_at_1")


def monitored_metric(training: TrainingConfig, task: str = "language_modelling") -> str:
    """The metric that chooses the best checkpoint: the first monitored one that validation measures for the task.

    Raises:
        ConfigError: the smallest accuracy would be taken for the best.
    """
    metric = next((name for name in training.monitor_metrics if name in _MEASURED[task]), "val_loss")
    if metric in _LARGER_IS_BETTER and training.monitor_mode != "max":
        rule = f"must be max for {metric}, else the worst checkpoint is kept as the best"
        raise ConfigError(Problem("training.monitor_mode", rule, training.monitor_mode))
    return metric


class BestTracker(Callback):
    """``best`` is empty until the first validation; then {"step", "metric" values at that step}."""

    def __init__(self, training: TrainingConfig, task: str = "language_modelling") -> None:
        self.metric = monitored_metric(training, task)
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
