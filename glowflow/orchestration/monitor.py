"""The monitor: a zero-CPU actor on the driver's node between rank 0 and the person in front of the driver.

Rank 0 sends what it measured; the driver reads how far training is; a stop that the user asks for travels back. The
one writer of a SQLite store lives here too (``tracker``). ``MonitorLink`` is the side of the workers: one background
thread, so that training never waits, neither for the actor nor for a disk.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glowflow.tracking.base import Point, Tracker

__all__ = ["Monitor", "MonitorLink", "Progressed", "start_monitor"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 0.1
_FLUSH_SECONDS = 30.0
_QUEUE_LIMIT = 100_000  # messages; a run writes some dozens per log step, so a full queue means a dead actor


class Progressed:
    """How far training is, as the display shows it; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step = 0
        self._metrics: dict[str, float] = {}

    def points(self, points: Sequence[Point]) -> None:
        """Take in what was measured; validation's values stay until the next validation."""
        with self._lock:
            for point in points:
                if not point.metric.startswith("system/"):
                    self._metrics[point.metric] = point.value
                    self._step = max(self._step, point.step)

    def rewind(self, step: int) -> None:
        """Training goes on from this step, after a failure or a resume."""
        with self._lock:
            self._step = step

    def state(self) -> tuple[int, dict[str, float]]:
        """(step, last value of every metric)"""
        with self._lock:
            return self._step, dict(self._metrics)


class Monitor:
    """The actor's state. Every method is quick, so that calls never queue up behind one another.

    Args:
        make_tracker: builds the tracker in the actor's process; None where rank 0 tracks by itself (an http store).
    """

    def __init__(self, make_tracker: Callable[[], Tracker] | None) -> None:
        self._tracker = make_tracker() if make_tracker is not None else None
        self._progress = Progressed()
        self._stop = False
        self._fatal: BaseException | None = None
        self._notes: list[str] = []
        self._attempts = 0
        self._checkpoint: tuple[int, str] | None = None
        self._failed_attempt = -1
        self._failure: tuple[str, str] | None = None
        self._report: tuple[int, dict[str, float], str | None] | None = None
        self._answer: bool | None = None

    def ready(self) -> bool:
        """Answer once the actor runs."""
        return True

    def exchange(self, messages: Sequence[tuple[str, Any]]) -> bool:
        """Take messages of rank 0, in order, and say whether the user asked to stop."""
        for kind, content in messages:
            if kind == "points":
                self._take_points([Point(*point) for point in content])
            elif kind == "checkpoint":
                self._take_checkpoint(*content)
        return self._stop

    def _take_points(self, points: list[Point]) -> None:
        self._progress.points(points)
        if self._tracker is not None:
            self._tracker.log_points(points)

    def _take_checkpoint(self, step: int, path: str, metrics: Mapping[str, float]) -> None:
        self._checkpoint = (step, path)
        if self._tracker is not None:
            self._tracker.log_checkpoint(step, Path(path), metrics)

    def started(self, step: int) -> None:
        """Rank 0 of a (re)started worker group is about to run from this step."""
        self._attempts += 1
        self._progress.rewind(step)
        if self._attempts > 1:
            self._notes.append(f"workers restarted, going on from step {step:,}")

    def stopped(self) -> bool:
        """Whether the user asked to stop."""
        return self._stop

    def stop(self) -> None:
        """The user asks for a checkpoint and a clean end."""
        self._stop = True

    def failed(self, rank: int, text: str, trace: str) -> None:
        """A worker raised; the first one to say so is the cause, the others lost their connection to it."""
        if self._failed_attempt != self._attempts:
            self._failed_attempt = self._attempts
            self._failure = (f"worker {rank}: {text}", trace)
            self._notes.append(f"worker {rank} failed: {(text.splitlines() or [''])[0]}")

    def failure(self) -> tuple[str, str] | None:
        """(what was said, traceback) of the last attempt's first failure; None where a worker died without a word."""
        return self._failure if self._failed_attempt == self._attempts else None

    def fatal(self, error: BaseException) -> None:
        """An error that no retry can mend; the first one counts."""
        self._fatal = self._fatal or error

    def fatal_error(self) -> BaseException | None:
        """The error that no retry can mend, if there is one."""
        return self._fatal

    def state(self) -> dict[str, Any]:
        """What the driver shows; notes and reports are given once."""
        step, metrics = self._progress.state()
        notes, self._notes = self._notes, []
        report, self._report = self._report, None
        return {
            "step": step,
            "metrics": metrics,
            "notes": notes,
            "fatal": self._fatal,
            "started": self._attempts > 0,
            "checkpoint": self._checkpoint,
            "report": report,
        }

    def report(self, step: int, metrics: dict[str, float], checkpoint: str | None) -> None:
        """Rank 0 waits at this step for the driver's answer; ``state`` gives the report once."""
        self._report, self._answer = (step, metrics, checkpoint), None

    def answer(self, stop: bool) -> None:
        """The driver's answer to the report: whether training shall stop here."""
        self._answer = stop

    def answered(self) -> bool | None:
        """The answer, None as long as there is none."""
        return self._answer

    def close(self) -> None:
        """Everything was sent: bring the spool to the disk and leave it to the driver."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None


def start_monitor(make_tracker: Callable[[], Tracker] | None, name: str) -> tuple[Any, tuple[str, str]]:
    """Start the actor on this node and wait until it runs.

    Returns:
        (handle, (name, namespace)); the actor lives as long as the handle.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    remote_class: Any = ray.remote(Monitor)
    actor = remote_class.options(name=name, num_cpus=0, scheduling_strategy=here).remote(make_tracker)
    ray.get(actor.ready.remote(), timeout=120)
    return actor, (name, context.namespace)


