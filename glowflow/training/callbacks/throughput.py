"""Speed: tokens per second, step time, data-wait share and, on a device whose peak is known, MFU."""

from __future__ import annotations

import logging
from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from glowflow.training.callbacks.base import Callback, LogRecord
from glowflow.training.flops import Peak, device_peak, mfu

if TYPE_CHECKING:
    from glowflow.training.loop import LoopResult, TrainLoop

__all__ = ["Throughput"]

logger = logging.getLogger(__name__)

START_UP_STEPS = 5
"""Steps after each start that do not count as steady: compilation, allocation, the stream filling up."""


class Throughput(Callback):
    """Adds tokens_per_second, step_time_ms, data_wait_share and mfu; the result gets the median over steady steps."""

    def __init__(self, window: int = 20_000) -> None:
        self._steady: deque[float] = deque(maxlen=window)
        self._start_up: list[float] = []
        self._tokens_per_step = 0.0
        self._counted: list[int] | None = None  # tokens and steps, where samples are of unequal length
        self._peak: Peak | None = None
        self._flops_per_token = 0.0
        self._num_devices = 1

    def on_train_start(self, loop: TrainLoop) -> None:
        self._tokens_per_step = loop.counts.tokens_per_step or 0.0
        self._counted = None if loop.counts.tokens_per_step else [0, 0]
        self._num_devices = loop.strategy.world_size
        self._peak = device_peak(loop.strategy.device)
        if self._peak is None:
            return
        try:
            self._flops_per_token = loop.strategy.unwrap(loop.module).flops_per_token(loop.config.data.context)
        except NotImplementedError:
            self._peak = None  # a custom architecture that does not count its operations has no MFU
            return
        if loop.strategy.rank == 0:
            logger.info("mfu: %.4g FLOP/token (PaLM) over %s", self._flops_per_token, self._peak.label)

    def on_log(self, record: LogRecord) -> None:
        seconds = sum(record.step_seconds)
        if seconds <= 0:
            return
        for duration in record.step_seconds:
            warm = len(self._start_up) < START_UP_STEPS
            (self._start_up if warm else self._steady).append(duration)
        if self._counted is not None:
            self._counted = [self._counted[0] + record.tokens, self._counted[1] + len(record.step_seconds)]
            self._tokens_per_step = self._counted[0] / self._counted[1]
        speed = record.tokens / seconds
        record.metrics["tokens_per_second"] = speed
        record.metrics["step_time_ms"] = 1000 * median(record.step_seconds)
        record.metrics["data_wait_share"] = min(record.wait_seconds / seconds, 1.0)
        if self._peak is not None:
            record.metrics["mfu"] = mfu(speed, self._flops_per_token, self._peak, self._num_devices)

    @property
    def steady_tokens_per_second(self) -> float | None:
        """Tokens of a step (the mean where it varies) over the median duration of the steady steps (of all steps in a
        very short run)."""
        durations = self._steady or self._start_up
        return self._tokens_per_step / median(durations) if durations else None

    def on_train_end(self, result: LoopResult) -> None:
        result.tokens_per_second = self.steady_tokens_per_second
        durations = self._steady or self._start_up
        result.step_time_ms = 1000 * median(durations) if durations else None
