"""How long ``glowflow runs list`` and ``glowflow runs compare`` take on a store of many runs.

    python benchmarks/runs_store.py --runs 200 --metrics 4 --steps 500

Three places are filled with the same runs, through MLflow's public client and GlowFlow's own writers: a SQLite store
without run directories (``mlflow``), the same store with the tag in which GlowFlow's runs say what their curves came
to, so that no curve must be read (``mlflow_tagged``), and run directories without a store (``directories``).

Each command is timed as a person types it (a new process, the median of ``--repeat``) and inside one process that has
imported MLflow. ``beyond_import`` is the command's time less that of a process that does nothing but import MLflow.
Processor seconds tell how far other work on the machine was in the way. One JSON document on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glowflow.config.loader import load_config, to_dict

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
NAMES = ("train_loss", "val_loss", "grad_norm", "lr")
EXPERIMENT = "glowflow"
START_MS = 1_900_000_000_000
BATCH = 1000


def configs(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and config of each run: a grid of learning rates and decays with three seeds."""
    for number in range(given.runs):
        lr, decay = 1e-4 * 1.05 ** (number // 3), 0.01 * (number // 3 % 5)
        keys = [f"training.lr={lr!r}", f"training.optimizer.weight_decay={decay}", f"training.seed={number % 3}"]
        yield f"run-{number:03d}", to_dict(load_config(None, [*keys, f"training.max_steps={given.steps}"]))


def points(number: int, given: argparse.Namespace) -> Iterator[tuple[str, int, float, int]]:
    """(metric, step, value, timestamp) of a run, in the order in which training writes them."""
    names = [*NAMES, *(f"metric_{i}" for i in range(len(NAMES), given.metrics))][: given.metrics]
    for step in range(1, given.steps + 1):
        for index, name in enumerate(names):
            value = 4.0 * math.exp(-step / 200) + 0.01 * math.sin(number * 7 + index) + 1.5
            yield name, step, value, START_MS + 1000 * step


def fill_store(storage: Path, given: argparse.Namespace) -> None:
    """The runs in STORAGE/mlflow.db, by MLflow's client alone."""
    from glowflow.tracking.client import connect, default_uri, experiment_id, flatten

    client = connect(default_uri(storage))  # first: it makes MLflow quiet
    from mlflow.entities import Metric, Param

    experiment = experiment_id(client, EXPERIMENT, str(storage / "mlartifacts"))
    for number, (name, config) in enumerate(configs(given)):
        tags = {"glowflow.token": name, **{f"glowflow.version.{key}": "1.0" for key in ("torch", "ray", "mlflow")}}
        run_id = client.create_run(experiment, start_time=START_MS + number, tags=tags, run_name=name).info.run_id
        client.log_batch(run_id, params=[Param(key, value) for key, value in flatten(config).items()])
        metrics = [Metric(key, value, stamp, step) for key, step, value, stamp in points(number, given)]
        for first in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        client.set_terminated(run_id, end_time=START_MS + 1000 * given.steps)


def tag_store(storage: Path, given: argparse.Namespace) -> None:
    """A copy of the store whose runs have GlowFlow's tag."""
    from glowflow.tracking.base import Point
    from glowflow.tracking.client import connect, default_uri
    from glowflow.tracking.curves import SUMMARY_TAG, encode_summary

    shutil.copy(storage.parent / "mlflow" / "mlflow.db", storage)
    client = connect(default_uri(storage))
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    ids = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    for number in range(given.runs):
        summary = encode_summary([Point(*point) for point in points(number, given)])
        client.set_tag(ids[f"run-{number:03d}"], SUMMARY_TAG, summary)


def fill_directories(storage: Path, given: argparse.Namespace) -> None:
    """The runs as directories with run.json and a spool each."""
    from glowflow.tracking.base import Point
    from glowflow.tracking.runrecord import RunRecord, create_run_dir
    from glowflow.tracking.spool import METRICS_NAME, Spool

    for number, (name, config) in enumerate(configs(given)):
        run_dir = create_run_dir(storage, name)
        spool = Spool(run_dir / METRICS_NAME)
        written = spool.append([Point(*point) for point in points(number, given)])
        spool.close()
        final = {point.metric: point.value for point in written[-given.metrics :]}
        started = f"2030-01-01T{number // 60:02d}:{number % 60:02d}:00.000+00:00"
        about = {"started": started, "seconds": float(given.steps), "steps": given.steps, "final": final}
        RunRecord(name, "FINISHED", config, **about).save(run_dir)  # type: ignore[arg-type]


PLACES = {"mlflow": fill_store, "mlflow_tagged": tag_store, "directories": fill_directories}


def timed(action: Callable[[], object], repeat: int) -> dict[str, float]:
    """Median seconds by the clock, and of the processors (of this process and of those it started)."""
    clock, processor = [], []
    for _ in range(repeat):
        began, used = time.perf_counter(), sum(os.times()[:4])
        action()
        clock.append(time.perf_counter() - began)
        processor.append(sum(os.times()[:4]) - used)
    return {"seconds": round(statistics.median(clock), 3), "cpu_seconds": round(statistics.median(processor), 3)}


def run_command(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENV, check=True, stdout=subprocess.DEVNULL)


def measure(storage: Path, repeat: int, *, in_mlflow: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of ``list`` and ``compare`` on everything in this storage."""
    from glowflow.experiments.compare import compare, to_text
    from glowflow.tracking.queries import list_runs

    names = [] if in_mlflow else sorted(path.name for path in storage.iterdir())
    experiment = EXPERIMENT if in_mlflow else None
    chosen = ["--experiment", EXPERIMENT] if in_mlflow else names
    cli = ("-m", "glowflow.cli.main", "runs")
    place = ("--storage", str(storage))
    return {
        "list": {
            "command": timed(lambda: run_command(*cli, "list", *place), repeat),
            "in_process": timed(lambda: list_runs(storage), repeat),
        },
        "compare": {
            "command": timed(lambda: run_command(*cli, "compare", *chosen, *place), repeat),
            "in_process": timed(lambda: to_text(compare(storage, names, experiment=experiment)), repeat),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--metrics", type=int, default=4, help="curves of a run")
    parser.add_argument("--steps", type=int, default=500, help="points of a curve")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept, and used again by the next call; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        for name, fill in PLACES.items():
            if not (folder / name).exists():
                (folder / name).mkdir(parents=True)
                fill(folder / name, given)
        baseline = timed(lambda: run_command("-c", "from mlflow import MlflowClient"), given.repeat)
        results = {name: measure(folder / name, given.repeat, in_mlflow=name != "directories") for name in PLACES}
    for place in results.values():
        for taken in place.values():
            taken["beyond_import"] = {key: round(value - baseline[key], 3) for key, value in taken["command"].items()}
    about = {"python": platform.python_version(), "mlflow": version("mlflow"), "cpus": os.cpu_count()}
    sizes = {name: getattr(given, name) for name in ("runs", "metrics", "steps", "repeat")}
    print(json.dumps({**sizes, "import_mlflow": baseline, **results, "about": about}, indent=2))


if __name__ == "__main__":
    main()
