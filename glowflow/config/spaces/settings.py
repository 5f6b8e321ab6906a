"""What a space file says beside its dimensions: searcher, scheduler, metrics, counts and durations.

Every reader takes what stands in the file and gives the value and all that is wrong with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from glowflow.config.errors import Problem
from glowflow.config.spaces.values import close_to, is_number, is_whole

__all__ = [
    "METRICS",
    "SCHEDULERS",
    "SEARCHERS",
    "VARIANTS",
    "Scheduler",
    "Searcher",
    "read_count",
    "read_duration",
    "read_metrics",
    "read_scheduler",
    "read_searcher",
    "read_seeds",
    "read_share",
]

METRICS = (
    "val_loss",
    "perplexity",
    "val_bits_per_byte",
    "val_accuracy",
    "val_recall_at_1",
    "train_loss",
    "grad_norm",
    "lr",
    "tokens",
    "epoch",
    "memory_mib",
    "nonfinite_steps",
    "loss_scale",
    "tokens_per_second",
    "step_time_ms",
    "data_wait_share",
    "mfu",
    "goodput",
)
"""What a training run reports at a validation or a log step."""

SEARCHERS = ("random", "grid", "optuna", "hyperopt", "ax")
VARIANTS = "variants"
"""The searcher of named variants; nobody writes it."""

SCHEDULERS: dict[str, tuple[str, ...]] = {
    "fifo": ("interval_steps",),
    "asha": ("interval_steps", "grace_steps", "reduction_factor"),
    "median": ("interval_steps", "grace_steps", "min_samples"),
    "hyperband": ("interval_steps", "reduction_factor"),
    "pbt": ("interval_steps", "quantile", "resample_probability"),
    "pb2": ("interval_steps", "quantile"),
}
"""Name of a scheduler -> its keys."""

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Searcher:
    """Who chooses the points."""

    name: str
    seed: int = 0


@dataclass(frozen=True)
class Scheduler:
    """Who stops trials early, or lets them go on from each other's weights.

    Args:
        name: a key of `SCHEDULERS`.
        grace_steps: no trial is stopped before this step.
        reduction_factor: of so many trials one goes on.
        interval_steps: steps between the reports of a trial; None: ``grace_steps``, else the config's val_interval.
        min_samples: how many trials a median needs.
        quantile: share of the trials that is replaced by as many of the best.
        resample_probability: how often a mutated value is drawn anew.
    """

    name: str = "fifo"
    grace_steps: int | None = None
    reduction_factor: float = 3
    interval_steps: int | None = None
    min_samples: int = 3
    quantile: float = 0.25
    resample_probability: float = 0.25

    def rungs(self, interval: int, max_steps: int) -> list[int]:
        """Steps at which trials are compared and only the best go on, the last step excluded.

        Of ``hyperband`` those of all brackets: a trial meets those of its own.

        Args:
            interval: steps between two reports.
        """
        if self.name == "hyperband":
            return [report * interval for report in self._milestones(-(-max_steps // interval))]
        if self.name != "asha":
            return []
        found, step = [], float(self.grace_steps or interval)
        while step < max_steps:
            found.append(round(step))
            step *= self.reduction_factor
        return found

    def _milestones(self, reports: int) -> list[int]:
        """At which of its reports a trial is compared, over all brackets, as Tune's HyperBand reckons."""
        found = set()
        for halvings in range(1, round(math.log(reports, self.reduction_factor)) + 1):
            milestone = int(reports * self.reduction_factor**-halvings)
            for _ in range(halvings if milestone else 0):
                found.add(milestone)
                milestone = int(min(milestone * self.reduction_factor, reports))
        return sorted(found - {reports})

    def to_dict(self) -> dict[str, Any]:
        """Its form in a space file."""
        values = asdict(self)
        return {"name": self.name, **{key: values[key] for key in SCHEDULERS[self.name] if values[key] is not None}}


def _named(where: str, body: Any, names: tuple[str, ...]) -> tuple[dict[str, Any], list[Problem]]:
    """A name, or a mapping with `name`; an unusable one is an empty mapping."""
    body = {"name": body} if isinstance(body, str) else body
    if not isinstance(body, Mapping) or "name" not in body:
        rule = f"must be a name or a mapping with `name`: {', '.join(names)}"
        return {}, [Problem(where, rule, body)]
    if body["name"] not in names:
        rule = f"is not a {where}"
        return {}, [Problem(f"{where}.name", rule, body["name"], close_to(body["name"], names, "known"))]
    return dict(body), []


def read_searcher(body: Any, *, variants: bool) -> tuple[Searcher | None, list[Problem]]:
    """``searcher:``; None for its default, which depends on the dimensions."""
    if body is None:
        return (Searcher(VARIANTS) if variants else None), []
    named, problems = _named("searcher", body, (VARIANTS,) if variants else SEARCHERS)
    if problems:
        if variants:
            problems = [Problem("searcher", "named variants are all run: nothing is searched", body, "leave it out")]
        return None, problems
    for key in named.keys() - {"name", "seed"}:
        problems.append(Problem(f"searcher.{key}", "is not a known key", named[key], close_to(key, ("name", "seed"))))
    seed = named.get("seed", 0)
    if not is_whole(seed) or seed < 0:
        problems.append(Problem("searcher.seed", "must be a whole number of at least 0", seed))
    return (None if problems else Searcher(named["name"], seed)), problems


