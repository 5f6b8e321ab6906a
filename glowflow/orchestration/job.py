"""The life of one run on the driver: record, tracker, training, the end. How training runs is handed in.

The driver owns the run: it writes run.json (RUNNING first, then how it ended) and makes the MLflow run, so that
whatever happens to the workers, somebody is left to write down the outcome.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.config.loader import config_fingerprint, to_dict, to_yaml
from glowflow.config.schema import GlowFlowConfig
from glowflow.data.manifest import Manifest
from glowflow.orchestration.interrupts import StopSignal
from glowflow.orchestration.progress import Progress
from glowflow.orchestration.rundir import CONFIG_NAME
from glowflow.tracking.base import RunStatus, Tracker
from glowflow.tracking.runrecord import RECORD_NAME, RunRecord, now_iso, this_process
from glowflow.training.session import WorkerArgs

__all__ = ["Job", "TrainingFailed", "data_fingerprint", "execute", "make_tracker", "tracker_arguments", "worker_args"]

logger = logging.getLogger(__name__)

_FINISH_SECONDS = 30.0
ERROR_NAME = "error.txt"


class TrainingFailed(RunError):
    """Training broke off for a reason that no config key explains; the CLI exits with 1.

    ``record`` is what run.json holds.
    """

    exit_code = 1
    record: RunRecord | None = None
    worker_traceback: str | None = None


@dataclass
class Job:
    """All that running needs, once everything was checked.

    Args:
        config: the effective config, as RUN/config.yaml holds it.
        run_dir: an existing directory, locked by this process.
        sources: built data sets with their weights.
        local: train in this process.
        accelerator: what ``resources.accelerator`` came to.
        resume_from: checkpoint to go on from; None: the newest complete one in ``run_dir``, if any.
        initial_weights: single-file checkpoint to start from instead of drawing weights from the seed.
        tracking_uri: MLflow store; None with ``tracking.backend: jsonl``.
        mlflow_run_id: the run there; None where the store could not be reached yet.
        report: ``LoopInputs.report``, answered in this process: how a sweep watches its trials.
    """

    config: GlowFlowConfig
    run_dir: Path
    sources: list[tuple[Manifest, float]]
    local: bool
    accelerator: str
    progress: Progress
    interrupts: StopSignal
    resume_from: Path | None = None
    initial_weights: Path | None = None
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    verbose: bool = False
    report: Callable[[int, dict[str, float], Path | None], bool] | None = None
    record: RunRecord = field(default_factory=lambda: RunRecord(""))

    @property
    def actor_tracks(self) -> bool:
        """Whether the store must be written from the driver's node (a file), not by rank 0 (a server)."""
        return self.tracking_uri is None or not self.tracking_uri.startswith(("http://", "https://"))


Runner = Callable[[Job], dict[str, Any]]


def execute(job: Job, runner: Runner) -> RunRecord:
    """Record the run as RUNNING, let ``runner`` train, and record how it ended.

    Args:
        job: the run.
        runner: trains and returns the summary of ``run_worker``.

    Returns:
        The final record, status FINISHED or KILLED.

    Raises:
        GlowFlowError: training failed for a reason that the user can mend.
        TrainingFailed: it failed otherwise; RUN/logs/error.txt has the traceback.
    """
    began = time.time()
    job.record = _open_record(job)
    try:
        _open_tracking(job)
        result = runner(job)
    except KeyboardInterrupt:
        _close(job, "KILLED", began, {}, "stopped at once by the user")
        return job.record
    except BaseException as error:
        failure = _explain(job, error)
        _close(job, "FAILED", began, {}, str(failure))
        if isinstance(failure, TrainingFailed):
            failure.record = job.record
        raise failure from (error if failure is not error else error.__cause__)
    _close(job, result["status"], began, result, None)
    return job.record


def worker_args(job: Job) -> WorkerArgs:
    """What every worker gets: plain values, so nothing is pickled that could not also be written down."""
    config = to_dict(job.config)
    config["resources"]["accelerator"] = job.accelerator
    return WorkerArgs(
        config=config,
        run_dir=str(job.run_dir),
        sources=[(str(manifest.root), weight) for manifest, weight in job.sources],
        resume=None if job.resume_from is None else str(job.resume_from),
        initial_weights=None if job.initial_weights is None else str(job.initial_weights),
        extra={"fingerprints": job.record.fingerprints},
    )


def make_tracker(uri: str | None, run_id: str | None, run_dir: str, system_metrics: bool) -> Tracker:
    """The tracker of one process: into the run directory, and on to MLflow where there is a store."""
    if uri is None:
        from glowflow.tracking.jsonl import JsonlTracker

        return JsonlTracker(run_dir, system_metrics=system_metrics)
    from glowflow.tracking.mlflow import MlflowTracker

    return MlflowTracker(uri, run_id, run_dir, system_metrics=system_metrics)


def tracker_arguments(job: Job) -> tuple[str | None, str | None, str, bool]:
    """Arguments of ``make_tracker``, as plain values."""
    return job.tracking_uri, job.mlflow_run_id, str(job.run_dir), job.config.tracking.system_metrics


def data_fingerprint(sources: Sequence[tuple[Manifest, float]]) -> str:
    """One manifest's fingerprint, or a digest over those of several with their weights."""
    import hashlib
    import json

    if len(sources) == 1:
        return sources[0][0].fingerprint
    parts = [[manifest.fingerprint, weight] for manifest, weight in sources]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# -- the record -------------------------------------------------------------------------------------------------------


