"""Golden loss curves: which there are, how one is run, recorded and compared.

    python tests/golden/curves.py quickstart --steps 300      # records tests/golden/quickstart.jsonl

The first line of a file is the key that a curve holds for: torch version, CPU and its capability, threads, corpus
digest. The schedule is constant, so that a run of 20 steps is the beginning of one of 300.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent

# name -> (config, overrides): small enough for a CPU, everything else as shipped
CASES: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("configs/quickstart.yaml", ["training.batch_size=4", "training.strategy=auto"]),
    "shakespeare_char": ("configs/shakespeare_char.yaml", []),
    "shakespeare_muon": ("configs/shakespeare_muon.yaml", []),
    "wikitext2": ("configs/wikitext2.yaml", ["training.batch_size=4", "data.context=64"]),
}


def run_case(name: str, steps: int) -> tuple[dict[str, Any], list[float]]:
    """Train ``steps`` steps; the key of this machine and corpus, and the loss of every step."""
    import torch

    from glowflow.data.prepare import ensure_built
    from glowflow.orchestration.pipeline import TrainingPipeline
    from glowflow.tracking.spool import curves

    config, overrides = CASES[name]
    with tempfile.TemporaryDirectory() as storage:
        common = [
            *("resources.workers=1", f"training.max_steps={steps}", "training.schedule=constant", "training.threads=1"),
            *(f"training.checkpoint_interval={steps}", f"training.val_interval={steps}", "training.val_batches=1"),
            *("training.precision=fp32", "resources.accelerator=cpu", "training.compile=false"),
            *(f"tracking.storage={storage}", "tracking.backend=jsonl", "tracking.system_metrics=false"),
        ]
        pipeline = TrainingPipeline.from_file(ROOT / config, [*overrides, *common])
        record = pipeline.fit(local=True, progress=False)
        losses = curves(Path(storage) / record.run / "metrics.jsonl")["train_loss"]
        manifest = ensure_built(pipeline.config.data, use_ray=False)[0][0]
    key = {
        "torch": torch.__version__.partition("+")[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
        "threads": 1,
        "corpus": manifest.fingerprint,
    }
    return key, [losses[step] for step in range(1, steps + 1)]


def cpu_model() -> str:
    """The processor's name: libraries choose their kernels by vendor too, not by capability alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def load(name: str) -> tuple[dict[str, Any], list[float]]:
    """A recorded curve."""
    first, *rest = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(first), [json.loads(line)["train_loss"] for line in rest]


def record(name: str, steps: int) -> None:
    """Run a case and write its file."""
    key, losses = run_case(name, steps)
    lines = [json.dumps(key), *(json.dumps({"step": i, "train_loss": loss}) for i, loss in enumerate(losses, start=1))]
    (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    record(given.name, given.steps)
