"""The small interface behind which metrics are kept: points go in, nothing that training waits for comes out.

A point is one value of one metric at one step. Whoever tracks keeps the first value and timestamp of a
(metric, step) for good, so that steps replayed after a restart change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

__all__ = ["CheckpointEvent", "Point", "RunStatus", "Tracker"]

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Point(NamedTuple):
    """One measured value. ``timestamp_ms`` is Unix time in milliseconds."""

    metric: str
    step: int
    value: float
    timestamp_ms: int


class CheckpointEvent(NamedTuple):
    """A complete checkpoint: its step, where it lies, what was measured there, and the hash of its marker."""

    step: int
    path: str
    metrics: dict[str, float]
    sha256: str | None


class Tracker(Protocol):
    """What the training loop knows of tracking. No method raises because a server is down, none waits for one."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Keep these points. On return they survive the death of this process."""

    def log_checkpoint(self, step: int, path: str | Path, metrics: Mapping[str, float]) -> None:
        """Note a complete checkpoint; noting the same step again changes nothing."""

    def finish(self, status: RunStatus) -> None:
        """Everything was logged; waits a bounded time for what is still on its way."""

    def close(self) -> None:
        """Free files and threads; may be called more than once."""
