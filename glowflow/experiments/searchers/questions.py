"""A point as the answers to its space's questions, and back.

A search package knows numbers on a scale and places in a list; a space knows keys and values of any kind, some of them
only under conditions. `Asker` draws a point from answers, `answers_of` finds the answers of a point.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from glowflow.config.errors import ConfigError
from glowflow.config.space import Space
from glowflow.config.spaces.dimensions import key_of
from glowflow.config.spaces.draws import at_step, num_steps
from glowflow.config.spaces.values import flatten, is_number, is_whole, same

__all__ = ["Answers", "Asker", "Question", "answers_of", "questions_of"]


@dataclass(frozen=True)
class Question:
    """What a searcher is asked for.

    Args:
        name: tells it from all others; a key that has other values under another condition is another question.
        kind: `linear` and `log` are answered with a number from low to high, `steps` (in order) and `choice` (without
            order) with a place in a list, 0 to high.
        low, high: both included.
    """

    name: str
    kind: Literal["linear", "log", "steps", "choice"]
    low: float
    high: float

    @property
    def size(self) -> int:
        """How many places there are."""
        return int(self.high) + 1


Answers = list[tuple[Question, float]]
"""What each active question was answered with, in the order of the questions."""


def _steps(key: str, low: float, step: float, size: int) -> Question:
    return Question(f"{key} steps {low} {step} {size}", "steps", 0, size - 1)


def _choice(key: str, values: Sequence[Any]) -> Question:
    digest = hashlib.sha256(json.dumps(values, default=list).encode()).hexdigest()[:12]
    return Question(f"{key} choice {digest}", "choice", 0, len(values) - 1)


class Asker:
    """A `Draw` that gets its values from a searcher.

    Args:
        answer: gives each question its answer.
    """

    def __init__(self, answer: Callable[[Question], float]) -> None:
        self._answer = answer

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        if step is not None:
            size = num_steps(low, high, step)
            return at_step(low, step, int(self._answer(_steps(key, low, step, size))))
        return self._number(Question(f"{key} linear", "linear", low, high))

    def loguniform(self, key: str, low: float, high: float) -> float:
        return self._number(Question(f"{key} log", "log", low, high))

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        values = range(low, high + 1, step)
        return values[int(self._answer(_steps(key, low, step, len(values))))]

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        return values[int(self._answer(_choice(key, values)))]

    def _number(self, question: Question) -> float:
        # Packages compute with logarithms: the end of a range may be missed by a bit.
        return min(max(float(self._answer(question)), question.low), question.high)


class _NotHere(ValueError):
    """A point that the space does not hold."""


class _Retrace:
    """A `Draw` that gives the values of a known point and notes the answers that lead to them."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.answers: Answers = []
        self.lost = False

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        if step is not None:
            return at_step(low, step, self._place(key, low, step, num_steps(low, high, step)))
        return self._number(Question(f"{key} linear", "linear", low, high), key)

    def loguniform(self, key: str, low: float, high: float) -> float:
        return self._number(Question(f"{key} log", "log", low, high), key)

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        values = range(low, high + 1, step)
        if not is_whole(self._params.get(key_of(key))):
            raise self._not_here(key)
        return values[self._place(key, low, step, len(values))]

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        fits = [index for index, value in enumerate(values) if self._has(key_of(key), value)]
        if not fits:
            raise self._not_here(key)
        # Of two sections that both fit, the one that says more: {dim: 1} is also in {dim: 1, depth: 2}.
        best = max(fits, key=lambda index: len(list(flatten(key_of(key), values[index]))))
        self.answers.append((_choice(key, values), best))
        return values[best]

    def _has(self, key: str, value: Any) -> bool:
        return all(name in self._params and same(self._params[name], item) for name, item in flatten(key, value))

    def _number(self, question: Question, key: str) -> float:
        value = self._params.get(key_of(key))
        if not is_number(value) or not question.low <= float(value or 0) <= question.high:
            raise self._not_here(key)
        self.answers.append((question, float(value or 0)))
        return self.answers[-1][1]

    def _place(self, key: str, low: float, step: float, size: int) -> int:
        value = self._params.get(key_of(key))
        if not is_number(value):
            raise self._not_here(key)
        place, rest = divmod(Decimal(repr(value)) - Decimal(repr(low)), Decimal(repr(step)))
        if rest != 0 or not 0 <= place < size:
            raise self._not_here(key)
        self.answers.append((_steps(key, low, step, size), int(place)))
        return int(place)

    def _not_here(self, key: str) -> _NotHere:
        self.lost = True
        return _NotHere(key)


def answers_of(space: Space, params: Mapping[str, Any]) -> Answers | None:
    """The answers that lead to a point; keys that such a point does not have are passed over.

    Returns:
        None where the space holds no such point: a key is missing, or its value is out of range.
    """
    retrace = _Retrace(params)
    try:
        point = space.draw(retrace)
    except (_NotHere, ConfigError):
        # A Python space turns whatever is raised through it into a ConfigError; one of its own is not ours to hide.
        if not retrace.lost:
            raise
        return None
    reached = all(key in params and same(params[key], value) for key, value in point.items())
    return retrace.answers if reached else None


def questions_of(space: Space) -> list[Question]:
    """All questions of a space in YAML that have more than one answer, those of inactive keys too."""
    questions: list[Question] = []

    def note(question: Question) -> float:
        questions.append(question)
        return question.low

    for place, dimension in space.dimensions.items():
        dimension.draw(place, Asker(note))
    return [question for question in questions if question.high > question.low]
