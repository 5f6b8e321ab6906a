"""Runs as a training leaves them behind, written through the real record and spool: for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glowflow.tracking.base import Point
from glowflow.tracking.runrecord import RunRecord
from glowflow.tracking.spool import METRICS_NAME, Spool

__all__ = ["train", "values"]

START = 1_900_000_000_000  # 2030-03-17T17:46:40Z


def values(lr: float, seed: int, steps: int) -> list[tuple[int, float]]:
    """A validation curve with its least value before its end."""
    return [(step, 2 + lr * 10 + 0.01 * seed + ((step - 70) / 100) ** 2) for step in range(10, steps + 1, 10)]


def train(storage: Path, name: str, *, lr: float = 1e-3, seed: int = 0, steps: int = 100, **about: Any) -> Path:
    """A run directory: 10 steps a second, 4 * 16 tokens a step, on 2 workers."""
    run_dir = storage / name
    run_dir.mkdir(parents=True)
    spool = Spool(run_dir / METRICS_NAME)
    spool.append([Point("train_loss", step, 5 / step, START + 100 * step) for step in range(1, steps + 1)])
    curve = values(lr, seed, steps)
    spool.append([Point("val_loss", step, value, START + 100 * step) for step, value in curve])
    spool.append([Point("tokens", step, 64.0 * step, START + 100 * step) for step, _ in curve])
    spool.close()
    config = {
        "model": {"dim": 8},
        "data": {"context": 16},
        "training": {"lr": lr, "seed": seed, "batch_size": 4, "monitor_metrics": ["val_loss"], "monitor_mode": "min"},
        "tracking": {"run": name, "storage": str(storage), "experiment": "cmp", "tags": {}},
        "resources": {"workers": 2},
    }
    final = {"train_loss": 5 / steps, "val_loss": curve[-1][1], "tokens": 64.0 * steps}
    best_step, best = min(curve, key=lambda point: point[1])
    record = {"final": final, "best": {"step": best_step, "val_loss": best}, "steps": steps, "tokens": 64 * steps}
    record |= {"seconds": steps / 10, "started": "2030-03-17T17:46:40.000+00:00", "tokens_per_second": 640.0}
    record |= {"ended": "2030-03-17T17:46:50.000+00:00", "status": "FINISHED"}
    RunRecord(name.rpartition("/")[2], config=config, **{**record, **about}).save(run_dir)
    return run_dir
