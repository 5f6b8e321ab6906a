"""One dimension of a space: its YAML form, the rules for its bounds, and how a value of it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, get_args

from glowflow.config.errors import Problem
from glowflow.config.spaces.draws import Draw, num_steps
from glowflow.config.spaces.values import close_to, flatten, is_number, is_whole, plain, same, show, strange

__all__ = ["Dimension", "Kind", "faults", "key_of", "read_dimension"]

Kind = Literal["uniform", "loguniform", "randint", "choice", "grid"]
_KINDS: tuple[str, ...] = get_args(Kind)
_LISTS = ("choice", "grid")


@dataclass(frozen=True)
class Dimension:
    """The values that a key may take.

    Args:
        kind: `uniform`, `loguniform`, `randint` (between ``low`` and ``high``, both included), `choice`, `grid`
            (one of ``values``; a searcher that is no grid takes both for a choice).
        step: distance of the values of a quantised `uniform` or a `randint`; None: any number, any whole number.
        when: other key -> values; the dimension is there only at points where each of these keys has one of them.
    """

    kind: Kind
    low: Any = None
    high: Any = None
    step: Any = None
    values: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def draw(self, place: str, source: Draw) -> Any:
        """Its value at a point; a section's mapping stays one."""
        if self.kind in _LISTS:
            return source.choice(place, self.values)
        if self.kind == "randint":
            return source.randint(place, self.low, self.high, self.step or 1)
        if self.kind == "loguniform":
            return source.loguniform(place, self.low, self.high)
        return source.uniform(place, self.low, self.high, self.step)

    def active(self, params: Mapping[str, Any]) -> bool:
        """Whether a point, as far as it is drawn, has this dimension."""
        return all(
            key in params and any(same(params[key], value) for value in values) for key, values in self.when.items()
        )

    def excludes(self, other: Dimension) -> bool:
        """Whether a condition of each keeps the two from being there at the same point."""
        return any(
            key in other.when and not any(same(a, b) for a in values for b in other.when[key])
            for key, values in self.when.items()
        )

    @property
    def size(self) -> int | None:
        """How many values there are; None on a continuous scale."""
        if self.kind in _LISTS:
            return len(self.values)
        if self.kind == "randint":
            return len(range(self.low, self.high + 1, self.step or 1))
        return None if self.step is None else num_steps(self.low, self.high, self.step)

    def can_be(self, key: str, flat_key: str, value: Any) -> bool:
        """Whether some point has this value under a key that the dimension, which stands at ``key``, sets."""
        if self.kind in _LISTS:
            return any(k == flat_key and same(v, value) for item in self.values for k, v in flatten(key, item))
        if not is_number(value) or not self.low <= value <= self.high:
            return False
        step = Decimal(repr(self.step or 1))
        return self.size is not None and (Decimal(repr(value)) - Decimal(repr(self.low))) % step == 0

    def keys(self, key: str) -> list[str]:
        """The dotted config keys that it sets where it stands at ``key``: several for sections."""
        flat = [k for value in self.values for k, _ in flatten(key, value)] if self.kind in _LISTS else [key]
        return list(dict.fromkeys(flat))

    def to_dict(self) -> dict[str, Any]:
        """Its form in a space file."""
        body: dict[str, Any] = {self.kind: list(self.values) if self.kind in _LISTS else [self.low, self.high]}
        if self.step is not None:
            body["step"] = self.step
        if self.when:
            body["when"] = {key: list(values) for key, values in self.when.items()}
        return body


def key_of(place: str) -> str:
    """The config key of a dimension by its place in the file: `training.lr`, or `training.lr[1]` of several."""
    return place.partition("[")[0]


def faults(dimension: Dimension) -> Iterator[str]:
    """What is wrong with bounds, step or values, one sentence each."""
    if dimension.kind in _LISTS:
        yield from _list_faults(dimension.values)
        return
    number, article = (is_whole, "a whole number") if dimension.kind == "randint" else (is_number, "a finite number")
    bounds = {"low": dimension.low, "high": dimension.high}
    wrong = [f"{name} must be {article}, not {show(value)}" for name, value in bounds.items() if not number(value)]
    yield from wrong
    if not wrong and dimension.low >= dimension.high:
        wrong.append(f"low ({show(dimension.low)}) must be less than high ({show(dimension.high)})")
        yield wrong[-1]
    if dimension.kind == "loguniform":
        below = [name for name, value in bounds.items() if is_number(value) and value <= 0]
        yield from (f"{name} must be greater than 0 on a logarithmic scale, not {show(bounds[name])}" for name in below)
    if dimension.step is None:
        return
    if dimension.kind == "loguniform":
        yield "has no `step` on a logarithmic scale"
    elif not number(dimension.step) or dimension.step <= 0:
        yield f"step must be {article} greater than 0, not {show(dimension.step)}"
    elif not wrong:
        yield from _step_faults(dimension)


