"""Sweeps as a driver leaves them behind, written through the real journal and spool: for tests of what reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glowflow.config.space import RandomDraw, Space, load_space
from glowflow.experiments.journal import Journal
from glowflow.tracking.base import Point
from glowflow.tracking.spool import METRICS_NAME, Spool

LR = {
    "space": {"training.lr": {"loguniform": [3e-4, 3e-2]}},
    "scheduler": {"name": "asha", "interval_steps": 25, "grace_steps": 25, "reduction_factor": 3},
    "trials": 8,
}
MIXED = {
    "space": {
        "training.lr": {"loguniform": [1e-4, 1e-1]},
        "training.optimizer.weight_decay": {"uniform": [0, 0.3]},
        "training.schedule": {"choice": ["cosine", "wsd", "constant"]},
        "training.decay_fraction": {"uniform": [0.1, 0.5], "when": {"training.schedule": "wsd"}},
        "training.grad_clip": {"choice": [None, 0.5, 1.0]},
        "model": {"choice": [{"dim": 128, "depth": 6}, {"dim": 160, "depth": 4}]},
    },
    "scheduler": {"name": "asha", "interval_steps": 25, "grace_steps": 25, "reduction_factor": 3},
    "trials": 24,
}
VARIANTS = {"variants": {"baseline": {}, "same": {}, "low_lr": {"training.lr": 1e-4}}, "seeds": 3}


class WrittenSweep:
    """A sweep directory and its journal.

    Args:
        folder: the sweep's directory; it is made.
        body: the space, as a file has it.
        command: what was typed.
    """

    def __init__(self, folder: Path, body: Mapping[str, Any], *, max_steps: int = 200, **about: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.max_steps = folder, max_steps
        self.space: Space = load_space(body)
        self.journal = Journal(folder)
        self.about: dict[str, Any] = {
            "name": folder.name,
            "config": {},
            "space": self.space.to_dict(),
            "config_fingerprint": "0" * 64,
            "max_steps": max_steps,
            "batch_tokens": 1024,
            "metric": list(self.space.metrics),
            "mode": list(self.space.modes),
            "command": ["/opt/env/bin/glowflow", "sweep", "configs/quickstart.yaml", f"tune_spaces/{folder.name}.yaml"],
            "versions": {"python": "3.11.7", "glowflow": "0.3.0", "torch": "2.13.0", "git": "0123456789abcdef0123"},
            "device": "AMD EPYC, 2 cores",
            "interval": 25,
            "storage": str(folder.parent),
            "resumed": 0,
        } | about
        self.journal.append("sweep", **self.about)

    @property
    def metric(self) -> str:
        return self.space.metrics[0]

    def trial(
        self,
        name: str,
        point: int,
        params: Mapping[str, Any],
        curve: Sequence[tuple[int, float]] | Sequence[tuple[int, Mapping[str, float]]],
        *,
        seed: int = 0,
        label: str | None = None,
        status: str | None = "FINISHED",
        why: str | None = None,
        error: str | None = None,
        spool: bool = True,
    ) -> None:
        """One trial, from its claim to its end.

        Args:
            curve: (step, value of the first metric or all metrics), as it was reported.
            status: how it ends; None leaves it running.
        """
        self.journal.append("claimed", trial=name, point=point, label=label, seed=seed, params=dict(params))
        self.journal.append("running", trial=name, directory=name, mlflow_run_id=None, attempt=1, from_step=0)
        last: dict[str, float] = {}
        for step, value in curve:
            last = dict(value) if isinstance(value, Mapping) else {self.metric: value}
            self.journal.append("reported", trial=name, step=step, metrics=last, checkpoint=None, seconds=0.1 * step)
        if spool and curve:
            self._spool(name, curve)
        if status is not None:
            step = curve[-1][0] if curve else 0
            content = {"status": status, "why": why, "step": step, "metrics": last, "best": last, "error": error}
            self.journal.append("done", trial=name, seconds=0.1 * step, **content)

    def _spool(self, name: str, curve: Iterable[tuple[int, Any]]) -> None:
        (self.folder / name).mkdir()
        spool = Spool(self.folder / name / METRICS_NAME)
        for step, value in curve:
            values = value if isinstance(value, Mapping) else {self.metric: value}
            spool.append([Point(metric, step, v, 1000 * step) for metric, v in values.items()])
        spool.close()

    def end(self, status: str = "FINISHED", why: str | None = None) -> Path:
        """Close the sweep; gives its directory."""
        self.journal.append("ended", status=status, why=why)
        self.journal.close()
        return self.folder


def loss_curve(
    end: float, steps: int, of: int = 200, *, start: float = 5.5, every: int = 25
) -> list[tuple[int, float]]:
    """A loss that falls to ``end`` over ``of`` steps, cut off after ``steps``."""
    fall = [(step, end + (start - end) * math.exp(-4.5 * step / of)) for step in range(every, steps + 1, every)]
    return [(step, value - (start - end) * math.exp(-4.5) * step / of) for step, value in fall]


def lr_search(folder: Path, trials: int = 8, *, body: Mapping[str, Any] = LR, failed: Sequence[int] = ()) -> Path:
    """A search whose loss depends on the learning rate alone; two thirds are stopped at each rung, as ASHA does."""
    sweep = WrittenSweep(folder, {**body, "trials": trials})
    noise = np.random.default_rng(0).normal(0, 0.01, trials)
    points = [sweep.space.draw(RandomDraw(0, index)) for index in range(trials)]
    ends = [2.3 + 0.35 * (math.log10(p["training.lr"] / 3e-3)) ** 2 + noise[i] for i, p in enumerate(points)]
    order = sorted(range(trials), key=ends.__getitem__)
    for index, params in enumerate(points):
        place = order.index(index) / trials
        steps, status = (200, "FINISHED") if place < 0.34 else (75, "STOPPED") if place < 0.67 else (25, "STOPPED")
        why = (
            None if status == "FINISHED" else f"asha at step {steps}: rank {order.index(index) + 1} of {trials} so far"
        )
        error = None
        if index in failed:
            status, error = "FAILED", "RuntimeError: out of memory in /opt/data/cache/shard.parquet"
            why = error
        curve = [] if index in failed[1:] else loss_curve(ends[index], 25 if index in failed else steps)
        sweep.trial(f"{index:03d}", index, params, curve, status=status, why=why, error=error)
    return sweep.end()


def variants_table(
    folder: Path, means: Mapping[str, float], *, seeds: int = 3, spread: float = 0.006, lost: Sequence[str] = ()
) -> Path:
    """Named variants over seeds, whose final losses scatter about the means."""
    sweep = WrittenSweep(folder, {"variants": {label: {} for label in means}, "seeds": seeds}, max_steps=500)
    for point, (label, mean) in enumerate(means.items()):
        noise = np.random.default_rng(point).normal(0, spread, seeds)
        for seed in range(seeds):
            name = f"{label}-s{seed}" if seeds > 1 else label
            curve = loss_curve(mean + float(noise[seed]), 500, 500, start=4.2)
            about: dict[str, Any] = {"seed": seed, "label": label}
            if name in lost:
                text = "RuntimeError: the process was killed"
                sweep.trial(name, point, {}, curve[:6], status="FAILED", why=text, error=text, **about)
            else:
                sweep.trial(name, point, {}, curve, **about)
    return sweep.end()


def two_metrics(folder: Path, trials: int = 14) -> Path:
    """A search for a low loss and a high speed, which contradict each other."""
    body = {
        "metric": ["val_loss", "tokens_per_second"],
        "mode": ["min", "max"],
        "space": {"model.depth": {"randint": [2, 16]}, "training.lr": {"loguniform": [1e-3, 1e-2]}},
        "trials": trials,
    }
    sweep = WrittenSweep(folder, body)
    noise = np.random.default_rng(1).normal(0, 0.04, trials)
    for index in range(trials):
        params = sweep.space.draw(RandomDraw(0, index))
        end = 2.2 + 1.2 / params["model.depth"] + abs(float(noise[index]))
        speed = 40_000 / params["model.depth"] * (1 + float(noise[-index]))
        curve = [(step, {"val_loss": value, "tokens_per_second": speed}) for step, value in loss_curve(end, 200)]
        sweep.trial(f"{index:03d}", index, params, curve)
    return sweep.end()
