"""A sweep in MLflow: one parent run, one child per trial, all written by the process that drives the sweep.

Each run has its wish in its directory (``RUN/.mlflow.json``) and a follower that brings MLflow level with the spool,
exactly as a run of its own has; the wish of a child names the directory of its parent, so whoever reaches the tracker
first makes both, in the right order. Nothing here raises because a tracker is away, and everything may be repeated.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.config.yaml12 import dump_yaml
from glowflow.tracking.base import Point, RunStatus
from glowflow.tracking.client import default_uri, flatten
from glowflow.tracking.files import read_json
from glowflow.tracking.follower import SENT_NAME, Link, MlflowFollower
from glowflow.tracking.mlflow import create_run
from glowflow.tracking.reading import StoreReader, parse_param
from glowflow.tracking.request import KIND_TAG, STATE_NAME, DatasetRef, RunRequest, change_request
from glowflow.tracking.runrecord import JOURNAL_NAME, RECORD_NAME, this_process
from glowflow.tracking.spool import METRICS_NAME, Spool
from glowflow.tracking.sync import SyncReport, sync

__all__ = ["SweepTracking", "history_from_mlflow", "open_sweep_tracking", "sync_sweep"]

logger = logging.getLogger(__name__)

_FINISH_SECONDS = 15.0
_AWAY_SECONDS = 0.5


def open_sweep_tracking(
    sweep_dir: str | Path,
    *,
    name: str,
    uri: str,
    experiment: str = "glowflow",
    config: Mapping[str, Any],
    space: Mapping[str, Any],
    tags: Mapping[str, object] | None = None,
) -> SweepTracking:
    """Make the parent run of a sweep, or take up the one it has.

    Args:
        sweep_dir: an existing directory.
        name: of the run in MLflow.
        uri: the store.
        experiment: of the parent and its trials.
        config: what all trials share; the artifact ``config.yaml`` of the parent.
        space: what is searched; the parent's params, under ``space.``.
        tags: None values are left out.

    Raises:
        PreflightError: this URI or experiment can never work.
    """
    sweep_dir = Path(sweep_dir).absolute()
    link = Link(uri)
    create_run(
        sweep_dir,
        name=name,
        config={"space": space},
        uri=uri,
        experiment=experiment,
        tags={**(tags or {}), KIND_TAG: "sweep"},
        config_yaml=dump_yaml(dict(config)),
        process=this_process(),
        link=link,
    )
    return SweepTracking(sweep_dir, uri, experiment, link)


class SweepTracking:
    """The MLflow runs of one sweep; see ``open_sweep_tracking``. Any thread may call it.

    Args:
        sweep_dir: with the request of the parent run.
        uri: the store of all runs.
        experiment: theirs.
        link: to the store.
    """

    def __init__(self, sweep_dir: Path, uri: str, experiment: str, link: Link) -> None:
        self.sweep_dir = sweep_dir
        self._uri, self._experiment, self._link = uri, experiment, link
        self._lock = threading.Lock()
        self._trials: dict[Path, MlflowFollower] = {}
        self._spool = Spool(sweep_dir / METRICS_NAME)
        self._parent = MlflowFollower(sweep_dir, link=link)
        self._parent.start()
        self._level: bool | None = None

    @property
    def run_id(self) -> str | None:
        """The parent's MLflow run, None as long as the tracker could not be reached."""
        request = RunRequest.load(self.sweep_dir)
        return None if request is None else request.run_id

    def tag(self, tags: Mapping[str, object]) -> None:
        """Set tags of the parent run."""
        _tag(self.sweep_dir, tags)
        self._parent.wake()

    def log_sweep_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of the whole sweep; each step of each once. Without a step: the one behind the metric's last."""
        now = int(time.time() * 1000)
        points = [Point(name, self._next(name) if step is None else step, float(v), now) for name, v in metrics.items()]
        try:
            self._spool.append(points)
        except OSError as error:
            logger.warning("metrics cannot be written to %s: %s", self.sweep_dir, error)

    def _next(self, metric: str) -> int:
        last = self._spool.last_step(metric)
        return 0 if last is None else last + 1

    def log_artifacts(self, folder: str | Path, artifact_path: str = "report") -> None:
        """Send the files of a folder to the parent run; call it again after they have changed."""
        folder = Path(folder).absolute()
        if not folder.is_dir():
            logger.warning("there is no %s to send to MLflow", folder)
            return
        inside = folder.relative_to(self.sweep_dir) if folder.is_relative_to(self.sweep_dir) else folder
        waiting = {artifact_path: inside.as_posix()}
        change_request(self.sweep_dir, lambda r: replace(r, artifacts={**r.artifacts, **waiting}))

    def open_trial(
        self,
        run_dir: str | Path,
        *,
        name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, object] | None = None,
        datasets: Sequence[DatasetRef] = (),
        config_yaml: str | None = None,
    ) -> str | None:
        """Make the child run of a trial, or take up the one it has, and follow its spool.

        Args:
            run_dir: the trial's directory in the sweep's; made if it is not there.
            name, config, tags, datasets, config_yaml: as for ``create_run``; tags of a run that exists are replaced.

        Returns:
            The MLflow run id; None where the tracker is away: the run is made when it answers.
        """
        run_dir = Path(run_dir).absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        run_id = create_run(
            run_dir,
            name=name,
            config=config,
            uri=self._uri,
            experiment=self._experiment,
            tags=tags,
            datasets=datasets,
            config_yaml=config_yaml,
            parent="..",
            process=this_process(),
            link=self._link,
        )
        with self._lock:
            if run_dir not in self._trials:
                self._trials[run_dir] = MlflowFollower(run_dir, link=self._link)
                self._trials[run_dir].start()
        return run_id

    def tag_trial(self, run_dir: str | Path, tags: Mapping[str, object]) -> None:
        """Set tags of a child run, also of one that is closed."""
        run_dir = Path(run_dir).absolute()
        _tag(run_dir, tags)
        with self._lock:
            follower = self._trials.get(run_dir)
        if follower is not None:
            follower.wake()

    def close_trial(self, run_dir: str | Path, status: str, timeout: float = _FINISH_SECONDS) -> bool:
        """Send the rest of a trial's spool, set its status, and end its thread; also for one of an earlier driver.

        Args:
            status: FINISHED, STOPPED (by the scheduler: KILLED in MLflow), FAILED or KILLED.
            timeout: seconds to wait at most for a tracker that answers.

        Returns:
            Whether MLflow has everything; if not, ``close`` tries again, and then ``glowflow runs sync SWEEP``.
        """
        run_dir = Path(run_dir).absolute()
        final = _mlflow_status(status)
        if _end(run_dir, final) is None:
            return False
        with self._lock:
            follower = self._trials.pop(run_dir, None)
        if follower is None:
            follower = MlflowFollower(run_dir, link=self._link)
            follower.start()
        # A tracker that is away is waited for by the parent's follower alone.
        return follower.finish(final, 0.0 if self._link.away else timeout, quiet=True)

    def close(self, status: str, timeout: float = 2 * _FINISH_SECONDS) -> bool:
        """End every run of the family: trials that are still open as KILLED, then the parent; may be called again.

        Args:
            status: of the parent, as for ``close_trial``.
            timeout: seconds to wait at most for each run, while the tracker answers.

        Returns:
            Whether MLflow has everything.
        """
        if self._level is not None:
            return self._level
        with self._lock:
            still_open = list(self._trials)
        for run_dir in still_open:
            self.close_trial(run_dir, "KILLED", timeout)
        behind = [run_dir for run_dir in _children(self.sweep_dir) if not _is_level(run_dir)]
        lacking = sum(not self._make_level(run_dir) for run_dir in behind)
        final = _mlflow_status(status)
        _end(self.sweep_dir, final)
        done = self._parent.finish(final, _AWAY_SECONDS if self._link.away else timeout, quiet=True)
        self._spool.close()
        if lacking or not done:
            text = "MLflow lacks something of the sweep and %d of its trials: `glowflow runs sync %s` makes up for it"
            logger.warning(text, lacking, self.sweep_dir.name)
        self._level = done and not lacking
        return self._level

    def _make_level(self, run_dir: Path) -> bool:
        """Send what a tracker that was away, or an earlier driver that died, left behind of a trial that is over."""
        request, record = RunRequest.load(run_dir), read_json(run_dir / RECORD_NAME) or {}
        if request is not None and request.status is None:
            _end(run_dir, _mlflow_status(record.get("status", "KILLED")))
        if self._link.away:
            return False
        try:
            with self._link.turn:
                return sync(run_dir, uri=self._uri).missing == 0
        except GlowFlowError as error:
            self._link.lost(error)
            return False


