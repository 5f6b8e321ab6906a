"""Runs the units of a build as a Ray Data job: one item per unit, one CPU per item, results as they come.

The only file of ``data`` beside the stream that imports Ray; it is imported when a build asks for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from glowflow.data.ray_threads import iterate
from glowflow.data.units import Unit, run_unit

__all__ = ["run_units_on_ray"]

logger = logging.getLogger(__name__)


def run_units_on_ray(out: Path, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
    """Run units on the Ray cluster this process is connected to, or on a private local one that is stopped after.

    Args:
        out: the directory that is built; on a cluster, a path that all nodes share.
        units: the work; the order of the results is not that of the units.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        _init(ray)
    try:
        with _quiet():
            items = [{"out": str(out), "unit": unit.to_json()} for unit in units]
            dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(_work, num_cpus=1)
            with closing(iterate(dataset.iter_rows())) as rows:
                for row in rows:
                    yield json.loads(row["result"])
    finally:
        if started:
            ray.shutdown()


def _work(row: dict[str, Any]) -> dict[str, str]:
    """One unit in a Ray worker, on the one CPU that was asked for."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return {"result": json.dumps(run_unit(row["out"], row["unit"]))}


def _init(ray: Any) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_ADDRESS"):
        # Units travel as paths and results as counts: the smallest object store is plenty.
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 128 << 20}
    ray.init(**options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's own bars and start-up lines are off while a build shows its progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "enable_operator_progress_bars", "print_on_execution_start", "preserve_order")
    before = {name: getattr(context, name) for name in names if hasattr(context, name)}
    levels = {name: logging.getLogger(name).level for name in ("ray.data", "ray.data._internal")}
    for name in before:
        setattr(context, name, False)
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
