"""HyperOpt's tree-structured Parzen estimator, each key by itself (Bergstra et al. 2011); one objective.

It compares results by their order only: those of the whole budget come first, then those that were stopped early, the
furthest first, then what failed or still runs. The first twenty points are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hyperopt import JOB_STATE_DONE, STATUS_OK, Trials, hp, tpe  # type: ignore[import-not-found]
from hyperopt.base import Domain  # type: ignore[import-not-found]

from glowflow.config.space import Space
from glowflow.experiments.searchers.learning import LearningSearch, Observation, require_plain
from glowflow.experiments.searchers.questions import Question, questions_of

__all__ = ["HyperOptSearch"]


class HyperOptSearch(LearningSearch):
    """HyperOpt's `tpe.suggest`; see the module."""

    def __init__(self, space: Space) -> None:
        require_plain(space, one_metric=True)
        super().__init__(space)
        self._names = [question.name for question in questions_of(space)]
        self._domain = Domain(None, {question.name: _expression(question) for question in questions_of(space)})

    def propose(self, known: Sequence[Observation], seed: int) -> Callable[[Question], float]:
        if not self._names:
            return lambda question: question.low
        trials, losses = Trials(), _ranks(known, -1 if self.space.modes[0] == "max" else 1)
        trials.insert_trial_docs(
            [self._doc(trials, number, item) for number, item in enumerate(zip(known, losses, strict=True))]
        )
        trials.refresh()
        (proposed,) = tpe.suggest([len(known)], self._domain, trials, seed, verbose=False)
        values = {name: value[0] for name, value in proposed["misc"]["vals"].items()}
        return lambda question: float(values.get(question.name, question.low))

    def _doc(self, trials: Trials, number: int, item: tuple[Observation, float]) -> dict[str, Any]:
        answers = {question.name: answer for question, answer in item[0].answers}
        values = {name: [answers[name]] if name in answers else [] for name in self._names}
        numbers = {name: [number] if name in answers else [] for name in self._names}
        misc = {"tid": number, "cmd": self._domain.cmd, "workdir": None, "idxs": numbers, "vals": values}
        result = {"status": STATUS_OK, "loss": item[1]}
        (doc,) = trials.new_trial_docs([number], [None], [result], [misc])
        return {**doc, "state": JOB_STATE_DONE}


def _expression(question: Question) -> Any:
    if question.kind == "choice":
        return hp.randint(question.name, question.size)
    if question.kind == "steps":
        return hp.uniformint(question.name, question.low, question.high)
    if question.kind == "log":
        return hp.loguniform(question.name, math.log(question.low), math.log(question.high))
    return hp.uniform(question.name, question.low, question.high)


def _ranks(known: Sequence[Observation], sign: int) -> list[float]:
    """Places of the results, the best first; infinity for those that have none."""
    order: dict[int, tuple[int, int, float]] = {}
    for index, item in enumerate(known):
        if item.state in ("done", "stopped"):
            order[index] = (int(item.state == "stopped"), -item.step, sign * item.values[0])
    places = {index: float(place) for place, index in enumerate(sorted(order, key=lambda index: order[index]))}
    return [places.get(index, math.inf) for index in range(len(known))]
