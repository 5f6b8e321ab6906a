"""From the values of a space file to a `Space`, or to everything that is wrong with the file in itself.

What only a config can say (unknown keys, values that it refuses) is left to `check_space`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.spaces.dimensions import Dimension, key_of, read_dimension
from glowflow.config.spaces.draws import Point, RandomDraw, around
from glowflow.config.spaces.model import Scale, Space, digest_of, scale_of
from glowflow.config.spaces.program import Program
from glowflow.config.spaces.settings import (
    Searcher,
    read_count,
    read_duration,
    read_metrics,
    read_scheduler,
    read_searcher,
    read_seeds,
    read_share,
)
from glowflow.config.spaces.values import clash, close_to, flatten, show, strange

__all__ = ["TOP_KEYS", "read_back", "read_space"]

TOP_KEYS = (
    "metric",
    "mode",
    "set",
    "space",
    "variants",
    "searcher",
    "scheduler",
    "trials",
    "seeds",
    "concurrency",
    "time_budget",
    "max_failed",
)

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = ("report", "sweep.json", "journal.jsonl", "best_full.yaml")  # what a sweep's directory holds beside its trials

SEEN_DRAWS = 64
"""How many random points of a Python function are looked at to learn its keys."""


def read_space(
    raw: Mapping[str, Any],
    *,
    name: str,
    source: str | None,
    program: Program | None = None,
    scales: dict[str, Scale] | None = None,
    digest: str = "",
) -> Space:
    """A space from the mapping of its file.

    Args:
        raw: plain values.
        name: of the space.
        source: its file, or None.
        program: the function of a Python space.
        scales: the keys of that function; None: look at what it draws.
        digest: of the file that this comes from; empty: this is the file.

    Raises:
        ConfigError: with all problems.
    """
    problems = list(_unknown(raw))
    fixed = _read_point("set", raw.get("set"), problems)
    dimensions = _read_dimensions(raw, problems)
    variants = _read_variants(raw, problems)
    if "space" in raw and "variants" in raw:
        problems.append(Problem("variants", "stands beside `space`: a file holds one of the two"))
    elif program is None and "space" not in raw and "variants" not in raw:
        problems.append(Problem("space", "is missing: dimensions stand under `space`, named points under `variants`"))
    problems += _fixed_twice(fixed, dimensions, variants)
    searcher, found = read_searcher(raw.get("searcher"), variants="variants" in raw)
    scheduler, wrong = read_scheduler(raw.get("scheduler"))
    metrics, modes, odd = read_metrics(raw.get("metric", "val_loss"), raw.get("mode", "min"))
    seeds, absolute, bad_seeds = read_seeds(raw.get("seeds", 1))
    numbers = {key: read_count(key, raw.get(key)) for key in ("trials", "concurrency")}
    budget, late = read_duration("time_budget", raw.get("time_budget"))
    share, beyond = read_share("max_failed", raw.get("max_failed", 0.5))
    problems += [*found, *wrong, *odd, *bad_seeds, *late, *beyond, *(p for _, many in numbers.values() for p in many)]
    if problems:
        raise ConfigError(problems, source or name)
    if program is not None:
        scales = _seen_scales(program) if scales is None else scales
    space = Space(
        name=name,
        source=source,
        digest=digest,
        metrics=metrics,
        modes=modes,
        fixed=fixed,
        dimensions=dimensions,
        variants=variants,
        searcher=searcher or _default_searcher(dimensions),
        scheduler=scheduler,
        trials=numbers["trials"][0],
        seeds=seeds,
        absolute_seeds=absolute,
        concurrency=numbers["concurrency"][0],
        time_budget_s=budget,
        max_failed=share,
        program=program,
        scales=_scales(dimensions, variants) if scales is None else scales,
    )
    return space if digest else replace(space, digest=digest_of(space.content(), program))


def read_back(values: Mapping[str, Any], changes: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Space:
    """What `Space.to_dict` gave; dimensions and variants get back into the order that they had.

    Args:
        values: from `Space.to_dict`.
        changes: applied to the keys of a space file among them.
    """
    content = {key: value for key, value in values.items() if key in TOP_KEYS}
    for section in ("space", "variants"):
        if section in content:
            content[section] = {key: content[section][key] for key in values["order"]}
    if "variants" in content:
        content.pop("searcher")
    program = Program(**values["program"]) if "program" in values else None
    return read_space(
        changes(content),
        name=values["name"],
        source=values["source"],
        program=program,
        scales=values.get("scales"),
        digest=values["digest"],
    )


def _unknown(raw: Mapping[str, Any]) -> Iterable[Problem]:
    for key, value in raw.items():
        if key in TOP_KEYS:
            continue
        if isinstance(key, str) and key.partition(".")[0] in GlowFlowConfig.model_fields:
            hint = "keys of the config stand under `space`, `set` or `variants`"
        else:
            hint = close_to(key, TOP_KEYS)
        yield Problem(str(key), "is not a known key", value, hint)


def _default_searcher(dimensions: Mapping[str, Dimension]) -> Searcher:
    kinds = {dimension.kind for dimension in dimensions.values()}
    return Searcher("grid" if kinds == {"grid"} else "random")


def _dotted(key: object) -> bool:
    return isinstance(key, str) and all(key.split("."))


def _read_point(where: str, body: Any, problems: list[Problem]) -> Point:
    """Dotted keys or nested sections with their values, flat."""
    if body is None or not isinstance(body, Mapping):
        if body is not None:
            problems.append(Problem(where, "must be a mapping from keys of the config to values", body))
        return {}
    point: Point = {}
    for key, value in body.items():
        why = strange(value)
        if not _dotted(key):
            problems.append(Problem(f"{where}.{key}", "must be a dotted key of the config", value))
        elif why:
            problems.append(Problem(f"{where}.{key}", why, value))
        else:
            pairs = list(flatten(key, value))
            twice = [k for k, _ in pairs for other in point if clash(k, other)]
            problems += [Problem(f"{where}.{k}", "is set twice, once inside of a section", value) for k in twice]
            point.update(pairs)
    return point


def _read_dimensions(raw: Mapping[str, Any], problems: list[Problem]) -> dict[str, Dimension]:
    """``space:``, sorted so that conditions can be judged."""
    if "space" not in raw:
        return {}
    body = raw["space"]
    if not isinstance(body, Mapping):
        problems.append(Problem("space", "must be a mapping from keys of the config to dimensions", body))
        return {}
    if not body:
        problems.append(Problem("space", "is empty: there is nothing to try"))
    found: dict[str, Dimension] = {}
    complete = True
    for key, value in body.items():
        if not _dotted(key) or "[" in key:
            problems.append(Problem(f"space.{key}", "must be a dotted key of the config", value))
            complete = False
            continue
        for place, one in _entries(key, value):
            dimension, wrong = read_dimension(place, one)
            problems += wrong
            complete = complete and dimension is not None
            if dimension is not None:
                found[place] = dimension
    problems += _sets_twice(found)
    # A condition on a dimension that could not be read would only repeat its problem.
    return _sorted(found, problems) if complete else found


def _entries(key: str, value: Any) -> list[tuple[str, Any]]:
    """What stands under a key with its places: one dimension, or a list of several."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return [(f"{key}[{number}]", one) for number, one in enumerate(value)]
    return [(key, value)]


