"""Holds a space against a config: every corner must be a config that training would take.

Nothing may be refused in the middle of a sweep, so all points are tried where they are few, and else every value
around a first point, pairs of values, and the very points that random search will draw.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import load_config, warnings
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.spaces.draws import Point, RandomDraw, Scripted, around, pairs, walk
from glowflow.config.spaces.model import Space
from glowflow.config.spaces.rules import doubts, key_rules, rules, step_doubts, step_rules
from glowflow.config.spaces.values import overlap, show

__all__ = ["check_space"]

MOST_VALUES = 256
"""A key with more values than this (`randint: [1, 1000]`) is tried at both ends and in between."""

MOST_POINTS = 2048
"""A space with more corners than this is not tried completely."""

RANDOM_POINTS = 64, 1024
"""How many random points are tried beside the corners: as many as there are trials, within these bounds."""

MOST_REFUSED = 200
"""After so many refused points the rest would say the same again."""


def check_space(space: Space, config: GlowFlowConfig) -> list[str]:
    """Check a space against the config that it shall vary.

    Args:
        space: from `load_space`.
        config: the experiment.

    Returns:
        What is allowed but probably not meant, one sentence each.

    Raises:
        ConfigError: with every problem: what the config refuses and at which values, keys that a sweep sets itself,
            settings that contradict each other.
    """
    problems = [*rules(space), *key_rules(space)]
    banned = {problem.key for problem in problems}
    fixed = {key: value for key, value in space.fixed.items() if f"set.{key}" not in banned}
    report = _Report(config.model_dump(mode="json", exclude_unset=True), fixed, tuple(warnings(config)))
    if space.variants:
        for label, point in space.variants.items():
            report.visit(point, f"variants.{label}")
    else:
        _visit_space(space, report)
    problems += [*report.problems(), *step_rules(space, report.configs or [config])]
    if problems:
        raise ConfigError(problems, space.source or space.name)
    return [*doubts(space, config), *step_doubts(space, report.configs), *report.warnings]


def _visit_space(space: Space, report: _Report) -> None:
    owners = space.owners()
    known: set[str] = set()

    def look(point: Point, source: Scripted | None) -> None:
        for key, values in () if source is None else source.lists.items():
            report.see_list(key, values)
        text = json.dumps(point, sort_keys=True)
        if text not in known:
            known.add(text)
            report.visit(point, "space", owners)

    for point, source in around(space.draw, MOST_VALUES):
        look(point, source)
    for point, origin in _corners(space):
        if report.num_refused >= MOST_REFUSED:
            break
        look(point, origin)
    if space.program is not None:
        report.lists_differ(space.searcher.name)
        draws = [RandomDraw(0, index) for index in range(8)]
        if any(space.draw(source) != space.draw(source) for source in draws):
            report.extra.append(Problem("space(draw)", "does not give the same point for the same draws"))


def _corners(space: Space) -> Iterator[tuple[Point, Scripted | None]]:
    """Combinations of values and random points, each with the script that led there."""
    draw = space.draw
    complete = list(itertools.islice(walk(draw, MOST_VALUES), MOST_POINTS + 1))
    if len(complete) <= MOST_POINTS:
        yield from complete
    else:
        yield from itertools.islice(pairs(draw, MOST_VALUES), MOST_POINTS)
    few, many = RANDOM_POINTS
    for index in range(min(max(few, space.trials or 0), many)):
        yield draw(RandomDraw(space.searcher.seed, index)), None


@dataclass
class _Refused:
    """Points refused for the same reason: the first of them, and how many."""

    problem: Problem
    times: int = 1


@dataclass
class _Report:
    """Collects what the config says at each point.

    Args:
        base: the config's values, as far as they were set.
        fixed: what every trial has; a key that is wrong by itself is taken out, so that the points can be judged.
        known: warnings that the config has without the space.
    """

    base: Mapping[str, Any]
    fixed: Point
    known: tuple[str, ...]
    configs: list[GlowFlowConfig] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    extra: list[Problem] = field(default_factory=list)
    num_refused: int = 0
    num_tried: int = 0
    _refused: dict[tuple[Any, ...], _Refused] = field(default_factory=dict)
    _reasons: set[str] = field(default_factory=set)
    _lists: dict[str, list[list[Any]]] = field(default_factory=dict)

    def visit(self, point: Point, where: str, owners: Mapping[str, str] | None = None) -> None:
        """Try one point; ``owners`` says which dimension sets a key, where it has another name."""
        self.num_tried += 1
        try:
            config = load_config(self.base, {**self.fixed, **point})
        except ConfigError as error:
            self.num_refused += 1
            for problem in error.problems:
                self._refuse(problem, point, where, owners or {})
            return
        self.configs.append(config)
        for text in warnings(config):
            reason = _without_numbers(text)
            if text not in self.known and reason not in self._reasons:
                self._reasons.add(reason)
                self.warnings.append(text if where != "space" else f"at some points, {text}")

    def _refuse(self, problem: Problem, point: Point, where: str, owners: Mapping[str, str]) -> None:
        """Note a problem as one of the point's keys, or else of one of those that ``set`` gives to all points."""
        names = (problem.key, *problem.related)
        both = {**self.fixed, **point}
        about = [key for name in names for key in both if overlap(key, name)] or list(point) or list(self.fixed)
        guilty = [key for key in about if key in point]
        if not guilty:
            where = "set"
        if not guilty and not problem.related:
            self.fixed = {key: value for key, value in self.fixed.items() if key not in about}
        about = list(dict.fromkeys([*guilty[:1], *about]))
        reason = (where, *about, problem.key, _without_numbers(problem.rule))
        if reason in self._refused:
            self._refused[reason].times += 1
            return
        key = f"{where}.{owners.get(about[0], about[0])}" if about else problem.key
        self._refused[reason] = _Refused(Problem(key, _quote(problem, both, about, key), hint=problem.hint))

    def see_list(self, key: str, values: list[Any]) -> None:
        """Remember from which lists a function draws a key."""
        seen = self._lists.setdefault(key, [])
        if values not in seen:
            seen.append(values)

    def lists_differ(self, searcher: str) -> None:
        """Optuna knows one list of choices for each key; a function may name another one at each point."""
        for key, seen in self._lists.items():
            if searcher == "optuna" and len(seen) > 1:
                rule = f"is drawn from different lists, {show(seen[0])} and {show(seen[1])}: optuna takes one for a key"
                hint = "draw from one list, or use the searcher random"
                self.extra.append(Problem(f"space.{key}", rule, hint=hint))

    def problems(self) -> list[Problem]:
        """One problem for each reason."""
        found = []
        for item in self._refused.values():
            rule = item.problem.rule
            if item.times > 1 and not rule.endswith("not a known key"):
                rule += f" (and at {item.times - 1} more of {self.num_tried} points tried)"
            found.append(Problem(item.problem.key, rule, hint=item.problem.hint))
        return [*found, *self.extra]


def _quote(problem: Problem, point: Point, about: list[str], key: str) -> str:
    """What the config says, and at which values."""
    if problem.rule == "is not a known key":
        return problem.rule if key.endswith(f".{problem.key}") else f"{problem.key} {problem.rule}"
    if not about:
        return problem.rule
    values = [f"{name}={show(point[name])}" for name in about]
    at = values[0] + (f" with {', '.join(values[1:])}" if len(values) > 1 else "")
    if problem.key == about[0]:
        return f"the config refuses {at}: {problem.rule}"
    given = "" if problem.value is None or problem.key in about else f" ({show(problem.value)})"
    return f"the config refuses {at}: {problem.key}{given} {problem.rule}"


def _without_numbers(text: str) -> str:
    """What stays the same when a rule is broken by other numbers."""
    return re.sub(r"-?\d[\d.e+-]*", "#", text)
