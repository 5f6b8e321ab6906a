"""Where the values of a point come from: at random, or by a script that visits every corner of a space.

A space is a function from a `Draw` to a point. So one walk, which answers each question with one option after the
other, finds all points of a space with conditions, whether it was written in YAML or as a Python function.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

__all__ = ["Draw", "Point", "RandomDraw", "Scripted", "around", "at_step", "num_steps", "pairs", "walk"]

Point = dict[str, Any]


class Draw(Protocol):
    """Answers what value a key has at one point. Both bounds are included.

    A key that a file gives several dimensions is asked for by the place of the one that the point has, `KEY[1]`.
    """

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        """A number between two; with ``step``, one of low, low + step, ..., high."""

    def loguniform(self, key: str, low: float, high: float) -> float:
        """A number whose logarithm is uniform."""

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        """One of low, low + step, ..., high."""

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        """One of the values."""


def num_steps(low: float, high: float, step: float) -> int:
    """How many values low, low + step, ..., high are; in decimals, where 0.3 is three times 0.1."""
    return int((Decimal(repr(high)) - Decimal(repr(low))) // Decimal(repr(step))) + 1


def at_step(low: float, step: float, index: int) -> float:
    """low + index * step, rounded as one would do it by hand."""
    return float(Decimal(repr(low)) + index * Decimal(repr(step)))


@dataclass(frozen=True)
class RandomDraw:
    """Independent random values: a pure function of (seed, index, key), on every machine and in any order.

    Args:
        seed: of the search.
        index: number of the point.
    """

    seed: int
    index: int

    def _unit(self, key: str) -> float:
        return random.Random(f"{self.seed}/{self.index}/{key}").random()

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        unit = self._unit(key)
        if step is not None:
            return at_step(low, step, int(unit * num_steps(low, high, step)))
        return min(max(low * (1 - unit) + high * unit, low), high)

    def loguniform(self, key: str, low: float, high: float) -> float:
        unit = self._unit(key)
        value = math.exp(math.log(low) * (1 - unit) + math.log(high) * unit)
        return min(max(value, low), high)  # exp(log(x)) may miss x by a bit

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        values = range(low, high + 1, step)
        return values[int(self._unit(key) * len(values))]

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        return values[int(self._unit(key) * len(values))]


class Scripted:
    """Answers each key with the option whose number the script holds, and with the first one where it holds none.

    Args:
        script: key -> number of the option.
        most: a key with more values than that offers some of them only; ranges without steps offer their two ends.
            None: all values, and no ranges without steps.

    ``taken`` holds, in the order of the questions, key -> (number of the option, how many there are).
    """

    def __init__(self, script: Mapping[str, int], most: int | None = None) -> None:
        self.script, self.most = script, most
        self.taken: dict[str, tuple[int, int]] = {}
        self.lists: dict[str, list[Any]] = {}

    def _number(self, key: str, total: int) -> int:
        """Which of ``total`` values is meant, when only some of them are options."""
        some: Sequence[int] = range(total)
        if self.most is not None and total > self.most:
            some = sorted({0, 1, 2, total // 3, total // 2, total // 2 + 1, total - 3, total - 2, total - 1})
        option = min(self.script.get(key, 0), len(some) - 1)  # a function may offer fewer at another point
        self.taken[key] = (option, len(some))
        return some[option]

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        if step is not None:
            return at_step(low, step, self._number(key, num_steps(low, high, step)))
        return self.loguniform(key, low, high)

    def loguniform(self, key: str, low: float, high: float) -> float:
        if self.most is None:
            raise ValueError(f"{key} is continuous: it has no list of values")
        return (low, high)[self._number(key, 2)]

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        values = range(low, high + 1, step)
        return values[self._number(key, len(values))]

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        self.lists[key] = list(values)
        return values[self._number(key, len(values))]


Drawn = Iterator[tuple[Point, Scripted]]


def walk(draw: Callable[[Draw], Point], most: int | None = None) -> Drawn:
    """Every combination of options, the last key changing fastest; a key that is not asked for has none."""
    script: dict[str, int] = {}
    while True:
        source = Scripted(script, most)
        yield draw(source), source
        taken = list(source.taken.items())
        while taken and taken[-1][1][0] + 1 == taken[-1][1][1]:
            taken.pop()
        if not taken:
            return
        script = {key: option for key, (option, _) in taken}
        script[taken[-1][0]] += 1


def around(draw: Callable[[Draw], Point], most: int) -> Drawn:
    """Every option of every key at least once, changing only what makes the key appear at all."""
    seen: set[str] = set()
    scripts: deque[dict[str, int]] = deque([{}])
    while scripts:
        script = scripts.popleft()
        source = Scripted(script, most)
        yield draw(source), source
        for key, (_, total) in source.taken.items():
            if key not in seen:
                seen.add(key)
                scripts.extend({**script, key: option} for option in range(1, total))


def pairs(draw: Callable[[Draw], Point], most: int) -> Drawn:
    """Every pair of options of every two keys that can be there together, at least nearly so."""
    homes: dict[str, tuple[Mapping[str, int], int]] = {}
    for _, source in around(draw, most):
        for key, (_, total) in source.taken.items():
            homes.setdefault(key, (source.script, total))
    for (one, (first, n)), (two, (second, m)) in itertools.combinations(homes.items(), 2):
        for i, j in itertools.product(range(n), range(m)):
            source = Scripted({**first, **second, one: i, two: j}, most)
            yield draw(source), source
