"""Adapters between Tune and the sweep's book: a searcher, a scheduler that is watched, and callbacks.

Tune's own state files are never read: a resumed sweep starts a new Tune experiment, whose scheduler is shown what the
journal holds.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.hyperband import _Bracket as RayBracket
from ray.tune.search import SearchAlgorithm, Searcher, SearchGenerator

from glowflow.config.space import RandomDraw, Space
from glowflow.orchestration.sweep.book import SweepBook
from glowflow.orchestration.sweep.settings import SweepSettings
from glowflow.orchestration.sweep.trainable import OBJECTIVE, PAYLOAD, STEP

__all__ = ["BookCallback", "BookSearch", "FullBrackets", "StopWhen", "WatchedScheduler", "make_scheduler"]

logger = logging.getLogger(__name__)


class _NeverSaved:
    """Tune pickles what it runs with into files for its own resume, which nobody reads: there is nothing to save."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class BookSearcher(_NeverSaved, Searcher):
    """Hands Tune the trials of the book."""

    def __init__(self, book: SweepBook) -> None:
        super().__init__(metric=OBJECTIVE, mode=book.settings.space.modes[0])
        self._book = book

    def suggest(self, trial_id: str) -> Any:
        found = self._book.next_trial(trial_id)
        return Searcher.FINISHED if found == "FINISHED" else found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The callback, which also hears of crashes, keeps the book."""

    def save(self, checkpoint_path: str) -> None:
        """The journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its journal")


class BookSearch(_NeverSaved, SearchAlgorithm):
    """The searcher as Tune's controller sees it.

    Population schedulers refuse Tune's own wrapper by its class, since searchers usually want to hear how their points
    did; the book's does not.
    """

    def __init__(self, book: SweepBook) -> None:
        self._inner, self._book = SearchGenerator(BookSearcher(book)), book

    @property
    def metric(self) -> Any:
        return self._inner.metric

    @property
    def total_samples(self) -> Any:
        return self._inner.total_samples

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return bool(self._inner.set_search_properties(metric, mode, config, **spec))

    def add_configurations(self, experiments: Any) -> None:
        self._inner.add_configurations(experiments)

    def next_trial(self) -> Any:
        return self._inner.next_trial()

    def is_finished(self) -> bool:
        # After the last trial was handed out Tune ends the process of each trial that pauses, unless another is about
        # to start: a population would then begin every round with one process, and wait for the start of the others.
        book = self._book
        turns_to_come = book.settings.slots.pausing and bool(book.live()) and not book.closed()
        return bool(self._inner.is_finished()) and not turns_to_come

    def save_to_dir(self, dirpath: str, **kwargs: Any) -> None:
        """The journal is the state."""

    def has_checkpoint(self, dirpath: str) -> bool:
        return False

    def restore_from_dir(self, dirpath: str) -> None:
        raise NotImplementedError("a sweep is resumed from its journal")