def _tag(run_dir: Path, tags: Mapping[str, object]) -> None:
    strings = {str(key): str(value) for key, value in tags.items() if value is not None}
    change_request(run_dir, lambda r: replace(r, late_tags={**r.late_tags, **strings}, told=None))


def _end(run_dir: Path, status: RunStatus) -> RunRequest | None:
    """Write the end down first: whoever sends it later finds it."""
    now = int(time.time() * 1000)
    return change_request(run_dir, lambda r: replace(r, status=status, ended_ms=now, told=None))


def _mlflow_status(status: str) -> RunStatus:
    """MLflow has no word for a trial that a scheduler stopped; the trial's tags say it."""
    known: dict[str, RunStatus] = {"FINISHED": "FINISHED", "FAILED": "FAILED"}
    return known.get(status, "KILLED")


def _children(sweep_dir: Path) -> Iterator[Path]:
    """The directories of trials that are, or can be, in MLflow."""
    found = {path.parent for name in (STATE_NAME, RECORD_NAME) for path in sweep_dir.glob(f"*/{name}")}
    yield from sorted(found)


def _is_level(run_dir: Path) -> bool:
    """Whether MLflow was told how the run ended after it got everything, as far as the files here know."""
    request = RunRequest.load(run_dir)
    if request is None or request.told is None:
        return False
    spool = run_dir / METRICS_NAME
    hint = read_json(run_dir / SENT_NAME) or {}
    sent = hint.get("offset", 0) if hint.get("run_id") == request.run_id else 0
    return not spool.exists() or spool.stat().st_size <= sent


