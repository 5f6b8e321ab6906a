"""The state of a sweep: its journal's events, folded one after the other.

`SweepState.apply` takes one event as the journal holds it. Events and keys that this version does not know are passed
over, so that an older GlowFlow can read what a newer one wrote.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OVER", "SweepState", "Trial"]

logger = logging.getLogger(__name__)

OVER = ("FINISHED", "STOPPED", "FAILED")
"""States in which a trial is never run again; a KILLED one was cut off and goes on when the sweep is resumed."""


@dataclass
class Trial:
    """One training run of a sweep.

    Args:
        id: its directory in the sweep's: `003`, `003-s1`, `baseline-s0`.
        point: number of its point; the trials of a point differ by their seed.
        label: of a named variant.
        seed: training.seed.
        params: dotted config key -> value, as it trains now; population-based training changes them on the way.
        status: CLAIMED, RUNNING, FINISHED (its whole budget), STOPPED (by the scheduler), FAILED or KILLED.
        directory: name of its run directory in the sweep's.
        reports: (step, metrics), steps ascending, each step once.
        step: of the newest report, or where it ended.
        metrics: at its end.
        best: metric -> its best value in the run.
        why: why it ended as it did.
        seconds: how long it took, as far as is known.
        attempts: how often it was started.
        lineage: from whom it copied weights, oldest first: donor, donor_step, params, ...
        started, ended: when, ISO 8601.
        proposed: the params that it was claimed with.
        checkpoints: step -> path of what it saved there.
        decisions: of the scheduler, oldest first: step, action, why.
    """

    id: str
    point: int
    label: str | None
    seed: int
    params: dict[str, Any]
    status: str = "CLAIMED"
    directory: str | None = None
    mlflow_run_id: str | None = None
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    why: str | None = None
    error: str | None = None
    seconds: float | None = None
    attempts: int = 0
    lineage: list[dict[str, Any]] = field(default_factory=list)
    started: str | None = None
    ended: str | None = None
    proposed: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether it is never run again."""
        return self.status in OVER

    def value(self, metric: str) -> float | None:
        """The last value of a metric: at its end, else its newest report that has one.

        A trial that is over and whose newest report lacks the metric has no value: that it had been finite some time
        before it diverged is no result.
        """
        if metric in self.metrics:
            return self.metrics[metric]
        reports = self.reports[-1:] if self.over else self.reports
        return next((metrics[metric] for _, metrics in reversed(reports) if metric in metrics), None)


@dataclass
class SweepState:
    """What a journal says.

    Args:
        about: the newest `sweep` event: name, config, space, metric, mode, ...
        trials: id -> trial, in the order in which they were claimed.
        status: RUNNING, FINISHED, STOPPED, FAILED or KILLED. RUNNING is also what a killed driver leaves behind: see
            `glowflow.experiments.journal.driver_of`.
        why: why it ended as it did.
        started, ended: when it was first begun and last ended, ISO 8601.
        updated: time of the newest event.
    """

    about: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    status: str = "RUNNING"
    why: str | None = None
    started: str | None = None
    ended: str | None = None
    updated: str | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured; the first one decides."""
        return tuple(self.about.get("metric") or ("val_loss",))

    @property
    def modes(self) -> tuple[str, ...]:
        """`min` or `max` for each metric."""
        return tuple(self.about.get("mode") or ("min",) * len(self.metrics))

    def points(self) -> dict[int, list[Trial]]:
        """Number of a point -> its trials, by number and in the order of claim."""
        points: dict[int, list[Trial]] = {}
        for trial in self.trials.values():
            points.setdefault(trial.point, []).append(trial)
        return dict(sorted(points.items()))

    def apply(self, event: Mapping[str, Any]) -> None:
        """Fold in one event, as `Journal.append` returned it or as a line of the journal holds it."""
        fold = _FOLDS.get(event.get("event", ""))
        if fold is None:
            logger.debug("an event of another version is passed over: %.80r", event)
            return
        try:
            fold(self, event)
        except (AttributeError, KeyError, TypeError, ValueError):
            logger.warning("an event of the journal that makes no sense is passed over: %.200r", dict(event))
            return
        self.updated = event.get("time", self.updated)


def _sweep(state: SweepState, event: Mapping[str, Any]) -> None:
    state.about = _content(event)
    state.started = state.started or event.get("time")
    state.status, state.why, state.ended = "RUNNING", None, None


def _claimed(state: SweepState, event: Mapping[str, Any]) -> None:
    name, params = str(event["trial"]), dict(event["params"])
    trial = Trial(name, int(event["point"]), event.get("label"), int(event["seed"]), params, proposed=dict(params))
    state.trials.setdefault(name, trial)


def _running(state: SweepState, event: Mapping[str, Any]) -> None:
    trial = state.trials[event["trial"]]
    trial.attempts = int(event.get("attempt", trial.attempts + 1))
    trial.directory = event.get("directory", trial.directory)
    trial.mlflow_run_id = event.get("mlflow_run_id") or trial.mlflow_run_id
    trial.started = trial.started or event.get("time")
    trial.status, trial.why, trial.error, trial.ended = "RUNNING", None, None, None
    trial.metrics = {}


def _reported(state: SweepState, event: Mapping[str, Any]) -> None:
    trial = state.trials[event["trial"]]
    step, metrics = int(event["step"]), _numbers(event["metrics"])
    # A trial that goes on from a checkpoint repeats the steps behind it: the newest report of a step counts.
    at = bisect.bisect_left(trial.reports, step, key=lambda report: report[0])
    same = at < len(trial.reports) and trial.reports[at][0] == step
    trial.reports[at : at + same] = [(step, metrics)]
    trial.step, trial.seconds = step, event.get("seconds", trial.seconds)
    if event.get("checkpoint"):
        trial.checkpoints[step] = str(event["checkpoint"])


def _decided(state: SweepState, event: Mapping[str, Any]) -> None:
    trial = state.trials[event["trial"]]
    trial.decisions.append(_content(event))
    if event["action"] == "stop":
        trial.why = event.get("why")


def _exploited(state: SweepState, event: Mapping[str, Any]) -> None:
    trial = state.trials[event["trial"]]
    trial.params = {**trial.params, **event["params"]}
    trial.lineage.append(_content(event))


def _done(state: SweepState, event: Mapping[str, Any]) -> None:
    trial = state.trials[event["trial"]]
    trial.metrics, trial.best = _numbers(event.get("metrics") or {}), _numbers(event.get("best") or {})
    trial.status, trial.step = str(event["status"]), int(event.get("step") or trial.step)
    trial.why, trial.error = event.get("why"), event.get("error")
    trial.seconds, trial.ended = event.get("seconds", trial.seconds), event.get("time")


def _ended(state: SweepState, event: Mapping[str, Any]) -> None:
    state.status, state.why, state.ended = str(event["status"]), event.get("why"), event.get("time")


_FOLDS: dict[str, Callable[[SweepState, Mapping[str, Any]], None]] = {
    "sweep": _sweep,
    "claimed": _claimed,
    "running": _running,
    "reported": _reported,
    "decided": _decided,
    "exploited": _exploited,
    "done": _done,
    "ended": _ended,
}


def _content(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("event", "time")}


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as they were measured: NaN and infinities stand as text in JSON, null is no value."""
    return {name: float(value) for name, value in table.items() if value is not None}
