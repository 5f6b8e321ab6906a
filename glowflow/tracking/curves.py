"""Curves for comparisons: of chosen metrics only, and in one line per metric where that is enough.

A spool of a long run is megabytes of JSON, most of which a comparison does not need: lines of other metrics are passed
over before they are parsed. What a run's curves come to (last, least and greatest value with their steps) also goes
into a tag of its MLflow run, since MLflow itself can only tell the last value without reading every point.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glowflow.tracking.base import Point
from glowflow.tracking.spool import decode_point

__all__ = ["SUMMARY_TAG", "Curve", "encode_summary", "last_step", "parse_summary", "read_curves"]

SUMMARY_TAG = "glowflow.curves"
_MAX_TAG = 8000
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Args:
        points: by step, each step once. A summary holds only the last, the least and the greatest.
        whole: False for a summary, which cannot say what was measured at other steps.
    """

    points: Sequence[Point]
    whole: bool = True

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def best(self, mode: str) -> Point | None:
        """The first of the least (``min``) or greatest (``max``) finite values."""
        finite = [point for point in self.points if math.isfinite(point.value)]
        sign = -1.0 if mode == "max" else 1.0
        return min(finite, key=lambda point: (sign * point.value, point.step), default=None)

    def at(self, *, step: float = math.inf, timestamp_ms: float = math.inf) -> Point | None:
        """The last point that was measured up to this step and time."""
        reached = (p for p in self.points if p.step <= step and p.timestamp_ms <= timestamp_ms)
        return max(reached, key=lambda point: point.step, default=None)


def read_curves(path: str | Path, names: Iterable[str]) -> dict[str, Curve]:
    """The curves of these metrics in a spool; one that it lacks is empty, and so are all of a spool that is not there.

    Args:
        path: RUN/metrics.jsonl.
        names: of the metrics.
    """
    found: dict[str, dict[int, Point]] = {name: {} for name in names}
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        data = b""
    for line in _lines(data, found):
        point = decode_point(line)
        if point is not None and point.metric in found:
            found[point.metric].setdefault(point.step, point)  # the first one wins, as everywhere
    return {name: Curve([points[step] for step in sorted(points)]) for name, points in found.items()}


def _lines(data: bytes, names: Iterable[str]) -> Iterable[bytes]:
    """The lines about these metrics, as the spool writes them."""
    keys = b"|".join(re.escape(json.dumps(name).encode()) for name in names)
    return re.findall(rb'^\{"metric": (?:' + keys + rb"),.*$", data, re.MULTILINE) if keys else []


def last_step(path: str | Path, metric: str = "train_loss") -> int | None:
    """The last step of a metric, from the end of the spool where it is there."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            points = [decode_point(line) for line in _lines(file.read(), [metric])]
    except FileNotFoundError:
        return None
    steps = [point.step for point in points if point is not None]
    if steps or size <= _TAIL_BYTES:
        return max(steps, default=None)
    last = read_curves(path, [metric])[metric].last
    return None if last is None else last.step


def encode_summary(points: Iterable[Point]) -> str:
    """Last, least and greatest value of each metric but the machine's own, as the text of a tag."""
    table: dict[str, list[Point]] = {}
    for point in points:
        if math.isfinite(point.value) and not point.metric.startswith("system/"):
            table.setdefault(point.metric, []).append(point)
    summary: dict[str, Any] = {}
    for name, found in sorted(table.items()):
        curve = Curve(sorted(found, key=lambda point: point.step))
        chosen = {"last": curve.last, "min": curve.best("min"), "max": curve.best("max")}
        summary[name] = {key: [p.step, p.value, p.timestamp_ms] for key, p in chosen.items() if p is not None}
        if len(json.dumps(summary)) > _MAX_TAG:  # of hundreds of metrics the rest must be read point by point
            del summary[name]
            break
    return json.dumps(summary)


def parse_summary(text: str | None) -> dict[str, Curve]:
    """What ``encode_summary`` wrote, metric by metric; nothing where it cannot be read."""
    try:
        summary = json.loads(text or "{}")
        return {name: _summary_curve(name, entry) for name, entry in summary.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _summary_curve(name: str, entry: Mapping[str, Sequence[float]]) -> Curve:
    points = {int(step): Point(name, int(step), float(v), int(stamp)) for step, v, stamp in entry.values()}
    return Curve([points[step] for step in sorted(points)], whole=False)
