"""Sends what the spool holds to one MLflow run: points in batches, checkpoints as LoggedModels.

Sending the same again is harmless: MLflow's SQL store adds no row for an identical (key, value, timestamp, step), and
checkpoints are looked up by run and step before one is made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glowflow.tracking.base import CheckpointEvent, Point
from glowflow.tracking.client import PermanentTrackingError, is_permanent
from glowflow.tracking.request import clean_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MAX_BATCH", "CheckpointSender", "send_points"]

logger = logging.getLogger(__name__)

MAX_BATCH = 1000


def send_points(client: MlflowClient, run_id: str, points: Sequence[Point]) -> int:
    """Send points, at most 1000 to a request; one that MLflow refuses is named and left out.

    Returns:
        How many were taken.

    Raises:
        PermanentTrackingError: MLflow refuses everything (the run was deleted).
        Exception: the server cannot be reached; nothing is known of the last batch.
    """
    return sum(_send(client, run_id, points[i : i + MAX_BATCH]) for i in range(0, len(points), MAX_BATCH))


def _send(client: MlflowClient, run_id: str, points: Sequence[Point]) -> int:
    from mlflow.entities import Metric

    metrics = [Metric(clean_name(p.metric), p.value, p.timestamp_ms, p.step) for p in points]
    try:
        client.log_batch(run_id, metrics=metrics)
        return len(points)
    except Exception as error:
        if not is_permanent(error):
            raise
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST" or _is_gone(client, run_id):
            raise PermanentTrackingError(f"the MLflow run {run_id} was deleted") from error
        if len(points) > 1:  # one bad point refuses its whole batch: find it
            middle = len(points) // 2
            return _send(client, run_id, points[:middle]) + _send(client, run_id, points[middle:])
        logger.warning("MLflow refuses %s at step %d: %s", points[0].metric, points[0].step, error)
        return 0


def _is_gone(client: MlflowClient, run_id: str) -> bool:
    return str(client.get_run(run_id).info.lifecycle_stage) != "active"


class CheckpointSender:
    """Makes a LoggedModel for each checkpoint, one per (run, step).

    Args:
        run_name: first part of the models' names.
    """

    def __init__(self, client: MlflowClient, run_id: str, experiment: str, run_name: str) -> None:
        self._client, self._run_id, self._experiment = client, run_id, experiment
        self._run_name = run_name.rpartition("/")[2]
        self._known: dict[int, str] | None = None

    def known(self) -> dict[int, str]:
        """Step -> model id of the checkpoints that MLflow has."""
        if self._known is None:
            known: dict[int, str] = {}
            token: str | None = None
            while True:
                page = self._client.search_logged_models(
                    [self._experiment], filter_string=f"source_run_id = '{self._run_id}'", page_token=token
                )
                known.update({int(m.tags["step"]): m.model_id for m in page if m.tags.get("step", "").isdigit()})
                token = page.token
                if not token:
                    break
            self._known = known
        return self._known

    def send(self, events: Sequence[CheckpointEvent]) -> int:
        """Send those that MLflow lacks; returns how many."""
        new = [event for event in events if event.step not in self.known()]
        for event in new:
            tags = {"path": event.path, "step": str(event.step), "sha256": event.sha256 or ""}
            model = self._client.create_logged_model(
                self._experiment,
                name="".join("-" if c in "/:.%\"'" else c for c in f"{self._run_name}-step-{event.step}"),
                source_run_id=self._run_id,
                tags=tags,
                params={name: repr(value) for name, value in event.metrics.items()},
                model_type="glowflow-checkpoint",
            )
            self._client.finalize_logged_model(model.model_id, "READY")
            self.known()[event.step] = model.model_id
        return len(new)

    def mark_pruned(self, events: Sequence[CheckpointEvent]) -> None:
        """Tag the models whose checkpoint was removed since (keep-last-k)."""
        for event in events:
            if event.step in self.known() and not Path(event.path).exists():
                self._client.set_logged_model_tags(self.known()[event.step], {"pruned": "true"})
