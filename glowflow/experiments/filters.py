"""Conditions such as ``training.lr>1e-3`` on the config keys, metrics and status of runs."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.tracking.reading import parse_param

__all__ = ["Condition", "parse_conditions", "unknown_keys"]

_CONDITION = re.compile(r"\s*([^\s=!<>]+)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """``key`` stands on the left of the operator, ``value`` on its right."""

    key: str
    sign: str
    value: Any

    def holds(self, have: Mapping[str, Any]) -> bool:
        """Whether it holds for a run with these values; what a run lacks is only different from everything."""
        found = have.get(self.key)
        compare = _OPERATORS[self.sign]
        if _is_number(found) and _is_number(self.value):
            return compare(found, self.value)
        if self.sign not in ("=", "!="):
            return False
        return compare(str(found), str(self.value))

    def __str__(self) -> str:
        return f"{self.key}{self.sign}{self.value}"


def parse_conditions(texts: Sequence[str]) -> list[Condition]:
    """Conditions as they are typed.

    Raises:
        ConfigError: some cannot be understood; all of them are named.
    """
    conditions: list[Condition] = []
    problems: list[Problem] = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            problems.append(Problem("filter", "must be KEY, one of = != < <= > >=, and a value", text, _EXAMPLE))
            continue
        key, sign, value = match[1], match[2].replace("==", "="), parse_param(_python(match[3]))
        if sign not in ("=", "!=") and not _is_number(value):
            problems.append(Problem("filter", f"{sign} compares with a number", text, _EXAMPLE))
        conditions.append(Condition(key, sign, value))
    if problems:
        raise ConfigError(problems)
    return conditions


_EXAMPLE = "for example 'training.lr>1e-3' or 'status=FINISHED'"


def unknown_keys(conditions: Iterable[Condition], known: Iterable[str]) -> list[Problem]:
    """A problem for each key that no run has."""
    names = sorted(known)
    problems = []
    for condition in conditions:
        if condition.key not in names:
            close = difflib.get_close_matches(condition.key, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it must be a config key, a metric, or status"
            problems.append(Problem("filter", "no run has this key", condition.key, hint))
    return problems


def _python(text: str) -> str:
    """YAML's words for what Python writes otherwise."""
    return {"true": "True", "false": "False", "null": "None", "none": "None"}.get(text, text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
