"""Which trial of a sweep is best: the leaderboard and its first line.

Trials that trained for their whole budget come before those that did not, and a value that is missing or not finite
comes last. With several metrics the Pareto front goes first, then what it dominates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glowflow.experiments.state import SweepState, Trial

__all__ = ["best_trial", "leaderboard", "pareto_fronts"]

_CLASSES = {"FINISHED": 0, "FAILED": 2}
_MISSING = 3


@dataclass(frozen=True)
class _Place:
    """A trial with its values, smaller is better; None where they cannot be compared."""

    trial: Trial
    costs: tuple[float, ...] | None
    group: tuple[int, int]


def best_trial(state: SweepState, metric: str | None = None) -> Trial | None:
    """The best trial.

    Args:
        state: the sweep.
        metric: by which; None: as the leaderboard has it. One that the sweep does not name is minimised.

    Returns:
        The best of the trials that trained to the end; where there are none, the best of the others, those that got
        furthest first. None where no trial has a value.
    """
    goals = _goals(state)
    ranked = _ranked(state, goals if metric is None else {metric: goals.get(metric, "min")})
    return ranked[0][0].trial if ranked and ranked[0][1] is not None else None


def leaderboard(state: SweepState) -> list[dict[str, Any]]:
    """The trials, best first.

    Returns:
        One row each: rank (None without a value), trial, point, label, seed, status, step, each metric, params, why;
        with several metrics also front, 1 for what nothing dominates.
    """
    goals = _goals(state)
    rows = []
    for rank, (place, front) in enumerate(_ranked(state, goals), start=1):
        trial = place.trial
        row: dict[str, Any] = {"rank": None if front is None else rank}
        if len(goals) > 1:
            row["front"] = front
        row |= {"trial": trial.id, "point": trial.point, "label": trial.label, "seed": trial.seed}
        row |= {"status": trial.status, "step": trial.step}
        row |= {metric: trial.value(metric) for metric in goals}
        rows.append(row | {"params": dict(trial.params), "why": trial.why})
    return rows


def pareto_fronts(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """For each row of costs (less is better), 1 where no row dominates it, 2 where only rows of front 1 do, ..."""
    fronts = [0] * len(costs)
    left, front = set(range(len(costs))), 0
    while left:
        front += 1
        found = {i for i in left if not any(_dominates(costs[j], costs[i]) for j in left)}
        for i in found:
            fronts[i] = front
        left -= found
    return fronts


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _goals(state: SweepState) -> dict[str, str]:
    return dict(zip(state.metrics, state.modes, strict=True))


def _ranked(state: SweepState, goals: Mapping[str, str]) -> list[tuple[_Place, int | None]]:
    """Trials best first, with their front within their group; None for those that have no place."""
    groups: dict[tuple[int, int], list[_Place]] = {}
    for trial in state.trials.values():
        place = _place(trial, goals)
        groups.setdefault(place.group, []).append(place)
    ranked: list[tuple[_Place, int | None]] = []
    for _, places in sorted(groups.items()):
        costs = [place.costs for place in places if place.costs is not None]
        if len(costs) < len(places):
            ranked += [(place, None) for place in places]
            continue
        # Sorting is stable: among equals the one that was claimed first.
        order = sorted(zip(pareto_fronts(costs), costs, places, strict=True), key=lambda item: item[:2])
        ranked += [(place, front) for front, _, place in order]
    return ranked


def _place(trial: Trial, goals: Mapping[str, str]) -> _Place:
    values = [trial.value(metric) for metric in goals]
    costs = tuple(
        -value if mode == "max" else value
        for value, mode in zip(values, goals.values(), strict=True)
        if value is not None and math.isfinite(value)
    )
    kind = _CLASSES.get(trial.status, 1)
    if len(costs) < len(goals):
        return _Place(trial, None, (_MISSING, kind))
    return _Place(trial, costs, (kind, 0 if kind == 0 else -trial.step))
