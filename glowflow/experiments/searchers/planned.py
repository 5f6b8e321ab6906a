"""Searchers that learn nothing: random points, all points of a grid, named variants.

A point is a function of the space and its number alone, so a resumed search goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.space import RandomDraw, Space
from glowflow.experiments.searchers.base import Ask, SearchStrategy

__all__ = ["PlannedSearch", "make_planned"]


class PlannedSearch:
    """Points in the order of their numbers.

    Args:
        plan: number -> point.
        total: how many there are; None: no end.
    """

    learns = False
    waiting = False

    def __init__(self, plan: Callable[[int], Ask], total: int | None) -> None:
        self._plan, self._total = plan, total
        self._next = 0

    def ask(self) -> Ask | None:
        if self._total is not None and self._next >= self._total:
            return None
        self._next += 1
        return self._plan(self._next - 1)

    def recall(self, ask: Ask) -> None:
        self._next = max(self._next, ask.point + 1)

    def tell(self, point: int, values: list[float] | None, params: dict[str, Any], *, step: int | None = None) -> None:
        """Nothing depends on it."""

    def prune(self, point: int, step: int, value: float) -> None:
        """Nothing depends on it."""

    def learn(self, params: Mapping[str, Any], values: Sequence[float]) -> bool:
        """Nothing depends on it."""
        return False


def make_planned(space: Space) -> SearchStrategy:
    """The strategy of a space whose points are planned.

    Raises:
        ConfigError: its searcher is not known.
    """
    total, name = space.num_points(), space.searcher.name
    if space.variants:
        variants = list(space.variants.items())
        return PlannedSearch(lambda point: Ask(point, variants[point][0], dict(variants[point][1])), total)
    if name == "grid":
        grid = space.grid_points()
        return PlannedSearch(lambda point: Ask(point, None, grid[point]), total)
    if name == "random":
        return PlannedSearch(lambda point: Ask(point, None, space.draw(RandomDraw(space.searcher.seed, point))), total)
    raise ConfigError(Problem("searcher.name", "is not known", name))
