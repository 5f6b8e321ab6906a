"""Training in this process: the same loop in the main thread, without Ray, so that ``breakpoint()`` works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glowflow.orchestration.job import Job, make_tracker, tracker_arguments, worker_args
from glowflow.orchestration.monitor import Progressed
from glowflow.tracking.base import Point

__all__ = ["run_local"]


def run_local(job: Job) -> dict[str, Any]:
    """Train with one worker, here.

    Returns:
        The summary of ``run_worker``.
    """
    from glowflow.data.stream import local_stream
    from glowflow.training.session import run_worker

    tracker = make_tracker(*tracker_arguments(job))
    progressed = Progressed()
    max_steps = job.config.training.max_steps

    def sink(points: Sequence[Any]) -> None:
        typed = [Point(*point) for point in points]
        tracker.log_points(typed)
        progressed.points(typed)
        step, metrics = progressed.state()
        job.progress.update(step, max_steps, metrics)

    def on_checkpoint(step: int, path: str, metrics: dict[str, float]) -> None:
        tracker.log_checkpoint(step, Path(path), metrics)

    job.progress.phase("training in this process, first step ...")
    job.interrupts.arm()
    try:
        return run_worker(
            worker_args(job),
            open_stream=local_stream,
            open_eval_stream=local_stream,
            device="cuda:0" if job.accelerator == "gpu" else "cpu",
            sink=sink,
            stop_requested=lambda: job.interrupts.stop_requested,
            on_checkpoint=on_checkpoint,
            on_report=job.report,
        )
    finally:
        job.interrupts.disarm()
        job.progress.close()
        tracker.close()