def read_scheduler(body: Any) -> tuple[Scheduler, list[Problem]]:
    """``scheduler:``."""
    named, problems = ({}, []) if body is None else _named("scheduler", body, tuple(SCHEDULERS))
    name = named.pop("name", "fifo")
    known = SCHEDULERS[name]
    for key, value in named.items():
        where = f"scheduler.{key}"
        if key in known:
            problems += [Problem(where, rule, value) for rule in _scheduler_faults(key, value)]
        elif key in (item.name for item in fields(Scheduler)):
            problems.append(Problem(where, f"is not a key of {name}", value, f"its keys: {', '.join(known)}"))
        else:
            problems.append(Problem(where, "is not a known key", value, close_to(key, known, f"keys of {name}")))
    return (Scheduler() if problems else Scheduler(name, **named)), problems


def _scheduler_faults(key: str, value: Any) -> list[str]:
    number = value if is_number(value) else -1
    if key in ("grace_steps", "interval_steps", "min_samples"):
        good, rule = is_whole(value) and value >= 1, "must be a whole number of at least 1"
    elif key == "reduction_factor":
        good, rule = number > 1, "must be a number greater than 1"
    elif key == "quantile":
        good, rule = 0 < number <= 0.5, "must be a number greater than 0 and at most 0.5"
    else:
        good, rule = 0 <= number <= 1, "must be a number from 0 to 1"
    return [] if good else [rule]


def read_metrics(metric: Any, mode: Any) -> tuple[tuple[str, ...], tuple[str, ...], list[Problem]]:
    """``metric:`` and ``mode:``, each a text or a list; one mode serves several metrics."""
    problems = []
    metrics = [metric] if isinstance(metric, str) else metric
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) and name for name in metrics):
        problems.append(Problem("metric", "must be the name of a metric, or a list of names", metric))
        metrics = ["val_loss"]
    for name in dict.fromkeys(metrics):
        if metrics.count(name) > 1:
            problems.append(Problem("metric", "stands in the list twice", name))
        if name not in METRICS and "/" not in name:
            problems.append(Problem("metric", "is never reported by a training run", name, close_to(name, METRICS)))
    modes = [mode] * len(metrics) if isinstance(mode, str) else mode
    if not isinstance(modes, list) or not all(item in ("min", "max") for item in modes):
        problems.append(Problem("mode", "must be min or max, or a list of as many as there are metrics", mode))
    elif len(modes) != len(metrics):
        rule = f"must name one mode for each metric: {len(modes)} modes for {len(metrics)} metrics"
        problems.append(Problem("mode", rule, mode))
    return tuple(metrics), tuple(modes if isinstance(modes, list) else ()), problems


def read_count(where: str, value: Any) -> tuple[int | None, list[Problem]]:
    """A number of trials, or None."""
    if value is None or (is_whole(value) and value >= 1):
        return value, []
    return None, [Problem(where, "must be a whole number of at least 1", value)]


def read_seeds(value: Any) -> tuple[tuple[int, ...], bool, list[Problem]]:
    """``seeds:`` as numbers, and whether they are seeds as they stand rather than added to training.seed."""
    if isinstance(value, list):
        if not value or not all(is_whole(seed) and seed >= 0 for seed in value):
            return (0,), True, [Problem("seeds", "must be a list of whole numbers of at least 0", value)]
        twice = next((seed for seed in value if value.count(seed) > 1), None)
        problems = [] if twice is None else [Problem("seeds", f"holds {twice} twice", value)]
        return tuple(value), True, problems
    if not is_whole(value) or value < 1:
        rule = "must be how many seeds each point gets, at least 1, or a list of seeds"
        return (0,), False, [Problem("seeds", rule, value)]
    return tuple(range(value)), False, []


def read_share(where: str, value: Any) -> tuple[float, list[Problem]]:
    """A number from 0 to 1."""
    if is_number(value) and 0 <= value <= 1:
        return float(value), []
    return 0.5, [Problem(where, "must be a number from 0 to 1", value)]


def read_duration(where: str, value: Any) -> tuple[float | None, list[Problem]]:
    """Seconds of `90s`, `10m`, `2h`, `1.5h`, `1d` or a number; None for none."""
    if value is None:
        return None, []
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smhd]?)", value.strip()) if isinstance(value, str) else None
    seconds = float(match[1]) * _UNITS[match[2]] if match else value
    if is_number(seconds) and seconds > 0:
        return float(seconds), []
    return None, [Problem(where, "must be a duration such as 90s, 10m, 1.5h, or a number of seconds", value)]