def _sets_twice(dimensions: Mapping[str, Dimension]) -> Iterable[Problem]:
    sets = [(place, flat) for place, dimension in dimensions.items() for flat in dimension.keys(key_of(place))]
    for index, (place, flat) in enumerate(sets):
        for other, theirs in sets[:index]:
            if other == place or not clash(theirs, flat):
                continue
            if key_of(other) != key_of(place):
                yield Problem(f"space.{place}", f"sets {flat}, which space.{other} sets too")
            elif not dimensions[place].excludes(dimensions[other]):
                rule = f"may be there together with space.{other}"
                hint = "give both a `when` on the same key, with other values"
                yield Problem(f"space.{place}", rule, hint=hint)
            else:
                continue
            break


def _sorted(dimensions: dict[str, Dimension], problems: list[Problem]) -> dict[str, Dimension]:
    """Each key after those that its conditions read, else in the order of the file."""
    owners: dict[str, list[str]] = {}
    for place, dimension in dimensions.items():
        for flat in dimension.keys(key_of(place)):
            owners.setdefault(flat, []).append(place)
    graph: dict[str, list[str]] = {key_of(place): [] for place in dimensions}
    for place, dimension in dimensions.items():
        read = [owner for name in dimension.when for owner in owners.get(name, [])]
        graph[key_of(place)] += [key_of(owner) for owner in read]
        problems += _bad_conditions(place, dimension, dimensions, owners)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]
        rule = f"conditions lead in a circle: {' needs '.join(cycle)}"
        problems.append(Problem(f"space.{cycle[0]}.when", rule))
        return dimensions
    order: list[str] = []

    def put(key: str) -> None:
        for parent in graph[key]:
            put(parent)
        if key not in order:
            order.append(key)

    for key in graph:
        put(key)
    return {place: dimensions[place] for key in order for place in dimensions if key_of(place) == key}


