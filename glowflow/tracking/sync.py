"""Brings MLflow level with a run directory: what the tracker lacks is sent, nothing is sent twice.

The tracker itself is asked which steps of each metric it has; the spool says which there should be.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.tracking.base import Point
from glowflow.tracking.client import connect, default_uri, flatten, redact, sqlite_path
from glowflow.tracking.files import write_json
from glowflow.tracking.follower import SENT_NAME
from glowflow.tracking.request import RunRequest, clean_name, ensure_run
from glowflow.tracking.runrecord import RunRecord, is_alive
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
    record = RunRecord.load(run_dir)
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
    if record.mlflow_run_id != request.run_id:
        replace(record, mlflow_run_id=request.run_id, mlflow_uri=redact(request.uri)).save(run_dir)
    return report


def _request(run_dir: Path, record: RunRecord, uri: str | None) -> RunRequest:
    """The request the run was begun with, or one made from run.json (backend jsonl)."""
    request = RunRequest.load(run_dir)
    if request is None:
        tracking = record.config.get("tracking", {})
        request = RunRequest(
            uri or default_uri(run_dir.parent, tracking.get("uri")),
            tracking.get("experiment", "glowflow"),
            record.run,
            tags={f"glowflow.{key}_fingerprint": str(value) for key, value in record.fingerprints.items()},
            params=flatten(record.config),
        )
        request.save(run_dir)
    if uri is not None and uri != request.uri:
        return replace(request, uri=uri, run_id=None, experiment_id=None)
    path = sqlite_path(request.uri)
    if path is not None and not path.exists() and (run_dir.parent / path.name).exists():
        # The storage was moved, its store with it: the run is known there.
        request = replace(request, uri=f"sqlite:///{run_dir.absolute().parent / path.name}")
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
    sent = len(lacking) - missing
    return SyncReport(request.name, request.run_id, sent, len(points) - len(lacking), missing, checkpoints)


def _lacking(client: MlflowClient, run_id: str, points: list[Point]) -> list[Point]:
    """The points whose (metric, step) the tracker has not, whatever value it has for the others."""
    have: dict[str, set[int]] = {}
    for name in sorted({clean_name(point.metric) for point in points}):
        have[name] = {metric.step for metric in client.get_metric_history(run_id, name)}
    return [point for point in points if point.step not in have[clean_name(point.metric)]]


def _set_status(client: MlflowClient, request: RunRequest, record: RunRecord, run_dir: Path) -> None:
    """The status of run.json; a run whose process died without a word is KILLED. A live one keeps RUNNING."""
    assert request.run_id is not None
    if record.status == "RUNNING" and is_alive(record, run_dir):
        return
    status = "KILLED" if record.status == "RUNNING" else record.status
    info = client.get_run(request.run_id).info
    if info.status != status:
        client.set_terminated(request.run_id, status, end_time=record.ended_ms())
    size = (run_dir / METRICS_NAME).stat().st_size if (run_dir / METRICS_NAME).exists() else 0
    write_json(run_dir / SENT_NAME, {"run_id": request.run_id, "offset": size})
