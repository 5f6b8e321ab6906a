"""Questions about runs: list and show. Plain dicts come out (``--json``); ``tables`` makes text of them.

MLflow is asked where it can be reached; the run directories answer for the rest, and alone where it cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, RunError
from glowflow.tracking.client import connect, default_uri, redact, sqlite_path
from glowflow.tracking.curves import last_step
from glowflow.tracking.reading import TRIAL_STATUS_TAG, MlflowRun, collector_off, find_runs
from glowflow.tracking.request import KIND_TAG, SWEEP_TAG, TOKEN_TAG, RunRequest
from glowflow.tracking.runrecord import RunRecord, display_status, find_run, iter_runs, run_name, storage_of
from glowflow.tracking.spool import METRICS_NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["list_runs", "show_run"]

logger = logging.getLogger(__name__)


def list_runs(
    storage: str | Path,
    *,
    uri: str | None = None,
    experiment: str | None = None,
    sweep: str | None = None,
    statuses: Collection[str] = (),
    limit: int | None = None,
    use_mlflow: bool = True,
) -> list[dict[str, Any]]:
    """The runs in MLflow and in ``storage``, newest first; the trials of sweeps among them.

    Args:
        experiment: only runs of this MLflow experiment.
        sweep: only the trials of this sweep.
        statuses: only runs with one of these.
        limit: at most so many.
        use_mlflow: False reads run directories only, at once.

    Returns:
        One dict a run: run (SWEEP/TRIAL for a trial), status, started, seconds, steps, train_loss, val_loss, sweep,
        mlflow_run_id, directory (None for runs made elsewhere), source (``mlflow`` or ``directory``).
    """
    rows = {row["run"]: row for row in map(_from_directory, iter_runs(storage)) if row is not None}
    if experiment is not None:
        rows = {name: row for name, row in rows.items() if row["experiment"] == experiment}
    ids = {row["mlflow_run_id"]: name for name, row in rows.items() if row["mlflow_run_id"]}
    for run in _search(default_uri(storage, uri), experiment) if use_mlflow else []:
        name = ids.get(run.run_id)
        if name is not None:  # the directory knows more and died with the process; MLflow confirms that it has the run
            rows[name]["source"] = "mlflow"
        elif run.tags.get(KIND_TAG) != "sweep":
            rows[f"mlflow:{run.run_id}"] = _from_mlflow(run)
    for row in rows.values():
        row.pop("experiment", None)
    chosen = [row for row in rows.values() if sweep in (None, row["sweep"])]
    chosen = [row for row in chosen if not statuses or row["status"] in statuses]
    return sorted(chosen, key=lambda row: row["started"] or "", reverse=True)[:limit]


def _from_directory(run_dir: Path) -> dict[str, Any] | None:
    try:
        record = RunRecord.load(run_dir)
    except RunError as error:
        logger.warning("%s", error)
        return None
    request = RunRequest.load(run_dir)
    status = display_status(record, run_dir)
    if status == "KILLED" and request is not None and request.late_tags.get(TRIAL_STATUS_TAG) == "STOPPED":
        status = "STOPPED"
    is_trial = storage_of(run_dir) != run_dir.parent
    return {
        "run": run_name(run_dir),
        "status": status,
        "started": record.started,
        "seconds": record.seconds,
        "steps": record.steps,
        "train_loss": record.final.get("train_loss"),
        "val_loss": record.final.get("val_loss"),
        "sweep": run_dir.parent.name if is_trial else None,
        "mlflow_run_id": record.mlflow_run_id or (request.run_id if request else None),
        "directory": str(run_dir),
        "source": "directory",
        "experiment": record.config.get("tracking", {}).get("experiment", "glowflow"),
    }


def _client(uri: str) -> MlflowClient | None:
    """A client, or None where the tracker is away or its SQLite file was never made (asking must not make it)."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    try:
        return connect(uri)
    except GlowFlowError:
        raise
    except Exception as error:
        logger.warning("MLflow does not answer at %s, run directories only: %s", redact(uri), error)
        return None


def _search(uri: str, experiment: str | None) -> list[MlflowRun]:
    with collector_off():
        client = _client(uri)
        if client is None:
            return []
        try:
            return find_runs(client, experiment, f"tags.`{TOKEN_TAG}` != ''")
        except Exception as error:
            logger.warning("MLflow does not answer at %s, run directories only: %s", redact(uri), error)
            return []


def _from_mlflow(run: MlflowRun) -> dict[str, Any]:
    return {
        "run": run.name,
        "status": run.status,
        "started": _iso(run.started_ms),
        "seconds": (run.ended_ms - run.started_ms) / 1000 if run.ended_ms and run.started_ms else None,
        "steps": run.steps,
        "train_loss": run.metrics.get("train_loss"),
        "val_loss": run.metrics.get("val_loss"),
        "sweep": run.tags.get(SWEEP_TAG),
        "mlflow_run_id": run.run_id,
        "directory": None,
        "source": "mlflow",
    }


def _iso(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="milliseconds")


def show_run(storage: str | Path, name: str, *, uri: str | None = None, use_mlflow: bool = False) -> dict[str, Any]:
    """run.json of a run, its status checked against its process.

    Args:
        use_mlflow: add ``mlflow``: status, metrics and tags as the tracker has them (None where it is away).

    Raises:
        RunError: there is no such run.
    """
    run_dir = find_run(storage, name)
    record = RunRecord.load(run_dir)
    shown = record.to_dict() | {"run": run_name(run_dir), "directory": str(run_dir)}
    shown["alive"] = display_status(record, run_dir) == "RUNNING"
    request = RunRequest.load(run_dir)
    if request is not None and request.run_id is not None:
        shown["mlflow_run_id"] = request.run_id
    if record.status == "RUNNING":
        # run.json is written at the start and at the end: in between the curves know how far it is.
        shown["steps"] = max(record.steps, last_step(run_dir / METRICS_NAME) or 0)
    if use_mlflow:
        store = uri or (request.uri if request is not None else default_uri(storage))
        shown["mlflow"] = _mlflow_view(store, shown["mlflow_run_id"])
    return shown


def _mlflow_view(uri: str, run_id: str | None) -> dict[str, Any] | None:
    client = _client(uri)
    if client is None or run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except Exception as error:
        logger.warning("MLflow does not know the run: %s", error)
        return None
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    return {"status": run.info.status, "metrics": dict(run.data.metrics), "tags": tags}
