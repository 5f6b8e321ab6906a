"""Ax: Bayesian optimisation with Gaussian processes, with one or several objectives (Balandat et al. 2020).

Each proposal is made by a client of its own that is told what is known (`LearningSearch` says why). It costs seconds
rather than milliseconds. The first five points are random. Conditions are not modelled: a key that a point does not
have stands in the middle of its range.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from ax.api.client import Client  # type: ignore[import-not-found]
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig  # type: ignore[import-not-found]
from ax.utils.common.logger import ROOT_STREAM_HANDLER  # type: ignore[import-not-found]

from glowflow.config.space import Space
from glowflow.experiments.searchers.learning import LearningSearch, Observation, require_plain
from glowflow.experiments.searchers.questions import Question, questions_of

__all__ = ["AxSearch"]

_STARTUP = 5


class AxSearch(LearningSearch):
    """Ax's default strategy; see the module."""

    def __init__(self, space: Space) -> None:
        require_plain(space, one_metric=False)
        super().__init__(space)
        # Ax wants names that can stand in a formula.
        self._names = {question: f"x{index}" for index, question in enumerate(questions_of(space))}

    def propose(self, known: Sequence[Observation], seed: int) -> Callable[[Question], float]:
        if not self._names:
            return lambda question: question.low
        with _quiet(), _one_thread():
            client = self._client(seed)
            for observation in known:
                self._attach(client, observation)
            (values,) = client.get_next_trials(max_trials=1).values()
        return lambda question: float(values[self._names[question]]) if question in self._names else question.low

    def _client(self, seed: int) -> Client:
        client = Client(random_seed=seed)
        client.configure_experiment(parameters=[_parameter(name, item) for item, name in self._names.items()])
        goals = [f"{'-' if mode == 'min' else ''}m{index}" for index, mode in enumerate(self.space.modes)]
        client.configure_optimization(objective=", ".join(goals))
        client.configure_generation_strategy(
            initialization_budget=_STARTUP,
            initialization_random_seed=seed,
            initialize_with_center=False,
            allow_exceeding_initialization_budget=True,  # while the first points still run
        )
        return client

    def _attach(self, client: Client, known: Observation) -> None:
        answers = dict(known.answers)
        values = {name: _plain(item, answers.get(item, _middle(item))) for item, name in self._names.items()}
        trial = client.attach_trial(values)
        if known.state == "failed":
            client.mark_trial_failed(trial)
        elif known.values:
            client.complete_trial(trial, raw_data={f"m{index}": value for index, value in enumerate(known.values)})


def _parameter(name: str, question: Question) -> RangeParameterConfig | ChoiceParameterConfig:
    if question.kind == "choice":
        return ChoiceParameterConfig(name, list(range(question.size)), "int", is_ordered=question.size == 2)
    if question.kind == "steps":
        return RangeParameterConfig(name, (0, question.size - 1), "int")
    scaling = "log" if question.kind == "log" else "linear"
    return RangeParameterConfig(name, (question.low, question.high), "float", scaling=scaling)


def _middle(question: Question) -> float:
    return (question.low * question.high) ** 0.5 if question.kind == "log" else (question.low + question.high) / 2


def _plain(question: Question, answer: float) -> float:
    return int(answer) if question.kind in ("steps", "choice") else answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of every trial and the notes of the numerics below."""
    before = ROOT_STREAM_HANDLER.level
    ROOT_STREAM_HANDLER.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ROOT_STREAM_HANDLER.setLevel(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: threads stand in each other's way, and take the cores that trials run on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