def _list_faults(values: Sequence[Any]) -> Iterator[str]:
    if not values:
        yield "needs at least one value"
    for index, value in enumerate(values):
        why = strange(value)
        if why:
            yield f"value {index + 1} {why}"
        elif any(same(value, other) for other in values[:index]):
            yield f"holds {show(plain(value))} twice"


def _step_faults(dimension: Dimension) -> Iterator[str]:
    low, high, step = (Decimal(repr(value)) for value in (dimension.low, dimension.high, dimension.step))
    if step > high - low:
        yield f"step ({dimension.step}) is greater than high - low ({high - low})"
    elif rest := (high - low) % step:
        yield (
            f"step ({dimension.step}) must divide high - low ({high - low}): the last value before high "
            f"({dimension.high}) is {high - rest}"
        )


def read_dimension(place: str, body: Any) -> tuple[Dimension | None, list[Problem]]:
    """One entry of ``space:``, with all that is wrong with it.

    Args:
        place: the dotted config key, with a number where several entries stand under it.
        body: what stands there: a mapping with one kind, and `step` and `when` where they are wanted.
    """
    where, key = f"space.{place}", key_of(place)
    form = f"must be a mapping with one of {', '.join(_KINDS)}, as in {{uniform: [0, 1]}}"
    if not isinstance(body, Mapping):
        hint = "write {choice: [...]}" if isinstance(body, list) else "a fixed value belongs under `set`"
        return None, [Problem(where, form, body, hint)]
    kinds = [name for name in body if name in _KINDS]
    others = [name for name in body if name not in (*_KINDS, "step", "when")]
    problems = [
        Problem(f"{where}.{name}", "is not a known key", body[name], _hint(key, name, body[name])) for name in others
    ]
    if len(kinds) != 1:
        # An unknown key is most likely the misspelt kind: one problem is enough.
        return None, problems or [Problem(where, form, dict(body))]
    dimension, found = _read_values(where, kinds[0], body)
    when, wrong = _read_when(where, body.get("when", {}))
    problems += found + wrong
    return (replace(dimension, when=when) if dimension is not None and not problems else None), problems


def _hint(key: str, name: object, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"sections are not nested here: write {key}.{name}"
    return close_to(name, (*_KINDS, "step", "when"))


def _read_values(where: str, kind: Any, body: Mapping[str, Any]) -> tuple[Dimension | None, list[Problem]]:
    values, step = body[kind], body.get("step")
    if kind in _LISTS:
        if not isinstance(values, list):
            return None, [Problem(where, f"{kind} must be a list of values", values)]
        dimension = Dimension(kind, values=tuple(plain(value) for value in values))
        found = ["has no `step`: its values are listed"] if "step" in body else []
    elif not isinstance(values, list) or len(values) != 2:
        return None, [Problem(where, f"{kind} must be a list of two, [low, high]", values)]
    else:
        dimension = Dimension(kind, values[0], values[1], step)
        found = ["step must be a number, not null"] if "step" in body and step is None else []
    found += faults(dimension)
    if not found and kind in ("uniform", "loguniform"):
        low, high = float(values[0]), float(values[1])
        dimension = Dimension(kind, low, high, None if step is None else float(step))
    return dimension, [Problem(where, rule) for rule in found]


def _read_when(where: str, body: Any) -> tuple[dict[str, tuple[Any, ...]], list[Problem]]:
    """Conditions; whether their keys are there is for the whole space to say."""
    if not isinstance(body, Mapping):
        return {}, [Problem(f"{where}.when", "must be a mapping from other keys to a value or a list of values", body)]
    when = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in body.items()}
    problems = [
        Problem(f"{where}.when.{key}", "needs at least one value") for key, values in when.items() if not values
    ]
    return when, problems
