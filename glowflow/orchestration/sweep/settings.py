"""What a sweep runs, worked out before anything starts: each trial's config, how many at a time, on what.

A trial with one worker trains inside its Tune actor; one with several is a Ray Train job that its actor drives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glowflow.config.errors import PreflightError, Problem
from glowflow.config.loader import apply_overrides
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space
from glowflow.orchestration import cluster

__all__ = ["MIN_FAILED", "Slots", "SweepSettings", "settle"]

MIN_FAILED = 3  # so many trials must have failed before the sweep gives up
# Schedulers that pause trials or copy weights need a checkpoint at every report.
_PAUSING = ("hyperband", "pbt", "pb2")
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Slots:
    """How many trials run at a time, and what each of them gets.

    Args:
        concurrency: trials at a time.
        in_process: whether a trial trains inside its actor (one worker) or drives a Ray Train job.
        cpus: logical CPUs per worker.
        threads: intra-op threads per worker on CPUs; None leaves it to the config.
        gpu: whether each worker has a GPU.
        pausing: whether the scheduler pauses trials, so that more of them are alive than run.
    """

    concurrency: int
    in_process: bool
    cpus: float
    threads: int | None
    gpu: bool
    pausing: bool

    def tune_resources(self) -> dict[str, float]:
        """What one trial actor asks Ray for."""
        if self.in_process:
            return {"CPU": self.cpus, **({"GPU": 1.0} if self.gpu else {})}
        # The actor only drives: its workers have a placement group of their own. CPUs that it held would be missing
        # there (ray#54305), and an empty request is refused, so it takes a share of what the head node is marked with.
        # Where Tune must hold paused trials back that share is what limits them; Ray Train's own actors need some too.
        return {_HEAD: math.floor(900 / self.concurrency) / 1000 if self.pausing else 0.001}


@dataclass(frozen=True)
class SweepSettings:
    """All that a trial needs besides its own values."""

    config: GlowFlowConfig
    space: Space
    sweep_dir: Path
    accelerator: str
    slots: Slots
    interval: int

    @property
    def num_points(self) -> int:
        """Points of the whole sweep."""
        points = self.space.num_points()
        assert points is not None, "check_space refuses an endless search"
        return points

    @property
    def seeds(self) -> tuple[int, ...]:
        """training.seed of each run of a point."""
        return self.space.seed_values(self.config.training.seed)

    def trial_config(self, params: Mapping[str, Any], seed: int, trial: str) -> GlowFlowConfig:
        """The config of one trial."""
        base, space = self.config, self.space
        places: dict[str, Any] = {
            "training.seed": seed,
            "training.val_interval": self.interval,
            "tracking.storage": str(self.sweep_dir),
            "tracking.run": trial,
            # The trial's directory moves down by one level, its MLflow store does not.
            "tracking.uri": base.tracking.uri,
        }
        if self.slots.threads is not None:
            places["training.threads"] = self.slots.threads
        if not self.slots.in_process:
            places["resources.cpus_per_worker"] = self.slots.cpus
        if self.slots.pausing:
            # A donor's checkpoint must still be there when the trial that copies it gets its turn.
            places |= {"training.checkpoint_interval": self.interval, "training.keep_checkpoints": 1000}
        return apply_overrides(base, {**space.fixed, **params, **places})


def settle(
    config: GlowFlowConfig, space: Space, sweep_dir: Path, *, cpus: float, gpus: int, accelerator: str
) -> SweepSettings:
    """Decide what is open: interval of the reports, trials at a time, threads.

    Args:
        cpus, gpus: of the machine or cluster.
        accelerator: what ``resources.accelerator`` came to.

    Raises:
        PreflightError: the resources contradict each other.
    """
    base = apply_overrides(config, space.fixed)
    slots = _slots(base, space, cpus, gpus, accelerator == "gpu")
    scheduler = space.scheduler
    interval = scheduler.interval_steps or scheduler.grace_steps or base.interval("val_interval")
    return SweepSettings(config, space, sweep_dir, accelerator, slots, interval)


def _slots(config: GlowFlowConfig, space: Space, cpus: float, gpus: int, gpu: bool) -> Slots:
    workers = config.resources.workers
    if gpu:
        most = gpus // workers
    elif config.resources.cpus_per_worker != "auto":
        maps = cluster.MAP_CPUS if workers > 1 else 0.0
        most = math.floor(cpus / (workers * (float(config.resources.cpus_per_worker) + maps)) + 1e-9)
    else:
        most = math.floor(cpus / workers + 1e-9)
    wanted = space.concurrency or max(1, most)
    problem = _problem(config, wanted, max(1, most) if workers == 1 else most, cpus, gpus, gpu)
    if problem is not None:
        raise PreflightError(problem, title="The sweep cannot be placed")
    if workers == 1:
        asked = config.resources.cpus_per_worker
        each = max(1.0, math.floor(cpus / wanted)) if asked == "auto" else float(asked)
        each = min(each, cpus / wanted)
    else:
        each = cluster.cpus_per_worker(config, cpus / wanted)
    threads = config.training.threads or (None if gpu else max(1, math.floor(cpus / wanted / workers)))
    return Slots(wanted, workers == 1, each, threads, gpu, space.scheduler.name in _PAUSING)


def _problem(config: GlowFlowConfig, wanted: int, most: int, cpus: float, gpus: int, gpu: bool) -> Problem | None:
    """What is wrong with so many trials at a time; a sweep that over-books its CPUs would only wait."""
    if wanted <= most:
        return None
    workers = config.resources.workers
    have = f"{gpus} GPUs" if gpu else f"{cpus:g} logical CPUs"
    rule = f"{wanted} trials at a time x {workers} workers do not fit on {have}"
    if most < 1 and wanted == 1:
        problem = None if gpu else cluster.cpu_problem(config, cpus)
        return problem or (Problem("resources.workers", rule, workers, "use fewer workers") if gpu else None)
    return Problem("concurrency", rule, wanted, f"use at most {max(1, most)}, or leave it out")