class MonitorLink:
    """A worker's side of the monitor.

    Rank 0 sends points and checkpoints through it; every rank may ask ``stop_requested`` at any time, which only
    reads a flag that the background thread keeps fresh.
    """

    def __init__(self, actor: Any, *, rank: int) -> None:
        self._actor = actor
        self._rank = rank
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(_QUEUE_LIMIT)
        self._stop = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glowflow-monitor-link", daemon=True)
        self._thread.start()

    def stop_requested(self) -> bool:
        """Whether the user asked to stop, as known half a second ago."""
        return self._stop

    def points(self, points: Sequence[Point]) -> None:
        """Send measured points; does not wait."""
        self._put("points", [tuple(point) for point in points])

    def checkpoint(self, step: int, path: Path | str, metrics: Mapping[str, float]) -> None:
        """Send a complete checkpoint; does not wait."""
        self._put("checkpoint", (step, str(path), dict(metrics)))

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None) -> bool:
        """``LoopInputs.report``: tell the driver, and wait until it has answered or asked for a stop."""
        self.flush()
        self.call("report", step, dict(metrics), None if checkpoint is None else str(checkpoint))
        while (answer := self.call("answered")) is None and not self._stop:
            time.sleep(_ANSWER_SECONDS)
        return self._stop or bool(answer)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the monitor and wait for its answer."""
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_FLUSH_SECONDS)

    def flush(self) -> None:
        """Wait until everything that was sent has arrived, at most 30 seconds."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self._queue.unfinished_tasks and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Deliver what is left and end the thread."""
        self.flush()
        self._closing.set()
        self._thread.join(timeout=5)

    def _put(self, kind: str, content: Any) -> None:
        try:
            self._queue.put_nowait((kind, content))
        except queue.Full:
            logger.warning("the monitor does not answer: %s dropped", kind)

    def _run(self) -> None:
        messages: list[tuple[str, Any]] = []
        while not self._closing.is_set():
            messages += self._wait_for_messages()
            try:
                self._stop = bool(self.call("exchange", messages))
            except Exception as error:  # an actor that is gone must not end training; the driver sees it too
                logger.warning("the monitor cannot be reached: %s", error)
                self._closing.wait(_POLL_SECONDS)
                continue
            for _ in messages:
                self._queue.task_done()
            messages = []

    def _wait_for_messages(self) -> list[tuple[str, Any]]:
        messages: list[tuple[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._queue.get(timeout=_POLL_SECONDS))
            while True:
                messages.append(self._queue.get_nowait())
        return messages
