"""The monitor and its workers' side: everything sent arrives, in order, even past an actor that fails for a while."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import DataError
from glowflow.orchestration import monitor as module
from glowflow.orchestration.job import make_tracker
from glowflow.orchestration.monitor import Monitor, MonitorLink
from glowflow.tracking.base import Point
from glowflow.tracking.spool import curves, read_checkpoints


class DirectLink(MonitorLink):
    """A link to a monitor in this process, whose calls fail as long as ``broken`` is set."""

    def __init__(self, monitor: Monitor) -> None:
        self.broken = threading.Event()
        self.attempts = 0
        super().__init__(monitor, rank=0)

    def call(self, method: str, *arguments: Any) -> Any:
        self.attempts += 1
        if self.broken.is_set():
            raise ConnectionError("the actor is gone")
        return getattr(self._actor, method)(*arguments)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)


def point(step: int, value: float = 1.0, metric: str = "train_loss") -> Point:
    return Point(metric, step, value, 1000 + step)


def test_points_and_checkpoints_reach_the_tracker_once_and_the_state_follows(tmp_path: Path) -> None:
    monitor = Monitor(lambda: make_tracker(None, None, str(tmp_path), False))
    link = DirectLink(monitor)
    for step in range(1, 51):
        link.points([point(step, step / 10)])
    link.points([point(50, 9.0)])  # replayed after a restart: the first value stays
    link.checkpoint(50, tmp_path / "checkpoints" / "step-50", {"val_loss": 2.0})
    link.close()
    monitor.close()
    assert curves(tmp_path / "metrics.jsonl")["train_loss"] == {step: step / 10 for step in range(1, 51)}
    assert [event.step for event in read_checkpoints(tmp_path / "checkpoints.jsonl")] == [50]
    assert monitor.state()["step"] == 50


def test_nothing_is_lost_while_the_actor_does_not_answer(tmp_path: Path) -> None:
    monitor = Monitor(lambda: make_tracker(None, None, str(tmp_path), False))
    link = DirectLink(monitor)
    link.broken.set()
    for step in range(1, 21):
        link.points([point(step)])
    while link.attempts < 3:
        pass
    link.broken.clear()
    link.close()
    monitor.close()
    assert list(curves(tmp_path / "metrics.jsonl")["train_loss"]) == list(range(1, 21))


def test_a_stop_travels_back_without_anything_being_sent() -> None:
    monitor = Monitor(None)
    link = DirectLink(monitor)
    assert not link.stop_requested()
    monitor.stop()
    arrived = threading.Event()
    for _ in range(200):
        if link.stop_requested():
            arrived.set()
            break
        arrived.wait(0.02)
    link.close()
    assert arrived.is_set()


def test_a_restart_takes_the_display_back_and_says_so() -> None:
    monitor = Monitor(None)
    monitor.started(0)
    monitor.exchange([("points", [point(30)])])
    monitor.failed(1, "RuntimeError: boom", "trace")
    monitor.failed(0, "RuntimeError: connection closed by peer", "other trace")
    assert monitor.failure() == ("worker 1: RuntimeError: boom", "trace")
    monitor.started(20)
    state = monitor.state()
    assert state["step"] == 20
    assert state["notes"] == ["worker 1 failed: RuntimeError: boom", "workers restarted, going on from step 20"]
    assert monitor.state()["notes"] == []
    assert monitor.failure() is None  # of this attempt nobody has said anything


def test_the_first_error_that_no_retry_mends_counts() -> None:
    monitor = Monitor(None)
    first = DataError("shard changed")
    monitor.fatal(first)
    monitor.fatal(DataError("another"))
    assert monitor.fatal_error() is first
    assert monitor.state()["fatal"] is first
