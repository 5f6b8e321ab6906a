"""MLflow runs: made by the driver, fed from the spool by a background thread, brought level by ``sync``.

Two ways to use it. In one process: ``create_run`` and then an ``MlflowTracker``. Under Ray: ``create_run`` and an
``MlflowFollower`` on the driver, the one writer of a SQLite store, while rank 0 writes the spool in the (shared) run
directory through a ``JsonlTracker``; training then never touches MLflow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from glowflow.config.errors import PreflightError, Problem
from glowflow.tracking.base import RunStatus
from glowflow.tracking.client import PermanentTrackingError, connect, default_uri, flatten, redact
from glowflow.tracking.follower import Link, MlflowFollower
from glowflow.tracking.jsonl import JsonlTracker
from glowflow.tracking.request import DatasetRef, RunRequest, check_parent, ensure_run

__all__ = ["DatasetRef", "ManifestLike", "MlflowFollower", "MlflowTracker", "create_run", "dataset_refs", "default_uri"]

logger = logging.getLogger(__name__)


class ManifestLike(Protocol):
    """What tracking reads of a data manifest."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...


def dataset_refs(manifests: Iterable[ManifestLike], context: str = "training") -> list[DatasetRef]:
    """Manifests as MLflow data sets; the digest is the manifest's fingerprint."""
    return [DatasetRef(m.name, m.fingerprint, str(m.root), context) for m in manifests]


def create_run(
    run_dir: str | Path,
    *,
    name: str,
    config: Mapping[str, Any],
    uri: str,
    experiment: str = "glowflow",
    tags: Mapping[str, object] | None = None,
    datasets: Sequence[DatasetRef] = (),
    config_yaml: str | None = None,
    parent: str | None = None,
    process: Mapping[str, Any] | None = None,
    link: Link | None = None,
) -> str | None:
    """Make the MLflow run of a run directory, or take up the one it has (a resumed run goes on in it).

    Args:
        config: the whole config; it becomes the run's params, flattened.
        tags: fingerprints, code version, the user's own; None values are left out.
        config_yaml: kept as the artifact ``config.yaml``.
        parent: directory of the run of which this one is a child, relative to ``run_dir``.
        process: who owns the run where run.json does not say so (``this_process``).
        link: to a store that is shared; where it is known to be away, nothing is tried now.

    Returns:
        The MLflow run id; None where the tracker is down: the background thread or ``sync`` makes the run later.

    Raises:
        PreflightError: this URI or experiment can never work.
    """
    run_dir = Path(run_dir)
    params = flatten(config)
    if "tracking.uri" in params:
        params["tracking.uri"] = str(redact(params["tracking.uri"]))
    strings = {str(key): str(value) for key, value in (tags or {}).items() if value is not None}
    known = RunRequest.load(run_dir)
    about = {"tags": strings, "params": params, "datasets": datasets, "config_yaml": config_yaml, "parent": parent}
    now = int(time.time() * 1000)  # the run begins now, whenever it can be made
    request = (known or RunRequest(uri, experiment, name, start_ms=now, **about)).at(uri)  # type: ignore[arg-type]
    have = {**request.tags, **request.late_tags}
    late = {key: value for key, value in strings.items() if have.get(key) != value} if process else {}
    late = {**request.late_tags, **late}
    request = replace(request, process=process, status=None, ended_ms=None, told=None, late_tags=late)
    link = link or Link()
    if known is not None or link.away:
        request.save(run_dir)
    try:
        return request.run_id if link.away else _take_up(link, request, run_dir)
    except PermanentTrackingError as error:
        raise PreflightError(Problem("tracking.experiment", str(error), experiment)) from error
    except PreflightError:
        raise
    except Exception as error:
        request.save(run_dir)
        link.lost(error, f"MLflow does not answer at {redact(uri)}; the run is recorded in {run_dir}")
        return request.run_id


def _take_up(link: Link, request: RunRequest, run_dir: Path) -> str:
    """Make the run, or open the one that was made."""
    client = connect(request.uri)
    with link.turn:
        run = ensure_run(client, request, run_dir)
        client.update_run(str(run.run_id), status="RUNNING")
        if request.run_id is not None and run.parent is not None:
            check_parent(client, run, run_dir, client.get_run(request.run_id).data.tags)
    link.found()
    return str(run.run_id)


class MlflowTracker(JsonlTracker):
    """The run directory first, then MLflow from a background thread.

    Args:
        uri: for the record; the store is the one that ``create_run`` was given.
        run_id: what ``create_run`` returned (None: the thread makes the run when the tracker answers).
        run_dir: the run directory.
        finish_timeout: seconds that ``finish`` waits at most for the tracker.
    """

    def __init__(
        self,
        uri: str,
        run_id: str | None,
        run_dir: str | Path,
        *,
        interval: float = 2.0,
        max_backoff: float = 60.0,
        finish_timeout: float = 15.0,
        system_metrics: bool = False,
        system_interval: float = 10.0,
    ) -> None:
        super().__init__(run_dir, system_metrics=system_metrics, system_interval=system_interval)
        self._finish_timeout = finish_timeout
        if RunRequest.load(self.run_dir) is None:  # a run that somebody else made
            RunRequest(uri, "glowflow", self.run_dir.name, run_id=run_id).save(self.run_dir)
        self._follower = MlflowFollower(self.run_dir, interval=interval, max_backoff=max_backoff)
        self._follower.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None as long as the tracker could not be reached."""
        return self._follower.run_id

    def finish(self, status: RunStatus) -> None:
        super().finish(status)
        self._follower.finish(status, self._finish_timeout)

    def close(self) -> None:
        self._follower.close()
        super().close()
