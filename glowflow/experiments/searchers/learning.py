"""The half that all learning searchers share: what is known of each point.

A proposal is a pure function of the seed, the number of the point and what is known, never of a package's own
state: a search that is replayed from a journal goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.space import Space
from glowflow.experiments.searchers.base import Ask
from glowflow.experiments.searchers.questions import Answers, Asker, Question, answers_of

__all__ = ["LearningSearch", "Observation", "require_plain"]

logger = logging.getLogger(__name__)


def require_plain(space: Space, *, one_metric: bool) -> None:
    """Refuse what a package cannot search.

    Args:
        space: whose questions must be known beforehand.
        one_metric: whether the package takes one objective only.

    Raises:
        ConfigError: with all problems.
    """
    name, problems = space.searcher.name, []
    if space.program is not None:
        rule = "needs to know all dimensions beforehand, which a Python space does not say"
        problems.append(Problem("searcher.name", rule, name, "use optuna, or a space in YAML"))
    if one_metric and len(space.metrics) > 1:
        problems.append(Problem("searcher.name", "searches for one metric", name, "use optuna, or name one metric"))
    if problems:
        raise ConfigError(problems)


@dataclass
class Observation:
    """A point and what has come of it.

    Args:
        answers: see `Answers`.
        state: `open` (asked, not told), `done`, `stopped` (told, but not trained for its whole budget), `failed`.
        values: of the metrics, when it is done or stopped.
        step: where it was stopped.
        curve: step -> what its seeds reported there of the first metric.
    """

    answers: Answers
    state: Literal["open", "done", "stopped", "failed"] = "open"
    values: list[float] = field(default_factory=list)
    step: int = 0
    curve: dict[int, list[float]] = field(default_factory=dict)

    def course(self) -> dict[int, float]:
        """Step -> mean over its seeds of the first metric; with one metric, where it was stopped too."""
        course = {step: statistics.fmean(values) for step, values in sorted(self.curve.items())}
        return course | {self.step: self.values[0]} if self.state == "stopped" else course


class LearningSearch(ABC):
    """Keeps what is known; a subclass proposes.

    Args:
        space: what to search; its searcher's seed makes the search repeatable.
    """

    learns = True
    waiting = False

    def __init__(self, space: Space) -> None:
        self.space = space
        self._total = space.num_points()
        self._history: list[Observation] = []
        self._points: dict[int, Observation] = {}
        self._next = 0

    @abstractmethod
    def propose(self, known: Sequence[Observation], seed: int) -> Callable[[Question], float]:
        """The answers to the questions of one more point.

        Args:
            known: earlier results first, then the points of this search by their number.
            seed: of all that is random in this proposal.
        """

    def ask(self) -> Ask | None:
        if self._total is not None and self._next >= self._total:
            return None
        known = [*self._history, *(self._points[point] for point in sorted(self._points))]
        digest = hashlib.sha256(f"{self.space.searcher.seed}/{self._next}".encode()).digest()
        answer = self.propose(known, int.from_bytes(digest[:4], "big"))
        ask = Ask(self._next, None, self.space.draw(Asker(answer)))
        self.recall(ask)
        return ask

    def recall(self, ask: Ask) -> None:
        self._next = max(self._next, ask.point + 1)
        answers = answers_of(self.space, ask.params)
        if answers is None:
            logger.warning("point %d of the journal is not in the space: nothing is learnt from it", ask.point)
        else:
            self._points[ask.point] = Observation(answers)

    def tell(self, point: int, values: list[float] | None, params: dict[str, Any], *, step: int | None = None) -> None:
        known = self._points.get(point)
        if known is None:
            return
        if values is None or not all(math.isfinite(value) for value in values):
            known.state = "failed"
            return
        known.values, known.step = list(values), step or 0
        known.state = "done" if step is None else "stopped"

    def prune(self, point: int, step: int, value: float) -> None:
        if point in self._points and math.isfinite(value):
            self._points[point].curve.setdefault(step, []).append(value)

    def learn(self, params: Mapping[str, Any], values: Sequence[float]) -> bool:
        answers = answers_of(self.space, params)
        if answers is None or len(values) != len(self.space.metrics) or not all(map(math.isfinite, values)):
            return False
        self._history.append(Observation(answers, "done", [float(value) for value in values]))
        return True
