"""What a sweep costs beside its trials: ``glowflow sweep`` against the same runs, one after another in a warm process.

    python benchmarks/sweep_overhead.py --trials 8 --steps 100

The trials differ in their learning rate, run one at a time to the end (FIFO) with one thread, and validate and write a
checkpoint five times, as the runs beside them do. The warm process has imported everything, has the data, and has
trained once before its clock starts. The sweep's time is from the command to its exit: imports, start of Ray, MLflow,
report. Half of the runs come before the sweep and half after it, so that a machine whose speed drifts does so for
both. One JSON document on stdout; ``sweep`` says where the sweep's time went.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
CONFIG = ROOT / "configs" / "quickstart.yaml"
VALIDATIONS = 5


def overrides(steps: int, storage: Path) -> list[str]:
    """The config of every run, but for its learning rate and seed."""
    return [
        *("resources.workers=1", "training.threads=1", "training.batch_size=4", f"training.max_steps={steps}"),
        *(f"training.val_interval={steps // VALIDATIONS}", f"training.checkpoint_interval={steps // VALIDATIONS}"),
        *(f"training.warmup_steps={steps // 10}", f"tracking.storage={storage}"),
    ]


def serve() -> None:
    """The warm process: for each line (a list of overrides) on stdin, train; answer with its seconds."""
    from glowflow.orchestration.pipeline import TrainingPipeline

    for line in sys.stdin:
        began = time.perf_counter()
        record = TrainingPipeline.from_file(CONFIG, json.loads(line)).fit(local=True, progress=False)
        print(json.dumps({"seconds": time.perf_counter() - began, "status": record.status}), flush=True)


class Warm:
    """The process of ``serve``, and what its runs are."""

    def __init__(self, steps: int, storage: Path) -> None:
        self._keys = overrides(steps, storage)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__, "--serve"], env=ENV, text=True, **pipes)

    def train(self, lr: float, *changes: str) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([*self._keys, f"training.lr={lr}", *changes]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer["status"] != "FINISHED":
            raise SystemExit(f"a run of the warm process ended {answer['status']}")
        return float(answer["seconds"])

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def sweep(steps: int, rates: list[float], storage: Path) -> dict[str, float]:
    """Seconds of ``glowflow sweep`` over the learning rates, whole and in its parts."""
    space = storage / "space.yaml"
    variants = {f"rate-{number}": {"training.lr": lr} for number, lr in enumerate(rates)}
    space.write_text(json.dumps({"metric": "val_loss", "scheduler": "fifo", "variants": variants, "concurrency": 1}))
    command = [sys.executable, "-m", "glowflow.cli.main", "sweep", str(CONFIG), str(space), "--json"]
    began, clock = time.time(), time.perf_counter()
    done = subprocess.run([*command, *overrides(steps, storage)], env=ENV, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - clock
    if done.returncode:
        raise SystemExit(f"the sweep ended with exit code {done.returncode}")
    journal = storage / json.loads(done.stdout)["sweep"] / "journal.jsonl"
    entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    running, ended = (_stamps(entries, event) for event in ("running", "done"))
    return {
        "seconds": seconds,
        "before_the_first_trial": running[0] - began,
        "trials": sum(end - start for start, end in zip(running, ended, strict=True)),
        "first_trial": ended[0] - running[0],
        "between_trials": sum(start - end for start, end in zip(running[1:], ended, strict=False)),
        "after_the_last_trial": began + seconds - ended[-1],
    }


def _stamps(entries: list[dict[str, Any]], event: str) -> list[float]:
    return [datetime.fromisoformat(entry["time"]).timestamp() for entry in entries if entry["event"] == event]


def rounded(values: dict[str, float]) -> dict[str, float]:
    """To a hundredth of a second."""
    return {name: round(value, 2) for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="per trial; 100 take about 30 seconds on a slow core")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return 0
    rates = [1e-3 * 1.3**number for number in range(given.trials)]
    with tempfile.TemporaryDirectory(prefix="glowflow-sweep-overhead-") as scratch:
        warm = Warm(given.steps, Path(scratch) / "warm")
        warm.train(rates[0], f"training.max_steps={given.steps // 5}", f"training.warmup_steps={given.steps // 50}")
        half = given.trials // 2
        runs = [warm.train(lr) for lr in rates[:half]]
        storage = Path(scratch) / "sweep"
        storage.mkdir()
        swept = sweep(given.steps, rates, storage)
        runs += [warm.train(lr) for lr in rates[half:]]
        warm.close()
    report = {
        "ratio": round(swept["seconds"] / sum(runs), 3),
        "runs": {"seconds": round(sum(runs), 2), "each": [round(seconds, 2) for seconds in runs]},
        "sweep": rounded(swept),
        "machine": {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "ray", "mlflow")},
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
