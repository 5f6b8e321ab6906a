"""What a sweep found, gathered once from its journal and curves: the trials by rank, and over seeds the statistics.

Tables, figures and ``--json`` are all made of the same ``Results``, so that they cannot contradict each other.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.space import Space
from glowflow.experiments.importance import Explanation, explain
from glowflow.experiments.journal import JOURNAL_NAME, best_trial, leaderboard, read_journal
from glowflow.experiments.ranking import pareto_fronts
from glowflow.metrics.comparison import Difference, holm, mean_interval, welch
from glowflow.metrics.intervals import Interval
from glowflow.tracking.spool import METRICS_NAME, curves

if TYPE_CHECKING:
    from glowflow.experiments.journal import SweepState, Trial

__all__ = ["ALPHA", "Group", "Outcome", "Results", "group_trials", "pareto_front", "read_results", "results_of"]

ALPHA = 0.05
LEVEL = 0.95

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Outcome:
    """One trial at its rank.

    Args:
        rank: None without a value of every metric.
        values: the last value of each metric of the sweep; what was never reported or is not finite is left out.
        params: as they were at the end.
        curves: metric -> (step, value), steps ascending.
        copies: of another trial's weights (population-based training), oldest first: donor, donor_step, params.
    """

    rank: int | None
    trial: str
    point: int
    label: str | None
    seed: int
    status: str
    step: int
    params: Mapping[str, Any]
    values: Mapping[str, float]
    why: str | None
    error: str | None
    seconds: float | None
    curves: Mapping[str, Curve]
    copies: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """The trials of one point that differ in the seed alone, under one metric.

    Args:
        values: of the trials that ran to the end and have a finite value.
        missing: how many trials have none.
        difference: this mean minus that of the best group, None for the best itself and for groups without values.
        p_value: adjusted for all comparisons of the table (Holm).
    """

    point: int
    name: str
    params: Mapping[str, Any]
    trials: Sequence[str]
    values: Sequence[float]
    missing: int
    interval: Interval | None
    difference: Difference | None
    p_value: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "name": self.name,
            "point": self.point,
            "params": dict(self.params),
            "trials": list(self.trials),
            "values": list(self.values),
            "n": len(self.values),
            "missing": self.missing,
            "interval": self.interval.to_dict() if self.interval else None,
            "difference": self.difference.to_dict() if self.difference else None,
            "p_value_adjusted": self.p_value,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Results:
    """Everything that a report says about a sweep."""

    name: str
    storage: str
    status: str
    why: str | None
    about: Mapping[str, Any]
    command: Sequence[str]
    space: Space
    metrics: Sequence[str]
    modes: Sequence[str]
    max_steps: int
    started: str | None
    ended: str | None
    outcomes: Sequence[Outcome]
    best: str | None
    groups: Mapping[str, Sequence[Group]]
    importances: Mapping[str, Explanation]

    @property
    def metric(self) -> str:
        """The first metric, by which trials are ranked."""
        return self.metrics[0]

    @property
    def mode(self) -> str:
        return self.modes[0]

    @property
    def by_seeds(self) -> bool:
        """Whether settings are compared over seeds (named variants always are)."""
        return bool(self.groups)

    @property
    def keys(self) -> list[str]:
        """The parameters that the trials hold, in the order of the space."""
        found = dict.fromkeys(key for outcome in self.outcomes for key in outcome.params)
        order = {key: index for index, key in enumerate(self.space.keys())}
        return sorted(found, key=lambda key: order.get(key, len(order)))

    @property
    def telling(self) -> dict[str, Explanation]:
        """Metric -> its importances, where there are several to compare."""
        return {metric: found for metric, found in self.importances.items() if len(found.importances) > 1}

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of trials."""
        return dict(Counter(outcome.status for outcome in self.outcomes))

    @property
    def steps(self) -> int:
        """Training steps of all trials together."""
        return sum(outcome.step for outcome in self.outcomes)


def read_results(sweep_dir: str | Path) -> Results:
    """Everything about the sweep in a directory.

    Raises:
        RunError: it is not the directory of a sweep.
    """
    directory = Path(sweep_dir).expanduser().absolute()
    return results_of(read_journal(directory), directory)


def results_of(state: SweepState, sweep_dir: Path) -> Results:
    """Everything about a sweep whose journal was read; the curves of its trials lie in ``sweep_dir``."""
    about = state.about
    space = Space.from_dict(about["space"])
    metrics, modes = state.metrics, state.modes
    outcomes = [_outcome(row["rank"], state.trials[row["trial"]], metrics, sweep_dir) for row in leaderboard(state)]
    several = bool(space.variants) or len({outcome.point for outcome in outcomes}) < len(outcomes)
    best = best_trial(state)
    return Results(
        name=str(about.get("name") or sweep_dir.name),
        storage=str(sweep_dir.parent),
        status=state.status,
        why=state.why,
        about=about,
        command=_first_command(sweep_dir) or list(about.get("command") or []),
        space=space,
        metrics=metrics,
        modes=modes,
        max_steps=int(about.get("max_steps") or 0),
        started=state.started,
        ended=state.ended,
        outcomes=outcomes,
        best=None if best is None else best.id,
        groups={m: group_trials(outcomes, m, mode) for m, mode in zip(metrics, modes, strict=True)} if several else {},
        importances={} if space.variants else {metric: _explain(outcomes, metric) for metric in metrics},
    )