class BookCallback(_NeverSaved, Callback):  # type: ignore[misc]
    """Writes what Tune learns into the book, before the scheduler sees it or after, as Tune calls."""

    def __init__(self, book: SweepBook) -> None:
        self._book = book

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._book.ended(trial.trial_id, _payload(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
        self._book.crashed(trial.trial_id, lines[-1][:300] if lines else "its process died")


class StopWhen(_NeverSaved, Stopper):
    """Ends the sweep when ``wanted`` says so."""

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._wanted()


class WatchedScheduler(_NeverSaved, TrialScheduler):
    """Another scheduler, whose decisions the book learns, and which learns what earlier drivers have seen."""

    def __init__(self, inner: TrialScheduler, book: SweepBook) -> None:
        self._inner, self._book, self._comparing = inner, book, False

    @property
    def metric(self) -> Any:
        return self._inner.metric

    @property
    def supports_buffered_results(self) -> bool:
        return False  # a decision must come before the next step is trained

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        done = bool(self._inner.set_search_properties(metric, mode, **spec))
        if self._remembers:
            for name in self._book.past:
                past = _Past(name)
                self._inner.on_trial_add(_NOBODY, past)
                self._replay(past, name)
        return done

    @property
    def _remembers(self) -> bool:
        """Whether the scheduler goes by what it saw of any trial; those that pause trials begin a new population."""
        return isinstance(self._inner, (AsyncHyperBandScheduler, MedianStoppingRule))

    def _replay(self, trial: Any, name: str) -> None:
        """Show what a trial told an earlier driver; the answers were given then."""
        for step, value in self._book.past_reports(name):
            self._inner.on_trial_result(_NOBODY, trial, {STEP: step, OBJECTIVE: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_add(tune_controller, trial)
        if self._remembers:
            self._replay(trial, self._book.name_of(trial.trial_id))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._book.reported(trial.trial_id, _payload(result) or {})
        self._comparing = True
        try:
            decision = str(self._inner.on_trial_result(tune_controller, trial, result))
        finally:
            self._comparing = False
        if decision == TrialScheduler.STOP:
            self._book.decided(trial.trial_id, int(result[STEP]))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if self._comparing:  # a result of another trial has decided about this one, which is paused
            name = self._book.name_of(trial.trial_id)
            self._book.decided(trial.trial_id, self._book.state.trials[name].step)
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())


class _Past:
    """Stands for a trial of an earlier driver; schedulers only tell trials apart."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _Nobody:
    """Stands for Tune's controller while earlier results are shown: no trial waits for its turn."""

    def get_live_trials(self) -> list[Any]:
        return []


_NOBODY = _Nobody()


def _payload(result: dict[str, Any] | None) -> dict[str, Any] | None:
    text = (result or {}).get(PAYLOAD)
    return None if text is None else dict(json.loads(text))


# -- schedulers -------------------------------------------------------------------------------------------------------


class _Bracket(RayBracket):
    """One that is full once it was given all its trials, whether they still train or not."""

    def filled(self) -> bool:
        return len(self._all_trials) >= self._n0


class FullBrackets(HyperBandScheduler):
    """HyperBand that compares the trials of a bracket when the bracket is full.

    Ray's own halves what has been added when all of that has come to the milestone, and takes a bracket that trials
    have left for one with room. Trials that take turns in fewer slots than a bracket holds come and go one after the
    other, so that nobody would ever be stopped.

    Args:
        planned: how many trials will be added; a bracket that the last of them leaves open is compared as it is.
    """

    def __init__(self, planned: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._planned, self._added = planned, 0

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._added += 1
        super().on_trial_add(tune_controller, trial)

    def _create_bracket(self, s: int) -> _Bracket:
        return _Bracket(
            time_attr=self._time_attr,
            max_trials=self._get_n0(s),
            init_t_attr=self._get_r0(s),
            max_t_attr=self._max_t_attr,
            eta=self._eta,
            s=s,
            stop_last_trials=self._stop_last_trials,
        )

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        more_to_come = bracket is self._state["bracket"] and self._added < self._planned
        if more_to_come and not bracket.filled():
            return TrialScheduler.PAUSE
        return str(super()._process_bracket(tune_controller, bracket))


def make_scheduler(settings: SweepSettings, max_steps: int, planned: int) -> TrialScheduler:
    """Tune's scheduler for a space; time is counted in optimiser steps.

    Args:
        planned: trials that this driver will start.
    """
    space, interval = settings.space, settings.interval
    chosen = space.scheduler
    if chosen.name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=STEP,
            max_t=max_steps,
            grace_period=chosen.grace_steps or interval,
            reduction_factor=chosen.reduction_factor,
        )
    if chosen.name == "median":
        return MedianStoppingRule(
            time_attr=STEP, grace_period=chosen.grace_steps or interval, min_samples_required=chosen.min_samples
        )
    if chosen.name == "hyperband":
        # It plans in units of one report, and wants to see each of them.
        return FullBrackets(
            planned,
            time_attr="training_iteration",
            max_t=-(-max_steps // interval),
            reduction_factor=chosen.reduction_factor,
            stop_last_trials=False,  # who is left trains to the end of its config
        )
    if chosen.name in ("pbt", "pb2"):
        return _population(space, interval)
    return FIFOScheduler()


def _population(space: Space, interval: int) -> TrialScheduler:
    """Synchronous, so that a copy never goes back in steps, and with few slots the whole population takes turns."""
    chosen, ranges = space.scheduler, _Ranges()
    space.draw(ranges)
    common = {"time_attr": STEP, "perturbation_interval": interval, "synch": True, "require_attrs": False}
    common |= {"quantile_fraction": chosen.quantile, "custom_explore_fn": ranges.clip, "log_config": False}
    if chosen.name == "pb2":
        from ray.tune.schedulers.pb2 import PB2

        return PB2(hyperparam_bounds={key: [low, high] for key, (low, high, _) in ranges.numbers.items()}, **common)
    counter = itertools.count()

    def resample(key: str) -> Callable[[], Any]:
        # Numbers far from those of the trials: a resampled value is a new one.
        return lambda: space.draw(RandomDraw(space.searcher.seed, 1_000_000 + next(counter)))[key]

    mutations: dict[str, Any] = {key: resample(key) for key in ranges.numbers} | dict(ranges.choices)
    return PopulationBasedTraining(
        hyperparam_mutations=mutations, resample_probability=chosen.resample_probability, **common
    )


class _Ranges:
    """A draw that notes what it is asked: the ranges of a space, in which mutated values must stay."""

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[float, float, float | None]] = {}
        self.choices: dict[str, list[Any]] = {}

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        self.numbers[key] = (low, high, step)
        return low

    def loguniform(self, key: str, low: float, high: float) -> float:
        self.numbers[key] = (low, high, None)
        return low

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        self.numbers[key] = (low, high, step)
        return low

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        self.choices[key] = list(values)
        return values[0]

    def clip(self, config: dict[str, Any]) -> dict[str, Any]:
        """Mutated values, back in their ranges and on their grid."""
        clipped = dict(config)
        for key, (low, high, step) in self.numbers.items():
            if key in clipped:
                value = clipped[key] if step is None else low + round((clipped[key] - low) / step) * step
                clipped[key] = (
                    type(low)(min(max(value, low), high)) if isinstance(low, int) else min(max(value, low), high)
                )
        return clipped
