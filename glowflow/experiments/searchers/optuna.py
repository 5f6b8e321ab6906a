"""Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), with one or several objectives.

Each proposal is made in a study of its own that holds what is known (`LearningSearch` says why). Points that are still
running count as bad ones ("constant liar"), so that parallel trials differ; those that were stopped early stand behind
all that were trained for the whole budget, the furthest first; failed ones are left out. The first ten points are
random.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from glowflow.experiments.searchers.learning import LearningSearch, Observation
from glowflow.experiments.searchers.questions import Question

__all__ = ["OptunaSearch"]

_DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
_STATES = {
    "open": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class OptunaSearch(LearningSearch):
    """Optuna's `TPESampler`; see the module."""

    def propose(self, known: Sequence[Observation], seed: int) -> Callable[[Question], float]:
        with _quiet():
            directions = [_DIRECTIONS[mode] for mode in self.space.modes]
            study = optuna.create_study(directions=directions, sampler=self._sampler(seed))
            study.add_trials([self._trial(observation) for observation in known])
            trial = study.ask()

        def answer(question: Question) -> float:
            with _quiet():
                if question.kind == "choice":
                    return trial.suggest_categorical(question.name, range(question.size))
                if question.kind == "steps":
                    return trial.suggest_int(question.name, 0, question.size - 1)
                return trial.suggest_float(question.name, question.low, question.high, log=question.kind == "log")

        return answer

    def _sampler(self, seed: int) -> optuna.samplers.TPESampler:
        # One model of all keys at once knows how they belong together. With conditions it has to be one for each group
        # of keys that appear together, and for several objectives Optuna advises one for each key.
        single = len(self.space.metrics) == 1
        conditional = self.space.program is not None or any(item.when for item in self.space.dimensions.values())
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=single,
            group=single and conditional,
            constant_liar=True,
        )

    def _trial(self, known: Observation) -> FrozenTrial:
        single = len(self.space.metrics) == 1
        state = _STATES["done" if known.state == "stopped" and not single else known.state]
        return create_trial(
            state=state,
            values=known.values if state is TrialState.COMPLETE else None,
            params={question.name: _external(question, answer) for question, answer in known.answers},
            distributions={question.name: _distribution(question) for question, _ in known.answers},
            intermediate_values=known.course() if single else None,
        )


def _distribution(question: Question) -> BaseDistribution:
    if question.kind == "choice":
        return CategoricalDistribution(tuple(range(question.size)))
    if question.kind == "steps":
        return IntDistribution(0, question.size - 1)
    return FloatDistribution(question.low, question.high, log=question.kind == "log")


def _external(question: Question, answer: float) -> float:
    return int(answer) if question.kind in ("choice", "steps") else answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log and its notes on what is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