def sync_sweep(sweep_dir: str | Path, *, uri: str | None = None) -> list[SyncReport]:
    """Bring MLflow level with a sweep: the parent run, then all its trials; none whose process is gone stays RUNNING.

    Args:
        sweep_dir: the sweep's directory.
        uri: another store than the one the sweep was begun with.

    Returns:
        What was done, the parent first.

    Raises:
        RunError: the tracker cannot be reached, or it refuses some of the runs; the others are level.
    """
    sweep_dir = Path(sweep_dir).absolute()
    if RunRequest.load(sweep_dir) is None:
        _parent_request(sweep_dir, uri).save(sweep_dir)
    reports = [sync(sweep_dir, uri=uri)]  # first: an unreachable tracker is found out here
    problems: list[Problem] = []
    for run_dir in _children(sweep_dir):
        try:
            reports.append(sync(run_dir, uri=uri))
        except RunError as error:
            problems += [replace(problem, key=f"{sweep_dir.name}/{run_dir.name}") for problem in error.problems]
    if problems:
        raise RunError(problems, title="MLflow refuses some of the trials")
    return reports


def _parent_request(sweep_dir: Path, uri: str | None) -> RunRequest:
    """The wish for the parent of a sweep that was run without MLflow, from the first line of its journal."""
    try:
        with open(sweep_dir / JOURNAL_NAME, encoding="utf-8") as file:
            about = json.loads(file.readline())
        tracking, space = about["config"].get("tracking", {}), about["space"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"cannot be read, so this is no sweep ({type(error).__name__})"
        raise RunError(Problem(str(sweep_dir / JOURNAL_NAME), rule)) from error
    return RunRequest(
        uri or default_uri(sweep_dir.parent, tracking.get("uri")),
        tracking.get("experiment", "glowflow"),
        sweep_dir.name,
        tags={KIND_TAG: "sweep"},
        params=flatten({"space": space}),
        config_yaml=dump_yaml(about["config"]),
    )


def history_from_mlflow(
    uri: str, experiment: str, keys: Sequence[str], fixed: Mapping[str, Any], metrics: Sequence[str]
) -> list[tuple[dict[str, Any], list[float]]]:
    """What earlier runs of the same config family arrived at, for a warm start.

    Args:
        uri: the store.
        experiment: its name.
        keys: config keys that a run must have.
        fixed: config keys whose values a run must share.
        metrics: a run must have a finite last value of each.

    Returns:
        For each run that trained to its end: the values of ``keys``, and the last value of each metric.

    Raises:
        RunError: the store cannot be reached, or has no such experiment.
    """
    wanted = {key: parse_param(str(value)) for key, value in fixed.items()}
    history = []
    for run in StoreReader(uri).runs(experiment, "attributes.status = 'FINISHED'"):
        values = [run.metrics.get(name, math.nan) for name in metrics]
        if run.tags.get(KIND_TAG) == "sweep" or not all(map(math.isfinite, values)):
            continue
        if all(key in run.params for key in keys) and all(run.params.get(k) == v for k, v in wanted.items()):
            history.append(({key: run.params[key] for key in keys}, values))
    return history