def _open_record(job: Job) -> RunRecord:
    from glowflow.tracking.versions import code_fingerprint, versions

    known = (job.run_dir / RECORD_NAME).exists()
    record = RunRecord.load(job.run_dir) if known else RunRecord(job.run_dir.name, started=now_iso())
    record.status, record.error, record.ended = "RUNNING", None, None
    record.process = this_process()
    record.config = to_dict(job.config)
    record.fingerprints = {
        "config": config_fingerprint(job.config),
        "data": data_fingerprint(job.sources),
        "code": code_fingerprint(),
    }
    record.versions = versions()
    record.device = _device_name(job)
    (job.run_dir / "logs").mkdir(exist_ok=True)
    (job.run_dir / CONFIG_NAME).write_text(to_yaml(job.config), encoding="utf-8")
    record.save(job.run_dir)
    return record


def _device_name(job: Job) -> str:
    workers = 1 if job.local else job.config.resources.workers
    if job.accelerator == "cpu":
        return f"{workers} x cpu"
    import torch

    # The driver of a cluster may have no GPU of its own.
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "gpu"
    return f"{workers} x {name}"


def _close(job: Job, status: RunStatus, began: float, result: Mapping[str, Any], error: str | None) -> None:
    """Write the end down: first run.json, which needs nothing but the disk, then the tracker."""
    record = job.record
    record.status, record.error, record.ended = status, error, now_iso()
    record.seconds = round((record.seconds or 0.0) + time.time() - began, 3)
    for name in ("final", "best", "tokens_per_second", "goodput"):
        if result.get(name) is not None:
            setattr(record, name, result[name])
    checkpoints = _complete_checkpoints(job.run_dir)
    record.checkpoints = checkpoints
    # A run that broke off got as far as its newest checkpoint: what came after will be trained again.
    record.steps = int(result.get("steps") or (checkpoints[-1]["step"] if checkpoints else 0))
    record.tokens = int(result.get("tokens") or _tokens_of(checkpoints))
    _close_tracking(job, status)
    record.save(job.run_dir)


def _complete_checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    from glowflow.training.markers import list_checkpoints

    return [
        {"step": info.step, "path": str(info.path), "metrics": info.metrics}
        for info in list_checkpoints(run_dir)
        if info.complete
    ]


def _tokens_of(checkpoints: list[dict[str, Any]]) -> int:
    """Tokens that the newest checkpoint was trained on."""
    from glowflow.training.markers import read_extra

    if not checkpoints:
        return 0
    try:
        return int(read_extra(Path(checkpoints[-1]["path"]))["tokens"])
    except (GlowFlowError, KeyError):  # it is damaged: whoever resumes will be told
        return 0


def _explain(job: Job, error: BaseException) -> BaseException:
    """The user's error as it is; any other as one line, with its traceback in RUN/logs/error.txt."""
    if isinstance(error, GlowFlowError) and not isinstance(error, TrainingFailed):
        return error
    path = job.run_dir / "logs" / ERROR_NAME
    if isinstance(error, TrainingFailed):
        reason, text = str(error), error.worker_traceback
    else:
        reason, text = f"{type(error).__name__}: {_first_line(error)}", None
    path.write_text(text or "".join(traceback.format_exception(error)), encoding="utf-8")
    hint = f"the traceback is in {path}; after mending it: glowflow train --resume {job.run_dir.name}"
    return TrainingFailed(Problem(f"run {job.run_dir.name}", f"training failed: {reason}", hint=hint))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


# -- the tracker ------------------------------------------------------------------------------------------------------


def _open_tracking(job: Job) -> None:
    """Make the MLflow run, or take up the one that a resumed run has."""
    if job.tracking_uri is None:
        return
    from glowflow.tracking.mlflow import create_run, dataset_refs

    fingerprints = {f"glowflow.{name}_fingerprint": value for name, value in job.record.fingerprints.items()}
    tags = {**fingerprints, "glowflow.run_dir": str(job.run_dir), "glowflow.device": job.record.device}
    tags |= {f"glowflow.version.{name}": value for name, value in job.record.versions.items()}
    job.mlflow_run_id = create_run(
        job.run_dir,
        name=job.run_dir.name,
        config=to_dict(job.config),
        uri=job.tracking_uri,
        experiment=job.config.tracking.experiment,
        tags={**tags, **job.config.tracking.tags},
        datasets=dataset_refs(manifest for manifest, _ in job.sources),
        config_yaml=to_yaml(job.config),
    )
    job.record.mlflow_run_id = job.mlflow_run_id
    job.record.mlflow_uri = job.tracking_uri
    job.record.save(job.run_dir)


def _close_tracking(job: Job, status: RunStatus) -> None:
    """Send what is left of the spool and set the status; whoever wrote during training has stopped by now."""
    from glowflow.tracking.request import RunRequest

    if job.tracking_uri is None or RunRequest.load(job.run_dir) is None:
        return
    from glowflow.tracking.mlflow import MlflowFollower

    follower = MlflowFollower(job.run_dir)
    follower.start()
    follower.finish(status, timeout=_FINISH_SECONDS)
    job.record.mlflow_run_id = follower.run_id or job.record.mlflow_run_id