def _first_command(sweep_dir: Path) -> list[str]:
    """What the sweep was begun with: the newest event may be a resume, which does not say how to make it again."""
    with open(sweep_dir / JOURNAL_NAME, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "sweep" and event.get("command"):
                    return [str(word) for word in event["command"]]
    return []


def _outcome(rank: int, trial: Trial, metrics: Sequence[str], sweep_dir: Path) -> Outcome:
    values = {metric: trial.value(metric) for metric in metrics}
    return Outcome(
        rank=rank,
        trial=trial.id,
        point=trial.point,
        label=trial.label,
        seed=trial.seed,
        status=trial.status,
        step=trial.step,
        params=trial.params,
        values={name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)},
        why=trial.why,
        error=trial.error,
        seconds=trial.seconds,
        copies=trial.lineage,
        curves=_curves(trial, metrics, sweep_dir / (trial.directory or trial.id)),
    )


def _curves(trial: Trial, metrics: Sequence[str], run_dir: Path) -> dict[str, Curve]:
    """The run's own points, and what it reported to the sweep (all there is while a run's files are elsewhere)."""
    found: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    spooled = curves(run_dir / METRICS_NAME)
    for metric, points in found.items():
        points.update(spooled.get(metric, {}))
        points.update((step, reported[metric]) for step, reported in trial.reports if metric in reported)
    return {
        metric: [(step, float(value)) for step, value in sorted(points.items()) if math.isfinite(value)]
        for metric, points in found.items()
    }


def group_trials(outcomes: Sequence[Outcome], metric: str, mode: str) -> list[Group]:
    """Points with their seeds, best mean first; each against the best by Welch's test, p values adjusted by Holm.

    Only trials that ran to the end count: a trial that was stopped early has its value at another step.
    """
    members: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(outcome.point, []).append(outcome)
    values = {
        point: [o.values[metric] for o in sorted(found, key=lambda o: o.seed) if _counts(o, metric)]
        for point, found in members.items()
    }
    intervals = {point: mean_interval(found, LEVEL) if found else None for point, found in values.items()}
    sign = 1 if mode == "min" else -1
    order = sorted(members, key=lambda p: (sign * i.estimate if (i := intervals[p]) else math.inf, p))
    others = [point for point in order[1:] if values[point]]
    differences = {point: welch(values[point], values[order[0]], LEVEL) for point in others}
    adjusted = dict(zip(others, holm([differences[point].p_value for point in others]), strict=True))
    return [
        Group(
            point=point,
            name=members[point][0].label or f"{point:03d}",
            params=members[point][0].params,
            trials=[o.trial for o in sorted(members[point], key=lambda o: o.seed)],
            values=values[point],
            missing=len(members[point]) - len(values[point]),
            interval=intervals[point],
            difference=differences.get(point),
            p_value=adjusted.get(point),
            verdict=_verdict(values[point], point == order[0], adjusted.get(point)),
        )
        for point in order
    ]


def _counts(outcome: Outcome, metric: str) -> bool:
    return outcome.status == "FINISHED" and metric in outcome.values


def _verdict(values: Sequence[float], best: bool, p_value: float | None) -> str:
    if not values:
        return "no result"
    if best:
        return "best"
    if p_value is None or math.isnan(p_value):
        return "not tested"
    return "different" if p_value < ALPHA else "not different"


def _explain(outcomes: Sequence[Outcome], metric: str) -> Explanation:
    """Importance over points, not trials: seeds of one point on both sides of a fold would give the answer away."""
    if any(outcome.copies for outcome in outcomes):
        return Explanation([], len(outcomes), reason="trials copied weights and changed parameters on the way")
    values: dict[int, list[float]] = {}
    params: dict[int, Mapping[str, Any]] = {}
    for outcome in sorted(outcomes, key=lambda o: (o.point, o.seed)):
        if metric in outcome.values and outcome.status in ("FINISHED", "STOPPED"):
            values.setdefault(outcome.point, []).append(outcome.values[metric])
            params.setdefault(outcome.point, outcome.params)
    rows = [params[point] for point in values]
    return explain(rows, [math.fsum(found) / len(found) for found in values.values()])


def pareto_front(results: Results) -> list[Outcome]:
    """The trials that no other one dominates, by the first metric; of those that ran to the end, if any did."""
    placed = [o for o in results.outcomes if all(metric in o.values for metric in results.metrics)]
    placed = [o for o in placed if o.status == "FINISHED"] or placed
    signs = [1 if mode == "min" else -1 for mode in results.modes]
    costs = [tuple(s * o.values[m] for s, m in zip(signs, results.metrics, strict=True)) for o in placed]
    found = [(cost, o) for front, cost, o in zip(pareto_fronts(costs), costs, placed, strict=True) if front == 1]
    return [outcome for _, outcome in sorted(found, key=lambda pair: pair[0])]
