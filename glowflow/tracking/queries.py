"""Questions about runs: list, show, compare. Plain dicts come out (``--json``); ``tables`` makes text of them.

MLflow is asked where it can be reached; the run directories answer for the rest, and alone where it cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.tracking.client import connect, default_uri, flatten, redact, sqlite_path
from glowflow.tracking.request import TOKEN_TAG, RunRequest
from glowflow.tracking.runrecord import RunRecord, display_status, find_run, iter_runs
from glowflow.tracking.spool import METRICS_NAME, curves

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["compare_runs", "list_runs", "show_run"]

logger = logging.getLogger(__name__)


def list_runs(
    storage: str | Path, *, uri: str | None = None, experiment: str | None = None, use_mlflow: bool = True
) -> list[dict[str, Any]]:
    """The runs in MLflow and in ``storage``, newest first.

    Args:
        experiment: only runs of this MLflow experiment.
        use_mlflow: False reads run directories only, at once.

    Returns:
        One dict a run: run, status, started, seconds, steps, train_loss, val_loss, mlflow_run_id, directory (None
        for runs made elsewhere), source (``mlflow`` or ``directory``).
    """
    rows = {row["run"]: row for row in map(_from_directory, iter_runs(storage)) if row is not None}
    if experiment is not None:
        rows = {name: row for name, row in rows.items() if row.pop("experiment", experiment) == experiment}
    ids = {row["mlflow_run_id"]: name for name, row in rows.items() if row["mlflow_run_id"]}
    for found in _search(default_uri(storage, uri), experiment) if use_mlflow else []:
        name = ids.get(found["mlflow_run_id"])
        if name is None:
            rows[f"mlflow:{found['mlflow_run_id']}"] = found
        else:  # the directory knows more and died with the process; MLflow confirms that it has the run
            rows[name]["source"] = "mlflow"
    for row in rows.values():
        row.pop("experiment", None)
    return sorted(rows.values(), key=lambda row: row["started"] or "", reverse=True)


def _from_directory(run_dir: Path) -> dict[str, Any] | None:
    try:
        record = RunRecord.load(run_dir)
    except RunError as error:
        logger.warning("%s", error)
        return None
    request = RunRequest.load(run_dir)
    return {
        "run": record.run,
        "status": display_status(record, run_dir),
        "started": record.started,
        "seconds": record.seconds,
        "steps": record.steps,
        "train_loss": record.final.get("train_loss"),
        "val_loss": record.final.get("val_loss"),
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


def _search(uri: str, experiment: str | None) -> list[dict[str, Any]]:
    client = _client(uri)
    if client is None:
        return []
    try:
        experiments = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
        runs: list[Any] = []
        token = None
        while experiments:
            page = client.search_runs(experiments, f"tags.`{TOKEN_TAG}` != ''", max_results=1000, page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                break
    except Exception as error:
        logger.warning("MLflow does not answer at %s, run directories only: %s", redact(uri), error)
        return []
    return [_from_mlflow(run) for run in runs]


def _from_mlflow(run: Any) -> dict[str, Any]:
    info, metrics = run.info, run.data.metrics
    seconds = None if not info.end_time else (info.end_time - info.start_time) / 1000
    steps = metrics.get("steps")
    return {
        "run": info.run_name,
        "status": info.status,
        "started": _iso(info.start_time),
        "seconds": seconds,
        "steps": None if steps is None else int(steps),
        "train_loss": metrics.get("train_loss"),
        "val_loss": metrics.get("val_loss"),
        "mlflow_run_id": info.run_id,
        "directory": None,
        "source": "mlflow",
    }


def _iso(milliseconds: int | None) -> str | None:
    from datetime import datetime, timezone

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
    shown = record.to_dict() | {"directory": str(run_dir), "alive": record.status == "RUNNING"}
    request = RunRequest.load(run_dir)
    if request is not None and request.run_id is not None:
        shown["mlflow_run_id"] = request.run_id
    if display_status(record, run_dir) != record.status:
        shown["alive"] = False
    if record.status == "RUNNING":
        # run.json is written at the start and at the end: in between the curves know how far it is.
        shown["steps"] = max(record.steps, max(curves(run_dir / METRICS_NAME).get("train_loss", {}), default=0))
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


def compare_runs(storage: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """What differs between runs, and what each arrived at.

    Returns:
        ``runs`` (names), ``config`` (dotted key -> one value per run, only keys that differ), ``metrics`` (name -> one
        final value per run, None where a run has none), ``best`` likewise, ``last_step`` (of each curve's spool).

    Raises:
        RunError: a run is unknown; all unknown ones are named.
    """
    directories: list[Path] = []
    problems: list[Problem] = []
    for name in names:
        try:
            directories.append(find_run(storage, name))
        except RunError as error:
            problems.extend(error.problems)
    if problems:
        raise RunError(problems)
    records = [RunRecord.load(directory) for directory in directories]
    configs = [flatten(record.config) for record in records]
    last = [curves(directory / METRICS_NAME).get("train_loss", {}) for directory in directories]
    return {
        "runs": [record.run for record in records],
        "status": [display_status(record, path) for record, path in zip(records, directories, strict=True)],
        "config": {key: values for key, values in _columns(configs).items() if len(set(values)) > 1},
        "metrics": _columns([record.to_dict()["final"] for record in records]),
        "best": _columns([record.to_dict()["best"] for record in records]),
        "tokens_per_second": [record.tokens_per_second for record in records],
        "last_step": [max(curve, default=None) for curve in last],
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Mappings side by side: key -> one value per mapping, None where it lacks the key."""
    keys = sorted({key for row in rows for key in row})
    return {key: [row.get(key) for row in rows] for key in keys}
