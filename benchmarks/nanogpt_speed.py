"""Step time of ``glowflow train --local`` beside nanoGPT's own ``train.py``, in alternation, one thread each.

    python benchmarks/nanogpt_speed.py --nanogpt ../nanoGPT --size small --rounds 5

Both are whole processes that train on tiny Shakespeare's characters with the same shapes; each prints its own step
times. nanoGPT's clone needs its data (``python data/shakespeare_char/prepare.py``). nanoGPT has no autocast on CPUs:
for ``--precision bf16`` the one line of a temporary copy that chooses the context is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = {
    "small": (4, 4, 128, 64, 12, 344),
    "256": (4, 4, 256, 256, 8, 688),
}  # layers, heads, width, context, batch, ffn
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WARMUP = 10


def nanogpt_steps(folder: Path, size: str, steps: int, precision: str, compiled: bool) -> list[float]:
    """Milliseconds per step that nanoGPT prints."""
    layers, heads, width, context, batch, _ = SIZES[size]
    script = folder / "train.py"
    text = script.read_text(encoding="utf-8")
    if precision == "bf16":
        text = text.replace("ctx = nullcontext() if device_type == 'cpu' else", "ctx =")
        text = text.replace("device_type=device_type, dtype=ptdtype", "device_type=device_type, dtype=torch.bfloat16")
    with tempfile.TemporaryDirectory() as out:
        copy = folder / f"train_{os.getpid()}.py"
        copy.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run(
                [
                    *(sys.executable, "-u", str(copy), "config/train_shakespeare_char.py", "--device=cpu"),
                    *(f"--compile={compiled}", "--eval_iters=1", "--log_interval=1", f"--block_size={context}"),
                    *(f"--batch_size={batch}", f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}"),
                    *(f"--max_iters={steps + WARMUP}", "--eval_interval=100000", "--dropout=0.0", f"--out_dir={out}"),
                ],
                cwd=folder, env=ENV, capture_output=True, text=True, check=True,
            )  # fmt: skip
        finally:
            copy.unlink()
    times = [float(value) for value in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout, re.M)]
    return times[WARMUP:]


def glowflow_steps(size: str, steps: int, precision: str, compiled: bool) -> tuple[list[float], list[float]]:
    """Milliseconds per step, and the loss curve, of ``glowflow train --local``."""
    layers, heads, width, context, batch, ffn = SIZES[size]
    with tempfile.TemporaryDirectory() as storage:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "glowflow.cli.main", "train", str(ROOT / "configs/shakespeare_char.yaml")),
                *("--local", "--json", f"model.depth={layers}", f"model.heads={heads}", f"model.dim={width}"),
                f"model.ffn_dim={ffn}",
                *(f"data.context={context}", f"training.batch_size={batch}", f"training.max_steps={steps + WARMUP}"),
                *(f"training.precision={precision}", f"training.compile={str(compiled).lower()}", "training.threads=1"),
                *(f"training.checkpoint_interval={steps + WARMUP}", f"training.val_interval={steps + WARMUP}"),
                *("training.val_batches=1", "training.log_interval=1", f"tracking.storage={storage}"),
                *("tracking.backend=jsonl", "tracking.system_metrics=false", "resources.accelerator=cpu"),
            ],
            cwd=ROOT, env=ENV, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        run = json.loads(done.stdout)["run"]
        points = [json.loads(line) for line in (Path(storage) / run / "metrics.jsonl").read_text().splitlines()]
    times = [point["value"] for point in points if point["metric"] == "step_time_ms"]
    losses = [point["value"] for point in points if point["metric"] == "train_loss"]
    return times[WARMUP:], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT with its data prepared")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of GlowFlow and, if not fp32, of nanoGPT"
    )
    parser.add_argument("--nanogpt-precision", choices=["fp32", "bf16"], help="default: the same")
    parser.add_argument("--compile", action="store_true", help="compile GlowFlow")
    parser.add_argument("--nanogpt-compile", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(given.rounds):
        precision = given.nanogpt_precision or given.precision
        theirs.append(
            statistics.median(
                nanogpt_steps(given.nanogpt.resolve(), given.size, given.steps, precision, given.nanogpt_compile)
            )
        )
        ours.append(statistics.median(glowflow_steps(given.size, given.steps, given.precision, given.compile)[0]))
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    result: dict[str, Any] = {
        **{
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(given).items()
            if key != "nanogpt"
        },
        "nanogpt_step_ms": theirs,
        "glowflow_step_ms": ours,
        "speed_relative_to_nanogpt": statistics.median(ratios),
        "ratios": ratios,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
