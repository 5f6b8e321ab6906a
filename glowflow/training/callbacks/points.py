"""Delivers every metric as points (metric, step, value, timestamp in ms) to a sink: the tracker's spool."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

from glowflow.training.callbacks.base import Callback, LogRecord

__all__ = ["Point", "PointSink"]

Point = tuple[str, int, float, int]


class PointSink(Callback):
    """Calls ``sink`` once per log step and validation. Values that are not finite are left out (JSON has none).

    The curves of loss, gradient norm and learning rate hold every step, each with the time at which it ended.
    """

    def __init__(self, sink: Callable[[Sequence[Point]], None]) -> None:
        self.sink = sink

    def on_log(self, record: LogRecord) -> None:
        now = time.time() * 1000
        # Step i ended that many seconds before now: what the later steps took.
        later = list(accumulate(reversed(record.step_seconds[1:]), initial=0.0))[::-1]
        points = [
            (metric, step, value, round(now - 1000 * ago))
            for metric, values in record.curve.items()
            for (step, value), ago in zip(values, later, strict=True)
        ]
        points += [
            (metric, record.step, value, round(now))
            for metric, value in record.metrics.items()
            if metric not in record.curve
        ]
        self._send(points)

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        now = round(time.time() * 1000)
        self._send([(metric, step, value, now) for metric, value in metrics.items()])

    def _send(self, points: list[Point]) -> None:
        finite = [point for point in points if math.isfinite(point[2])]
        if finite:
            self.sink(finite)
