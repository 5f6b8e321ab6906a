"""Training on Ray: ``TorchTrainer`` in a thread, the main thread free for Ctrl-C and for the display.

Ray's own interrupt handler, which ``fit()`` installs in the main thread, aborts at once; in another thread it installs
none. The main thread asks the monitor twice a second how far training is.
"""

from __future__ import annotations

import functools
import logging
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from glowflow.config.errors import RunError
from glowflow.orchestration import cluster
from glowflow.orchestration.job import Job, TrainingFailed, make_tracker, tracker_arguments, worker_args
from glowflow.orchestration.monitor import start_monitor
from glowflow.orchestration.worker import train_loop
from glowflow.training.markers import latest_complete, read_info

__all__ = ["run_on_ray"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_RAY_FOLDER = "ray"
_QUIET_SECONDS = 60.0  # no worker after this long: say what Ray waits for


def run_on_ray(job: Job) -> dict[str, Any]:
    """Train on the Ray cluster that this process is connected to.

    Returns:
        The summary of ``run_worker``.

    Raises:
        GlowFlowError: what a worker raised and no retry can mend.
        TrainingFailed: workers failed more often than ``training.max_failures``.
    """
    import ray

    job.progress.phase("starting the workers ...")
    tracker = functools.partial(make_tracker, *tracker_arguments(job)) if job.actor_tracks else None
    monitor, address = start_monitor(tracker, name=f"glowflow-{uuid.uuid4().hex[:12]}")
    fit = _Fit(_trainer(job, address))
    fit.start()
    job.interrupts.arm()
    try:
        _watch(job, fit, monitor)
    except KeyboardInterrupt:
        # On a cluster that goes on living, the workers must end too.
        ray.get(monitor.fatal.remote(RunError("stopped by the user")))
        ray.get(monitor.stop.remote())
        raise
    finally:
        job.interrupts.disarm()
        job.progress.close()
    summary = _outcome(fit, monitor)
    ray.get(monitor.close.remote(), timeout=60)
    shutil.rmtree(job.run_dir / _RAY_FOLDER, ignore_errors=True)
    return summary


class _Fit(threading.Thread):
    """``TorchTrainer.fit()`` outside the main thread."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="glowflow-fit", daemon=True)
        self._trainer = trainer
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._trainer.fit()
        except BaseException as error:
            self.error = error


def _trainer(job: Job, monitor: tuple[str, str]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = job.accelerator == "gpu"
    cpus = cluster.cpus_per_worker(job.config, sum(cluster.cluster_cpus()["CPU"]))
    newest = latest_complete(job.run_dir)
    info = read_info(newest) if newest is not None else None
    settings = {
        "args": worker_args(job).to_dict(),
        "monitor": list(monitor),
        "tracker": None if job.actor_tracks else list(tracker_arguments(job)),
        "gpu": gpu,
        "sequence": info.sequence if info is not None else -1,
        "report": job.report is not None,
    }
    resources = {"CPU": cpus, **({"GPU": 1.0} if gpu else {})}
    loop: Any = train_loop
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.config.resources.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Never the name of an earlier attempt: Ray would resume that one by itself.
            name=f"part-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.run_dir / _RAY_FOLDER),
            failure_config=FailureConfig(max_failures=job.config.training.max_failures),
        ),
    )


def _watch(job: Job, fit: _Fit, monitor: Any) -> None:
    """Show progress and pass on a stop until training ends or an error is final."""
    import ray

    began, asked_to_stop, training, patience = time.monotonic(), False, False, _QUIET_SECONDS
    last_step = -1
    while fit.is_alive():
        fit.join(_POLL_SECONDS)
        if job.interrupts.stop_requested and not asked_to_stop:
            ray.get(monitor.stop.remote())
            asked_to_stop = True
        state = ray.get(monitor.state.remote(), timeout=60)
        for note in state["notes"]:
            job.progress.note(note)
        if state["fatal"] is not None:
            raise state["fatal"]
        if state["report"] is not None and job.report is not None:
            step, metrics, checkpoint = state["report"]
            stop = job.report(step, metrics, None if checkpoint is None else Path(checkpoint))
            ray.get(monitor.answer.remote(stop))
        if state["started"] and not training:
            training = True
            job.progress.phase("workers are up, first step ...")
        if state["metrics"] and state["step"] != last_step:
            last_step = state["step"]
            job.progress.update(last_step, job.config.training.max_steps, state["metrics"])
        if not training and time.monotonic() - began > patience:
            job.progress.note(_waiting_for(job))
            patience *= 2


def _waiting_for(job: Job) -> str:
    import ray

    free: dict[str, float] = ray.available_resources()
    return (
        f"still waiting for {job.config.resources.workers} workers; free on the cluster: {free.get('CPU', 0):g} CPUs, "
        f"{free.get('GPU', 0):g} GPUs (is another job running there?)"
    )


def _outcome(fit: _Fit, monitor: Any) -> dict[str, Any]:
    """Rank 0's summary, or the first cause of the failure."""
    import ray

    state = ray.get(monitor.state.remote(), timeout=60)
    if state["fatal"] is not None:
        raise state["fatal"]
    if fit.error is None:
        summary: dict[str, Any] = fit.result.return_value
        return summary
    said = ray.get(monitor.failure.remote(), timeout=60)
    text = said[0] if said is not None else _first_cause(fit.error)
    failure = TrainingFailed((text.splitlines() or ["unknown cause"])[0])
    failure.worker_traceback = said[1] if said is not None else None
    raise failure from fit.error


def _first_cause(error: BaseException) -> str:
    """One line out of Ray's nested errors."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    while getattr(inner, "cause", None) is not None:
        inner = inner.cause  # type: ignore[attr-defined]
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else ''}"
