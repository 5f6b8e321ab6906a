"""The space of an experiment, checked in itself: its points, its keys, and its way to JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glowflow.config.spaces.dimensions import Dimension, key_of
from glowflow.config.spaces.draws import Draw, Point, walk
from glowflow.config.spaces.program import Program
from glowflow.config.spaces.settings import VARIANTS, Scheduler, Searcher
from glowflow.config.spaces.values import flatten, is_number

__all__ = ["Scale", "Space", "digest_of", "draw_dimensions", "scale_of"]

Scale = Literal["linear", "log", "category"]


@dataclass(frozen=True)
class Space:
    """What is tried, and how; made by `load_space`.

    Args:
        name: of the file, without its ending.
        source: the file, or None.
        digest: sha256 (hex) of what the file says, before any overrides. Left out is what may change while a sweep
            goes on: trials, concurrency, time_budget, max_failed, and the name and place.
        metrics: what is measured; the first one is what searcher and scheduler go by.
        modes: `min` or `max` for each.
        fixed: dotted key -> value that every trial has.
        dimensions: dotted key, or a section -> dimension; one that has conditions comes after those that it reads. Of
            several under one key, of which a point has at most one, the first stands at `KEY[0]`.
        variants: label -> point; when there are any, there are no dimensions and no program.
        searcher, scheduler: see there.
        trials: how many points; None: all of them.
        seeds: see ``seed_values``.
        absolute_seeds: whether ``seeds`` are seeds as they stand.
        concurrency: trials at a time; None: as many as the resources hold.
        time_budget_s: seconds; None: no limit.
        max_failed: share of failed trials beyond which the sweep stops.
        program: the function of a Python space.
        scales: key that a point may hold -> how its values are spaced. Of a program, what it was seen to do.
    """

    name: str
    source: str | None
    digest: str
    metrics: tuple[str, ...]
    modes: tuple[str, ...]
    fixed: dict[str, Any]
    dimensions: dict[str, Dimension]
    variants: dict[str, Point]
    searcher: Searcher
    scheduler: Scheduler
    trials: int | None
    seeds: tuple[int, ...]
    absolute_seeds: bool
    concurrency: int | None
    time_budget_s: float | None
    max_failed: float
    program: Program | None
    scales: dict[str, Scale]

    def draw(self, source: Draw) -> Point:
        """One point: flat, dotted config key -> value; conditional keys only where they are active.

        Raises:
            ConfigError: the function of a Python space failed.
            ValueError: variants are not drawn.
        """
        if self.variants:
            raise ValueError("named variants are not drawn")
        if self.program is not None:
            return self.program(source)
        return draw_dimensions(self.dimensions, source)

    def grid_points(self) -> list[Point]:
        """Every point, the last key changing fastest; the variants in their order.

        Raises:
            ValueError: a dimension is continuous, or the space is a Python function.
        """
        if self.variants:
            return [dict(params) for params in self.variants.values()]
        if self.program is not None:
            raise ValueError("a Python space has no grid")
        return [point for point, _ in walk(self.draw)]

    @property
    def size(self) -> int | None:
        """How many different points there are; None when a dimension is continuous, and for a Python space."""
        if self.variants:
            return len(self.variants)
        if self.program is not None or any(dimension.size is None for dimension in self.dimensions.values()):
            return None
        # Only those that others depend on are walked through; the rest multiply.
        asked = {key for dimension in self.dimensions.values() for key in dimension.when}
        heads = {place: d for place, d in self.dimensions.items() if asked & set(d.keys(key_of(place)))}
        leaves = [d for place, d in self.dimensions.items() if place not in heads]
        return sum(
            math.prod(leaf.size or 1 for leaf in leaves if leaf.active(point))
            for point, _ in walk(lambda source: draw_dimensions(heads, source))
        )

    def num_points(self) -> int | None:
        """How many points a sweep runs: ``trials``, or the whole grid; None for a search without an end."""
        listed = self.size if self.searcher.name in ("grid", VARIANTS) else None
        if listed is None or self.trials is None:
            return self.trials if listed is None else listed
        return min(self.trials, listed)

    def keys(self) -> list[str]:
        """Every key that a point may hold."""
        return list(self.scales)

    def owners(self) -> dict[str, str]:
        """Key that a point may hold -> the key under `space` whose dimensions set it."""
        places = self.dimensions.items()
        return {flat: key_of(place) for place, dimension in places for flat in dimension.keys(key_of(place))}

    def numeric(self, key: str) -> bool:
        """Whether all values of a key are numbers."""
        return self.scales[key] != "category"

    def log_scaled(self, key: str) -> bool:
        """Whether a key belongs on a logarithmic axis."""
        return self.scales[key] == "log"

    def seed_values(self, base_seed: int) -> tuple[int, ...]:
        """The seeds of each point.

        Args:
            base_seed: training.seed of the config; a count of seeds starts there, a list of seeds stands by itself.
        """
        return self.seeds if self.absolute_seeds else tuple(base_seed + offset for offset in self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """The space as values that JSON can hold, in the words of a space file; `Space.from_dict` takes it back."""
        place: dict[str, Any] = {"name": self.name, "source": self.source, "digest": self.digest}
        if self.program is not None:
            place["program"] = {"path": self.program.path, "digest": self.program.digest}
            place["scales"] = dict(self.scales)
        return {**place, **self.content()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """What `to_dict` gave. The file of a Python space is read when a point is drawn, and must be the same.

        Raises:
            ConfigError: the values are not those of a space.
        """
        from glowflow.config.spaces.reading import read_back

        return read_back(values)

    def content(self) -> dict[str, Any]:
        """What a space file says, with its defaults; ``order`` keeps that of the points."""
        content: dict[str, Any] = {
            "metric": list(self.metrics),
            "mode": list(self.modes),
            "set": dict(self.fixed),
            "searcher": {"name": self.searcher.name, "seed": self.searcher.seed},
            "scheduler": self.scheduler.to_dict(),
            "trials": self.trials,
            "seeds": list(self.seeds) if self.absolute_seeds else len(self.seeds),
            "concurrency": self.concurrency,
            "time_budget": self.time_budget_s,
            "max_failed": self.max_failed,
        }
        if self.variants:
            content["variants"] = {label: dict(params) for label, params in self.variants.items()}
        elif self.program is None:
            content["space"] = self._entries()
        # A JSON file may be sorted on its way.
        return {**content, "order": list(self.variants or self._entries())}

    def _entries(self) -> dict[str, Any]:
        """``space:`` as a file has it."""
        entries: dict[str, Any] = {}
        for place, dimension in self.dimensions.items():
            key = key_of(place)
            if place == key:
                entries[key] = dimension.to_dict()
            else:
                entries.setdefault(key, []).append(dimension.to_dict())
        return entries


def digest_of(content: Mapping[str, Any], program: Program | None) -> str:
    """See ``Space.digest``; the text of a Python file counts as a whole."""
    chosen = {key: value for key, value in content.items() if key not in _MAY_CHANGE}
    if program is not None:
        chosen["program"] = program.digest
    return hashlib.sha256(json.dumps(chosen, separators=(",", ":")).encode()).hexdigest()


_MAY_CHANGE = ("trials", "concurrency", "time_budget", "max_failed")


def draw_dimensions(dimensions: Mapping[str, Dimension], source: Draw) -> Point:
    """One point of these dimensions, which stand in an order in which conditions can be judged."""
    point: Point = {}
    for place, dimension in dimensions.items():
        if dimension.active(point):
            point.update(flatten(key_of(place), dimension.draw(place, source)))
    return point


def scale_of(values: list[Any], kinds: set[str]) -> Scale:
    """How the values of a key are spaced.

    Args:
        values: those that are known.
        kinds: of the dimensions that give them.
    """
    if not all(is_number(value) for value in values):
        return "category"
    return "log" if "loguniform" in kinds else "linear"
