"""What every searcher has in common: asking and telling, and the way from a journal back into a searcher.

A point is asked for once and told once, when all its seeds are over. `replay` tells a new strategy what a journal
holds, so that it goes on as the one before it would have.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from glowflow.config.space import Space
from glowflow.config.spaces.values import same
from glowflow.experiments.state import SweepState, Trial

__all__ = [
    "Ask",
    "Outcome",
    "SearchStrategy",
    "history_of_sweep",
    "outcome_of",
    "replay",
    "unclaimed",
    "warm_start",
]


@dataclass(frozen=True)
class Ask:
    """A point to try.

    Args:
        point: its number; points are numbered from 0 without gaps.
        label: of a named variant.
        params: dotted config key -> value.
    """

    point: int
    label: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a point has given.

    Args:
        values: of the metrics, mean over the seeds; None where the point failed.
        step: how far a seed of it was trained when it was stopped early; None: all of them for the whole budget.
    """

    values: list[float] | None
    step: int | None = None


class SearchStrategy(Protocol):
    """Proposes points. One thread at a time may use it.

    ``learns`` says whether results change what is proposed; ``waiting`` whether None from `ask` means "ask again when
    more is told" rather than "nothing left".
    """

    learns: bool
    waiting: bool

    def ask(self) -> Ask | None:
        """The next point; None when there is none."""

    def tell(self, point: int, values: list[float] | None, params: dict[str, Any], *, step: int | None = None) -> None:
        """What a point has given.

        Args:
            point: its number.
            values: see `Outcome`.
            params: what it was trained with.
            step: see `Outcome`.
        """

    def prune(self, point: int, step: int, value: float) -> None:
        """What a point's first metric is on the way."""

    def recall(self, ask: Ask) -> None:
        """Take a point that an earlier process asked for as asked for here."""

    def learn(self, params: Mapping[str, Any], values: Sequence[float]) -> bool:
        """Take in a result from elsewhere, of a full training run; False where it is of no use."""


def outcome_of(trials: Sequence[Trial], metrics: Sequence[str], num_seeds: int) -> Outcome | None:
    """What a point has given, once all its seeds are over.

    Args:
        trials: of the point.
        metrics: whose values count.
        num_seeds: how many trials a point gets.

    Returns:
        None while a seed is to be run. A seed that crashed, or has no finite value, is left out of the mean.
    """
    if len(trials) < num_seeds or not all(trial.over for trial in trials):
        return None
    rows = [(trial, values) for trial in trials if (values := _values(trial, metrics)) is not None]
    if not rows:
        return Outcome(None)
    means = [statistics.fmean(column) for column in zip(*(values for _, values in rows), strict=True)]
    return Outcome(means, min((trial.step for trial, _ in rows if trial.status == "STOPPED"), default=None))


def _values(trial: Trial, metrics: Sequence[str]) -> list[float] | None:
    if trial.status == "FAILED":
        return None
    values = [value for metric in metrics if (value := trial.value(metric)) is not None and math.isfinite(value)]
    return values if len(values) == len(metrics) else None


def replay(strategy: SearchStrategy, state: SweepState, space: Space) -> None:
    """Tell a new strategy what a journal holds: its points are not asked again, their results count.

    A warm start comes back too where the journal's `sweep` event holds it as ``history``: [[params, values], ...].
    """
    warm_start(strategy, state.about.get("history") or ())
    metric = space.metrics[0]
    for point, trials in state.points().items():
        asked = trials[0].proposed
        strategy.recall(Ask(point, trials[0].label, asked))
        if len(space.metrics) == 1:
            for step, metrics in itertools.chain.from_iterable(trial.reports for trial in trials):
                if metric in metrics:
                    strategy.prune(point, step, metrics[metric])
        outcome = outcome_of(trials, space.metrics, len(space.seeds))
        if outcome is not None:
            strategy.tell(point, outcome.values, asked, step=outcome.step)


def unclaimed(state: SweepState, seeds: Sequence[int]) -> list[tuple[Ask, int]]:
    """What was asked for but not claimed for every seed, when the driver died between two claims.

    Args:
        state: the sweep.
        seeds: of each point, in order.

    Returns:
        (point, seed) of each trial that is missing.
    """
    return [
        (Ask(point, trials[0].label, trials[0].proposed), seed)
        for point, trials in state.points().items()
        for seed in seeds
        if seed not in {trial.seed for trial in trials}
    ]


def warm_start(strategy: SearchStrategy, history: Iterable[tuple[Mapping[str, Any], Sequence[float]]]) -> int:
    """Tell a strategy results from elsewhere.

    Args:
        history: (params, values of the metrics), of full training runs.

    Returns:
        How many were usable: every key that such a point would have is there, with a value in its range. Always 0
        where the strategy does not learn.
    """
    return sum([strategy.learn(params, values) for params, values in history])


def history_of_sweep(state: SweepState, space: Space) -> list[tuple[dict[str, Any], list[float]]]:
    """Results of an earlier sweep for a warm start of another.

    Args:
        state: the earlier sweep.
        space: the new one. A key of it that the earlier sweep did not vary has the value that all trials had there.

    Returns:
        (params, values of the new space's metrics), mean over the seeds, of points that were trained for the whole
        budget. Points that differ in a key that the new space leaves alone are left out.
    """
    constants = {**_leaves(state.about.get("config") or {}), **((state.about.get("space") or {}).get("set") or {})}
    known = {key: constants[key] for key in space.keys() if key in constants}
    history = []
    for trials in state.points().values():
        outcome = outcome_of(trials, space.metrics, len({trial.seed for trial in trials}))
        if outcome is None or outcome.values is None or outcome.step is not None or any(t.lineage for t in trials):
            continue
        params = trials[0].proposed
        others = {**constants, **space.fixed}
        strange = [key for key in params if key not in space.keys() and not same(params[key], others.get(key))]
        if not strange:
            history.append(({**known, **params}, outcome.values))
    return history


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
