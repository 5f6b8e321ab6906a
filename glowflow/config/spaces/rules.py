"""Rules between the settings of a space: what a sweep could never do, and what it could but hardly should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glowflow.config.errors import Problem
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.spaces.dimensions import key_of
from glowflow.config.spaces.model import Space
from glowflow.config.spaces.settings import VARIANTS

__all__ = ["doubts", "key_rules", "places", "rules", "step_doubts", "step_rules"]

MOST_GRID_POINTS = 100_000

_RESOURCES = ("resources.workers", "resources.cpus_per_worker")
_LARGER_IS_BETTER = ("tokens_per_second", "mfu", "goodput")
_POPULATION = ("pbt", "pb2")


def places(space: Space) -> list[tuple[str, str]]:
    """(where it stands in the file, dotted config key) of everything that a space sets."""
    found = [(f"set.{key}", key) for key in space.fixed]
    owners = space.owners()
    if not space.variants:
        found += [(f"space.{owners.get(key, key)}", key) for key in space.keys()]
    return found + [(f"variants.{label}.{key}", key) for label, point in space.variants.items() for key in point]


def key_rules(space: Space) -> Iterator[Problem]:
    """Keys that a sweep sets itself, or that are about the whole sweep."""
    for where, key in places(space):
        section = key.partition(".")[0]
        if section == "tracking" or (section == "resources" and key not in _RESOURCES):
            hint = "give it in the config or as key=value on the command line"
            yield Problem(where, f"{key} is the same for the whole sweep", hint=hint)
        elif key == "training.seed" and (not where.startswith("set.") or space.absolute_seeds):
            yield Problem(where, "the sweep sets it", hint="use `seeds`: a count, or a list of seeds")
        elif key == "training.val_interval" and not where.startswith("set."):
            yield Problem(where, "the sweep sets it", hint="use scheduler.interval_steps")


def rules(space: Space) -> Iterator[Problem]:
    """What contradicts itself, whatever the config."""
    if not space.keys() and not space.variants:
        yield Problem("space", "sets no key: there is nothing to try")
    yield from _trial_rules(space)
    if len(space.metrics) > 1 and space.scheduler.name != "fifo":
        rule = f"{space.scheduler.name} compares one metric, not {len(space.metrics)}: {', '.join(space.metrics)}"
        yield Problem("scheduler", rule, hint="use fifo, or one metric")
    if space.scheduler.name in _POPULATION:
        yield from _population_rules(space)
    interval = space.fixed.get("training.val_interval")
    steps = space.scheduler.interval_steps or space.scheduler.grace_steps
    if interval is not None and steps is not None and interval != steps:
        rule = f"trials report every {steps} steps by scheduler.interval_steps or grace_steps"
        yield Problem("set.training.val_interval", rule, interval, "leave it out")


def _trial_rules(space: Space) -> Iterator[Problem]:
    searcher, total = space.searcher.name, space.size
    if searcher == "grid":
        endless = [key for key, dimension in space.dimensions.items() if dimension.size is None]
        if space.program is not None:
            yield Problem("searcher", "a Python space has no grid", "grid", "use random or optuna")
        elif endless:
            rule = f"a grid needs lists or steps, but these are continuous: {', '.join(endless)}"
            yield Problem("searcher", rule, "grid", "give them a `step`, `choice` or `grid`")
        elif total is not None and total > MOST_GRID_POINTS:
            yield Problem("searcher", f"the grid has {total} points", "grid", "use random or optuna")
    elif searcher != VARIANTS and space.trials is None:
        hint = "write `trials: 16`, or --trials 16 on the command line"
        yield Problem("trials", f"is missing: {searcher} search has no end of its own", hint=hint)
    if space.variants and space.trials not in (None, len(space.variants)):
        rule = f"every variant is run, and there are {len(space.variants)}"
        yield Problem("trials", rule, space.trials, "leave it out")


def _population_rules(space: Space) -> Iterator[Problem]:
    name = space.scheduler.name
    if space.variants or space.program is not None:
        what = "named variants" if space.variants else "a Python space"
        yield Problem("scheduler", f"{name} changes values in mid-run and needs dimensions under `space`, not {what}")
        return
    stiff = [place for place in space.dimensions if not _may_change(key_of(place))]
    if stiff:
        rule = f"{name} changes values in mid-run, which these do not take: {', '.join(stiff)}"
        hint = "it can change training.lr, training.min_lr, training.grad_clip, training.optimizer.*"
        yield Problem("scheduler", rule, hint=hint)
    conditional = [key for key, dimension in space.dimensions.items() if dimension.when]
    if conditional:
        rule = f"{name} takes no conditions, but these have `when`: {', '.join(conditional)}"
        yield Problem("scheduler", rule)
    listed = [key for key, d in space.dimensions.items() if d.kind not in ("uniform", "loguniform") or d.step]
    if name == "pb2" and listed:
        yield Problem("scheduler", f"pb2 needs continuous dimensions, which these are not: {', '.join(listed)}")
    if space.searcher.name not in ("random", "grid"):
        rule = f"{name} changes the points that {space.searcher.name} would learn from"
        yield Problem("searcher", rule, space.searcher.name, "use random or grid")
    if len(space.seeds) > 1:
        rule = f"{name} changes points in mid-run, so that the seeds of one cannot be compared"
        yield Problem("seeds", rule, len(space.seeds), "use 1")
    if space.trials == 1:
        yield Problem("trials", f"{name} needs a population", 1, "use at least 4")


def _may_change(key: str) -> bool:
    """Whether an optimiser takes another value between two steps."""
    if key in ("training.lr", "training.min_lr", "training.grad_clip"):
        return True
    return key.startswith("training.optimizer.") and key != "training.optimizer.name"


def step_rules(space: Space, configs: Sequence[GlowFlowConfig]) -> Iterator[Problem]:
    """Rules about steps, which need to know how long the trials are.

    Args:
        space: the space.
        configs: of the points that were tried; not empty.
    """
    shortest = min(config.training.max_steps for config in configs)
    end = f"training.max_steps ({shortest})"
    interval, grace = space.scheduler.interval_steps, space.scheduler.grace_steps
    if interval is not None and interval > shortest:
        yield Problem("scheduler.interval_steps", f"must not be greater than {end}: no trial would report", interval)
    if grace is not None and grace >= shortest:
        rule = f"must be less than {end}: no trial would ever be stopped"
        yield Problem("scheduler.grace_steps", rule, grace, "use fifo if that is meant")
    if "loss_scale" in space.metrics and any(config.training.precision != "fp16" for config in configs):
        yield Problem("metric", "is reported with training.precision=fp16 only", "loss_scale")
    if "mfu" in space.metrics and any(config.resources.accelerator == "cpu" for config in configs):
        yield Problem("metric", "is not reported with resources.accelerator=cpu", "mfu")


def step_doubts(space: Space, configs: Sequence[GlowFlowConfig]) -> Iterator[str]:
    """What about the steps is allowed but hardly meant."""
    scheduler = space.scheduler
    interval, grace = scheduler.interval_steps, scheduler.grace_steps
    if interval is not None and grace is not None and grace % interval:
        first = -(-grace // interval) * interval
        yield (
            f"scheduler.grace_steps ({grace}) is not a multiple of scheduler.interval_steps ({interval}): trials are "
            f"first compared at step {first}"
        )
    lengths = sorted({config.training.max_steps for config in configs})
    if scheduler.name != "fifo" and len(lengths) > 1:
        yield (
            f"trials have from {lengths[0]} to {lengths[-1]} steps, but {scheduler.name} compares them at equal steps: "
            "use fifo to compare whole runs"
        )


def doubts(space: Space, config: GlowFlowConfig) -> Iterator[str]:
    """What is allowed but hardly meant."""
    total, trials, searcher = space.size, space.trials, space.searcher.name
    if total is not None and trials is not None and searcher == "grid" and trials != total:
        what = "only the first of them are run" if trials < total else "and each is run once"
        yield f"trials ({trials}): this grid has {total} points, {what}"
    elif total is not None and trials is not None and searcher == "random" and trials > total:
        yield f"trials ({trials}): this space has {total} points, random search runs some of them twice: use grid"
    for metric, mode in zip(space.metrics, space.modes, strict=True):
        if mode == "min" and metric in _LARGER_IS_BETTER:
            yield f"mode is min, but a larger {metric} is better: write `mode: max`"
    if "mfu" in space.metrics and config.resources.accelerator != "cpu":
        yield "metric mfu is reported only on a GPU whose peak is known"
