"""Brings MLflow level with a run directory: what the tracker lacks is sent, nothing is sent twice.

The tracker itself is asked which steps of each metric it has; the spool says which there should be.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.tracking.base import Point, RunStatus
from glowflow.tracking.client import connect, default_uri, flatten, redact, sqlite_path
from glowflow.tracking.follower import send_artifacts, terminate
from glowflow.tracking.request import RunRequest, check_parent, clean_name, ensure_run, send_late_tags
from glowflow.tracking.runrecord import RECORD_NAME, RunRecord, is_alive, is_live, run_name, storage_of
from glowflow.tracking.sender import CheckpointSender, send_points
from glowflow.tracking.spool import CHECKPOINTS_NAME, METRICS_NAME, read_checkpoints, read_points

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["SyncReport", "sync"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: points sent, points the tracker had, points it still lacks (refused)."""

    run: str
    mlflow_run_id: str
    sent: int
    already: int
    missing: int
    checkpoints_sent: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sync(run_dir: str | Path, *, uri: str | None = None) -> SyncReport:
    """Send what MLflow lacks of a run, make the run there if it never could be, and set its status.

    Args:
        run_dir: the run directory.
        uri: another store than the one the run was begun with.

    Raises:
        RunError: no such run, or the tracker cannot be reached or refuses it.
    """
    run_dir = Path(run_dir)
    record = _record(run_dir)
    request = _request(run_dir, record, uri)
    try:
        client = connect(request.uri)
        request = ensure_run(client, request, run_dir)
        report = _level(client, request, run_dir)
        _set_status(client, request, record, run_dir)
    except GlowFlowError:
        raise
    except Exception as error:
        hint = "start the server and repeat; nothing is lost, the metrics are in the run directory"
        raise RunError(
            Problem("tracking.uri", f"MLflow cannot be brought level: {error}", redact(request.uri), hint)
        ) from error
    if record is not None and record.mlflow_run_id != request.run_id:
        replace(record, mlflow_run_id=request.run_id, mlflow_uri=redact(request.uri)).save(run_dir)
    return report


def _record(run_dir: Path) -> RunRecord | None:
    """run.json; None for a sweep, and for a trial that was asked for and never began."""
    if not (run_dir / RECORD_NAME).is_file() and RunRequest.load(run_dir) is not None:
        return None
    return RunRecord.load(run_dir)


def _request(run_dir: Path, record: RunRecord | None, uri: str | None) -> RunRequest:
    """The request the run was begun with, or one made from run.json (backend jsonl)."""
    request, storage = RunRequest.load(run_dir), storage_of(run_dir)
    if request is None:
        assert record is not None
        tracking = record.config.get("tracking", {})
        request = RunRequest(
            uri or default_uri(storage, tracking.get("uri")),
            tracking.get("experiment", "glowflow"),
            run_name(run_dir),
            tags={f"glowflow.{key}_fingerprint": str(value) for key, value in record.fingerprints.items()},
            params=flatten(record.config),
            start_ms=record.started_ms(),
            parent=".." if storage != run_dir.absolute().parent else None,
        )
        request.save(run_dir)
    if uri is not None:
        return request.at(uri)
    path = sqlite_path(request.uri)
    if path is not None and not path.exists() and (storage / path.name).exists():
        # The storage was moved, its store with it: the run is known there.
        request = replace(request, uri=f"sqlite:///{storage / path.name}")
        request.save(run_dir)
    return request


def _level(client: MlflowClient, request: RunRequest, run_dir: Path) -> SyncReport:
    assert request.run_id is not None and request.experiment_id is not None
    points = read_points(run_dir / METRICS_NAME)
    lacking = _lacking(client, request.run_id, points)
    send_points(client, request.run_id, lacking)
    missing = len(_lacking(client, request.run_id, lacking)) if lacking else 0
    sender = CheckpointSender(client, request.run_id, request.experiment_id, request.name)
    events = read_checkpoints(run_dir / CHECKPOINTS_NAME)
    checkpoints = sender.send(events)
    sender.mark_pruned(events)
    have = client.get_run(request.run_id).data.tags
    send_late_tags(client, request, have)
    check_parent(client, request, run_dir, have)
    send_artifacts(client, request, run_dir)
    sent = len(lacking) - missing
    return SyncReport(request.name, request.run_id, sent, len(points) - len(lacking), missing, checkpoints)


def _lacking(client: MlflowClient, run_id: str, points: list[Point]) -> list[Point]:
    """The points whose (metric, step) the tracker has not, whatever value it has for the others."""
    have: dict[str, set[int]] = {}
    for name in sorted({clean_name(point.metric) for point in points}):
        have[name] = {metric.step for metric in client.get_metric_history(run_id, name)}
    return [point for point in points if point.step not in have[clean_name(point.metric)]]


def _set_status(client: MlflowClient, request: RunRequest, record: RunRecord | None, run_dir: Path) -> None:
    """The status its owner left behind; a run whose process died without a word is KILLED. A live one keeps RUNNING."""
    status = _status(request, record, run_dir)
    if status == "RUNNING":
        return
    info = client.get_run(str(request.run_id)).info
    ended = request.ended_ms or (record.ended_ms() if record is not None else None)
    if ended is None and info.status == status:
        ended = info.end_time  # a dead run died before it was looked at for the first time
    size = (run_dir / METRICS_NAME).stat().st_size if (run_dir / METRICS_NAME).exists() else 0
    terminate(client, replace(request, ended_ms=ended), run_dir, status, size)


def _status(request: RunRequest, record: RunRecord | None, run_dir: Path) -> RunStatus:
    if request.status is not None:
        return request.status
    if record is not None and record.status != "RUNNING":
        return record.status
    alive = record is not None and is_alive(record, run_dir)
    owned = request.process is not None and is_live(request.process, run_dir)
    return "RUNNING" if alive or owned else "KILLED"
