"""Plain values in, a checked config or every problem out.

pydantic reports all wrong fields of one pass, but skips the rules that join several fields as soon as one field is
wrong. So what is wrong is taken out of the data and the rest is checked again, until nothing new turns up; a rule
that reads a key known to be wrong is left out, since it would only repeat the problem.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from glowflow.config.errors import Problem, RuleError
from glowflow.config.fields import known_keys, siblings_of, suggest
from glowflow.config.schema import GlowFlowConfig

__all__ = ["check"]

logger = logging.getLogger(__name__)

Path = tuple[Any, ...]

# A wrong name makes every other key of its section meaningless.
_SELECTORS: dict[Path, Path] = {
    ("model", "arch"): ("model",),
    ("training", "optimizer", "name"): ("training", "optimizer"),
}


@dataclass(frozen=True)
class _Found:
    """A problem with the place of its value in the data."""

    path: Path
    problem: Problem
    unknown_key: bool = False

    @property
    def touches(self) -> list[Path]:
        """Every place that this problem is about."""
        return [self.path, *(tuple(key.split(".")) for key in self.problem.related)]


def check(data: dict[str, Any], *, strict: bool = True) -> tuple[GlowFlowConfig | None, list[Problem]]:
    """Check a whole experiment.

    Args:
        data: sections and keys as plain values; not changed.
        strict: False drops unknown keys with a logged warning, to read what another version has written.

    Returns:
        The config, or None; and all problems, in the order of discovery. One of the two is empty.
    """
    remaining = copy.deepcopy(data)
    problems: list[Problem] = []
    broken: list[Path] = []
    while True:
        try:
            config = GlowFlowConfig.model_validate(remaining)
            break
        except ValidationError as error:
            found = _merge(list(_flatten(error, remaining, ())))
        new = [item for item in found if not any(_overlap(a, b) for a in item.touches for b in broken)]
        for item in new:
            if item.unknown_key and not strict:
                logger.warning("config key %s is not known to this version and is left out", item.problem.key)
            else:
                problems.append(item.problem)
        wrong = [_SELECTORS.get(path, path) for item in found for path in item.touches]
        broken += wrong
        if not [path for path in wrong if _remove(remaining, path)]:
            return None, problems
    return (None if problems else config), problems


def _overlap(a: Path, b: Path) -> bool:
    """Whether one path is the other or lies below it."""
    length = min(len(a), len(b))
    return a[:length] == b[:length]


def _remove(data: dict[str, Any], path: Path) -> bool:
    """Take a value out of the data: the key itself, or the list or scalar that stands on the way to it."""
    here: Any = data
    for depth, part in enumerate(path):
        if not isinstance(here, dict) or part not in here:
            return False
        if depth == len(path) - 1 or not isinstance(here[part], dict):
            del here[part]
            return True
        here = here[part]
    return False


def _flatten(error: ValidationError, data: dict[str, Any], prefix: Path) -> Iterator[_Found]:
    """pydantic's errors, nested ones included, as problems with full dotted keys."""
    for detail in error.errors(include_url=False):
        path = (*prefix, *detail["loc"])
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            yield from _flatten(inner, data, path)
        elif isinstance(inner, RuleError):
            yield from (_absolute(problem, path) for problem in inner.problems)
        elif detail["type"] == "extra_forbidden":
            yield _unknown(path, detail["input"], data)
        else:
            yield _wrong_value(path, detail, data)


def _wrong_value(path: Path, detail: ErrorDetails, data: dict[str, Any]) -> _Found:
    """A value of the wrong type or outside its bounds, or a key that is missing."""
    kind, value = detail["type"], detail["input"]
    rule = _rule(kind, detail.get("ctx", {}), detail["msg"])
    if kind == "missing" and path and isinstance(path[-1], int):
        path, rule = path[:-1], f"must have at least {path[-1] + 1} entries"
    elif kind == "missing":
        value = None
    elif value is None:
        rule += ", not null"
    path = _without_union_tags(path, data)
    return _Found(path, Problem(_dotted(path), rule, value, _hint(kind, value)))


def _absolute(problem: Problem, prefix: Path) -> _Found:
    """A rule's problem, whose keys are relative to the schema that raised it."""
    path = (*prefix, *(part for part in problem.key.split(".") if part))
    related = tuple(_dotted((*prefix, key)) for key in problem.related)
    return _Found(path, replace(problem, key=_dotted(path), related=related))


def _unknown(path: Path, value: Any, data: dict[str, Any]) -> _Found:
    """An unknown key; one that only leads to another (`trainng.lr`) is named to its end."""
    full, inner = path, value
    while isinstance(inner, dict) and len(inner) == 1 and len(full) < 8:
        part, inner = next(iter(inner.items()))
        full = (*full, part)
    key = _dotted(full)
    close = suggest(key, known_keys(data))
    if not close and full != path:
        key, inner = _dotted(path), value
        close = suggest(key, known_keys(data))
    siblings = [] if close else [k.rpartition(".")[2] for k in siblings_of(key, known_keys(data))]
    hint = f"did you mean {close!r}?" if close else f"known here: {', '.join(siblings)}" if siblings else ""
    return _Found(path, Problem(key, "is not a known key", inner, hint), unknown_key=True)


def _without_union_tags(path: Path, data: dict[str, Any]) -> Path:
    """pydantic adds the tried member of a union to the path; a scalar in the data has nothing below it."""
    here: Any = data
    for depth, part in enumerate(path):
        if isinstance(here, dict):
            if part not in here:
                return path
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            return path[:depth]
    return path


def _merge(found: list[_Found]) -> list[_Found]:
    """One problem per place: the members of a union that all refuse a value become `A, or B`."""
    merged: dict[tuple[Path, bool], _Found] = {}
    for item in found:
        key = (item.path, bool(item.problem.related))
        if key in merged:
            first = merged[key].problem
            rule = f"{first.rule}, or {item.problem.rule.removeprefix('must be ')}"
            merged[key] = replace(merged[key], problem=replace(first, rule=rule))
        else:
            merged[key] = item
    return list(merged.values())


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


_RULES: dict[str, str | Callable[[dict[str, Any]], str]] = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": lambda ctx: f"must be greater than {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 64 bits",
    "int_type": "must be a whole number",
    "less_than": lambda ctx: f"must be less than {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']:g}",
    "list_type": "must be a list",
    "literal_error": lambda ctx: f"must be {ctx['expected']}",
    "missing": "is required",
    "model_attributes_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_type": "must be text",
    "too_long": lambda ctx: f"must have at most {ctx['max_length']} entries, it has {ctx['actual_length']}",
    "tuple_type": "must be a list",
    "value_error": lambda ctx: str(ctx["error"]),
}


def _rule(kind: str, context: dict[str, Any], message: str) -> str:
    """pydantic's message in our words; an error type we do not know keeps its own sentence."""
    rule = _RULES.get(kind)
    if rule is None:
        return re.sub(r"^(Input|Value) should", "must", message)
    return rule if isinstance(rule, str) else rule(context)


def _hint(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, (int, float)):
        return f"put it in quotes: '{value}'"
    return ""
