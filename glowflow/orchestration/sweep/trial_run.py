"""One trial's training run in a thread, which waits at every report until somebody says how it goes on.

Tune asks (``step()`` of an actor), the loop tells (a report after each validation): this joins the two. Nothing here
knows Ray.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glowflow.config.schema import GlowFlowConfig
from glowflow.orchestration.job import Job, execute
from glowflow.orchestration.pipeline import sized_config
from glowflow.orchestration.progress import NoProgress
from glowflow.orchestration.rundir import lock_run, store_sources, stored_sources
from glowflow.tracking.runrecord import RECORD_NAME, RunRecord
from glowflow.training.markers import latest_complete

__all__ = ["Ended", "Reported", "TrialRun", "train_trial"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reported:
    """The run waits at this step; ``checkpoint`` is complete, or None where none was due."""

    step: int
    metrics: dict[str, float]
    checkpoint: Path | None


@dataclass(frozen=True)
class Ended:
    """The run is over; ``error`` is None unless it failed."""

    record: RunRecord
    error: BaseException | None


class _Signal:
    """Asks the training thread to stop: from this process, or by a file from the sweep's driver."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file, self._event = stop_file, threading.Event()

    @property
    def stop_requested(self) -> bool:
        return self._event.is_set() or self._stop_file.exists()

    def set(self) -> None:
        self._event.set()

    def arm(self) -> None:
        """Nothing to frame: a stop is always clean."""

    def disarm(self) -> None:
        """As ``arm``."""


class TrialRun:
    """Starts at once; alternate ``next`` with ``go_on`` until ``next`` gives ``Ended``.

    Args:
        train: called in the thread with (report, signal); returns the run's record.
        stop_file: its existence asks the run to stop.
    """

    def __init__(
        self,
        train: Callable[[Callable[[int, dict[str, float], Path | None], bool], _Signal], RunRecord],
        stop_file: Path,
    ) -> None:
        self._events: queue.Queue[Reported | Ended] = queue.Queue()
        self._answers: queue.Queue[bool] = queue.Queue()
        self._signal = _Signal(stop_file)
        self._train = train
        self._thread = threading.Thread(target=self._run, name="glowflow-trial", daemon=True)
        self._thread.start()

    def next(self) -> Reported | Ended:
        """Wait for the next report or the end."""
        return self._events.get()

    def go_on(self) -> None:
        """Let the run that waits at a report go on."""
        self._answers.put(False)

    def stop(self) -> None:
        """End the run where it is, with a checkpoint, and wait for it; one that has ended stays as it is."""
        self._signal.set()
        self._answers.put(True)
        self._thread.join()

    def _run(self) -> None:
        record = RunRecord("")
        try:
            record = self._train(self._report, self._signal)
        except BaseException as error:
            self._events.put(Ended(record, error))
        else:
            self._events.put(Ended(record, None))

    def _report(self, step: int, metrics: dict[str, float], checkpoint: Path | None) -> bool:
        self._events.put(Reported(step, metrics, checkpoint))
        return self._answers.get() or self._signal.stop_requested


def train_trial(
    config: GlowFlowConfig,
    *,
    accelerator: str,
    resume_from: Path | None,
    report: Callable[[int, dict[str, float], Path | None], bool],
    signal: _Signal,
) -> RunRecord:
    """Train one trial to its end, in this process with one worker, else as a Ray Train job.

    Metrics are spooled in the run directory; the sweep's driver, the one writer of its MLflow store, sends them on.

    Args:
        config: the trial's own; its run directory is ``tracking.storage``/``tracking.run``.
        resume_from: the checkpoint to go on from; None: the newest of the run directory, if any.

    Raises:
        GlowFlowError: as for ``execute``.
    """
    from glowflow.data.prepare import ensure_built

    run_dir = Path(config.tracking.storage) / str(config.tracking.run)
    run_dir.mkdir(parents=True, exist_ok=True)
    done = _finished(run_dir)
    if done is not None:
        return done
    sources = stored_sources(run_dir, config.data.verify) or ensure_built(config.data, use_ray=False)
    local = config.resources.workers == 1
    with lock_run(run_dir):
        store_sources(run_dir, sources)
        job = Job(
            config=sized_config(config, sources[0][0]),
            run_dir=run_dir,
            sources=sources,
            local=local,
            accelerator=accelerator,
            progress=NoProgress(),
            interrupts=signal,
            resume_from=resume_from or latest_complete(run_dir, check=True),
            report=report,
        )
        return execute(job, _runner(local))


def _finished(run_dir: Path) -> RunRecord | None:
    """The record of a run that had ended before its sweep could write that down."""
    if not (run_dir / RECORD_NAME).is_file():
        return None
    record = RunRecord.load(run_dir)
    return record if record.status == "FINISHED" else None


def _runner(local: bool) -> Callable[[Job], dict[str, object]]:
    if local:
        from glowflow.orchestration.local import run_local

        return run_local
    from glowflow.orchestration.remote import run_on_ray

    return run_on_ray
