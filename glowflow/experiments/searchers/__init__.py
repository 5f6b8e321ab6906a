"""Who proposes the points of a sweep: at random, in order, or from what the points so far have given.

`make_strategy` picks one by the space's `searcher`; packages that do the work are imported when they are first asked.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space
from glowflow.experiments.searchers.base import (
    Ask,
    Outcome,
    SearchStrategy,
    history_of_sweep,
    outcome_of,
    replay,
    unclaimed,
    warm_start,
)
from glowflow.experiments.searchers.planned import make_planned

__all__ = [
    "SEARCHER_NAMES",
    "Ask",
    "Outcome",
    "SearchStrategy",
    "history_of_sweep",
    "make_strategy",
    "outcome_of",
    "replay",
    "unclaimed",
    "warm_start",
]

# Searcher, which is also the module here and the package that it needs -> (class, what to install).
_LEARNERS = {
    "optuna": ("OptunaSearch", "optuna"),
    "hyperopt": ("HyperOptSearch", "glowflow[hyperopt]"),
    "ax": ("AxSearch", "glowflow[ax-platform]"),
}
SEARCHER_NAMES = ("random", "grid", "variants", *_LEARNERS)
"""What `searcher` may name; `variants` is the searcher of a table of named variants."""


def make_strategy(space: Space, config: GlowFlowConfig) -> SearchStrategy:
    """The strategy that a space asks for, at its beginning; `replay` brings it to where a journal stands.

    Args:
        space: its searcher, seed and metrics count.
        config: what the space is laid over. None of the strategies here reads it.

    Raises:
        ConfigError: the searcher is not known, its package is missing, or it cannot search such a space.
    """
    name = space.searcher.name
    if name not in _LEARNERS:
        return make_planned(space)
    cls, install = _LEARNERS[name]
    try:
        import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            problem = Problem("searcher.name", f"needs the package {name}", name, f"pip install '{install}'")
        else:
            problem = Problem("searcher.name", f"its package is there but cannot be imported: {error}", name)
        raise ConfigError(problem) from error
    strategy: Callable[[Space], SearchStrategy] = getattr(import_module(f"{__name__}.{name}"), cls)
    return strategy(space)