def _bad_conditions(
    place: str, dimension: Dimension, dimensions: Mapping[str, Dimension], owners: Mapping[str, list[str]]
) -> Iterable[Problem]:
    for name, values in dimension.when.items():
        where = f"space.{place}.when.{name}"
        if name in dimensions and name not in owners:
            rule = "is a section: name one of the keys that its choices set"
            yield Problem(where, rule, hint=", ".join(dimensions[name].keys(name)))
        elif name not in owners:
            yield Problem(where, "is not a dimension of this space", hint=close_to(name, owners, "dimensions"))
        elif endless := [owner for owner in owners[name] if dimensions[owner].size is None]:
            yield Problem(where, f"space.{endless[0]} is continuous: it has no value to wait for", list(values))
        else:
            for value in values:
                if not any(dimensions[owner].can_be(key_of(owner), name, value) for owner in owners[name]):
                    rule = f"space.{', space.'.join(owners[name])} never has the value {show(value)}"
                    body = ", ".join(show(dimensions[owner].to_dict()) for owner in owners[name])
                    yield Problem(where, rule, hint=f"it is {body}")


def _read_variants(raw: Mapping[str, Any], problems: list[Problem]) -> dict[str, Point]:
    """``variants:``."""
    if "variants" not in raw:
        return {}
    body = raw["variants"]
    if not isinstance(body, Mapping):
        problems.append(Problem("variants", "must be a mapping from labels to what each of them sets", body))
        return {}
    if not body:
        problems.append(Problem("variants", "is empty: there is nothing to run"))
    labels: dict[str, str] = {}
    for label in body:
        rule = _label_fault(label)
        if not rule and label.lower() in labels:
            rule = f"differs from {labels[label.lower()]!r} by upper and lower case only"
        if rule:
            problems.append(Problem(f"variants.{label}", rule))
        else:
            labels[label.lower()] = label
    return {str(label): _read_point(f"variants.{label}", point, problems) for label, point in body.items()}


def _label_fault(label: object) -> str:
    """Why a label could not be the name of a directory."""
    if not isinstance(label, str):
        return f"a label must be text: put it in quotes, '{label}'"
    if label in _TAKEN:
        return "is the name of a file of the sweep itself"
    if not _LABEL.fullmatch(label) or label.endswith("."):
        return "a label names a directory: up to 64 letters, digits, and . _ - inside"
    return ""


def _fixed_twice(fixed: Point, dimensions: Mapping[str, Dimension], variants: Mapping[str, Point]) -> Iterable[Problem]:
    """``set`` is what every trial has, so nothing else may say otherwise."""
    places = [
        (f"space.{place}", flat) for place, dimension in dimensions.items() for flat in dimension.keys(key_of(place))
    ]
    places += [(f"variants.{label}.{key}", key) for label, point in variants.items() for key in point]
    for where, key in places:
        other = next((name for name in fixed if clash(name, key)), None)
        if other is not None:
            yield Problem(where, f"is fixed for every trial by set.{other}", fixed[other])


def _scales(dimensions: Mapping[str, Dimension], variants: Mapping[str, Point]) -> dict[str, Scale]:
    values: dict[str, list[Any]] = {}
    kinds: dict[str, set[str]] = {}
    for place, dimension in dimensions.items():
        for flat in dimension.keys(key_of(place)):
            listed = [v for value in dimension.values for k, v in flatten(key_of(place), value) if k == flat]
            values.setdefault(flat, []).extend(listed)
            kinds.setdefault(flat, set()).add(dimension.kind)
    scales = {flat: scale_of(found, kinds[flat]) for flat, found in values.items()}
    for key in dict.fromkeys(key for point in variants.values() for key in point):
        scales[key] = scale_of([point[key] for point in variants.values() if key in point], set())
    return scales


def _seen_scales(program: Program) -> dict[str, Scale]:
    """The keys of a Python function, as far as its corners and some random points show them."""
    values: dict[str, list[Any]] = {}
    kinds: dict[str, set[str]] = {}

    def look(source: Any) -> Point:
        point, dimensions = program.run(source)
        for key, value in point.items():
            values.setdefault(key, []).append(value)
        for key, dimension in dimensions.items():
            kinds.setdefault(key, set()).add(dimension.kind)
        return point

    for _ in around(look, most=8):
        pass
    for index in range(SEEN_DRAWS):
        look(RandomDraw(0, index))
    return {key: scale_of(found, kinds.get(key, set())) for key, found in values.items()}
