"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore.

Every schedule starts with the same linear warm-up, ``lr * (step + 1) / (warmup + 1)`` (nanoGPT), and then follows
its own shape. ``step`` counts from 0; the rate of step ``s`` is used for the (s+1)-th update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from glowflow.config.schema import TrainingConfig

__all__ = ["SCHEDULES", "ScheduleSpec", "build_schedule", "constant", "cosine", "inverse_sqrt", "linear", "wsd"]


@dataclass(frozen=True)
class ScheduleSpec:
    """What a schedule may depend on.

    Args:
        lr: peak rate.
        min_lr: rate at the end of a decay; None: a tenth of ``lr`` (``inverse_sqrt``: no floor).
        warmup_steps: steps of the warm-up.
        max_steps: steps of the whole run.
        decay_fraction: ``wsd``: share of the run in which the rate decays.
    """

    lr: float
    min_lr: float | None
    warmup_steps: int
    max_steps: int
    decay_fraction: float = 0.2

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def progress(self, step: int, start: int) -> float:
        """Share of the way from ``start`` to the end of the run, in [0, 1]."""
        return min(max((step - start) / max(self.max_steps - start, 1), 0.0), 1.0)

    def between(self, share: float) -> float:
        """The rate that is ``share`` of the way up from the final to the peak rate."""
        return self.final_lr + share * (self.lr - self.final_lr)


def constant(step: int, spec: ScheduleSpec) -> float:
    """The peak rate throughout."""
    return spec.lr


def linear(step: int, spec: ScheduleSpec) -> float:
    """A straight line from the peak to the final rate."""
    return spec.between(1.0 - spec.progress(step, spec.warmup_steps))


def cosine(step: int, spec: ScheduleSpec) -> float:
    """Half a cosine from the peak to the final rate (SGDR without restarts, arXiv:1608.03983)."""
    return spec.between(0.5 * (1.0 + math.cos(math.pi * spec.progress(step, spec.warmup_steps))))


def inverse_sqrt(step: int, spec: ScheduleSpec) -> float:
    """``lr * sqrt(warmup / step)`` (arXiv:1706.03762); ``min_lr`` is a floor when it is given."""
    warmup = max(spec.warmup_steps, 1)
    return max(spec.lr * math.sqrt(warmup / max(step, warmup)), spec.min_lr or 0.0)


def wsd(step: int, spec: ScheduleSpec) -> float:
    """Warm-up, stable, decay: the last ``decay_fraction`` of the run falls as ``1 - sqrt(x)`` (arXiv:2405.18392)."""
    start = max(spec.max_steps - round(spec.decay_fraction * spec.max_steps), spec.warmup_steps)
    return spec.between(1.0 - math.sqrt(spec.progress(step, start)))


SCHEDULES: dict[str, Callable[[int, ScheduleSpec], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def build_schedule(training: TrainingConfig) -> Callable[[int], float]:
    """The run's learning rate as a function of the step (from 0), warm-up included."""
    spec = ScheduleSpec(
        training.lr, training.min_lr, training.warmup_steps, training.max_steps, training.decay_fraction
    )
    return partial(_with_warmup, shape=SCHEDULES[training.schedule], spec=spec)


def _with_warmup(step: int, shape: Callable[[int, ScheduleSpec], float], spec: ScheduleSpec) -> float:
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / (spec.warmup_steps + 1)
    return shape(step, spec)
