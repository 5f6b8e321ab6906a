"""The tracker that needs nothing but the run directory: ``tracking.backend: jsonl``, and the base of all others."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from glowflow.tracking.base import Point, RunStatus
from glowflow.tracking.spool import CHECKPOINTS_NAME, METRICS_NAME, CheckpointLog, Spool
from glowflow.tracking.system import SystemSampler

__all__ = ["HEARTBEAT_NAME", "JsonlTracker", "beat"]

logger = logging.getLogger(__name__)

HEARTBEAT_NAME = ".heartbeat"


def beat(run_dir: Path) -> None:
    """Say that the run in this directory is alive (the modification time of RUN/.heartbeat)."""
    try:
        with open(run_dir / HEARTBEAT_NAME, "a", encoding="utf-8"):
            os.utime(run_dir / HEARTBEAT_NAME)
    except OSError as error:
        logger.debug("no heartbeat: %s", error)


class JsonlTracker:
    """Keeps points and checkpoints in the run directory.

    Args:
        run_dir: an existing run directory.
        system_metrics: sample CPU, memory, disk and network of this machine every ``system_interval`` seconds.
    """

    def __init__(self, run_dir: str | Path, *, system_metrics: bool = False, system_interval: float = 10.0) -> None:
        self.run_dir = Path(run_dir)
        self._spool = Spool(self.run_dir / METRICS_NAME)
        self._checkpoints = CheckpointLog(self.run_dir / CHECKPOINTS_NAME)
        self._closed = False
        self._complained = False
        self._last_beat = 0.0
        self._sampler: SystemSampler | None = None
        if system_metrics:
            self._sampler = SystemSampler(self.log_points, self._spool.last_step, interval=system_interval)
            self._sampler.start()

    def log_points(self, points: Sequence[Point]) -> None:
        if self._closed:
            return
        try:
            self._spool.append(points)
        except OSError as error:  # a full disk must not end the training that it can still survive
            self._complain(error)
        self._beat()

    def log_checkpoint(self, step: int, path: str | Path, metrics: Mapping[str, float]) -> None:
        if self._closed:
            return
        try:
            self._spool.sync()
            self._checkpoints.append(step, Path(path).absolute(), metrics, marker_sha256(Path(path)))
        except OSError as error:
            self._complain(error)

    def finish(self, status: RunStatus) -> None:
        if self._sampler is not None:
            self._sampler.stop()
        if not self._closed:
            try:
                self._spool.sync()
            except OSError as error:
                self._complain(error)

    def close(self) -> None:
        if self._closed:
            return
        if self._sampler is not None:
            self._sampler.stop()
        self._closed = True
        self._spool.close()
        self._checkpoints.close()

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat > 5.0:
            self._last_beat = time.monotonic()
            beat(self.run_dir)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            logger.warning("metrics cannot be written to %s: %s", self.run_dir, error)
        self._complained = True


def marker_sha256(checkpoint: Path) -> str | None:
    """The hash of a checkpoint's marker, which holds the hashes of its files; None where there is none."""
    try:
        return hashlib.sha256((checkpoint / "COMPLETE.json").read_bytes()).hexdigest()
    except OSError:
        return None
