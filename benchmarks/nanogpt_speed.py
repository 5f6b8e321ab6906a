"""Step time of ``glowflow train --local`` beside nanoGPT's own ``train.py``, in alternation, one thread each.

    python benchmarks/nanogpt_speed.py --nanogpt ../nanoGPT --size small

Both are whole processes that train on tiny Shakespeare's characters with the same shapes and write down their own step
times. They take turns of some seconds (SIGSTOP and SIGCONT), so that both see the same machine, whose speed drifts by
more than the difference that is looked for. nanoGPT's clone needs its data (``python
data/shakespeare_char/prepare.py``). It has no autocast on CPUs: for bf16 the one line of a temporary copy that chooses
the context is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = {
    "small": (4, 4, 128, 64, 12, 344),
    "256": (4, 4, 256, 256, 8, 688),
}  # layers, heads, width, context, batch, ffn
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WARMUP = 10
ENDLESS = 1_000_000

Times = Callable[[], list[float]]


def start_nanogpt(given: argparse.Namespace, scratch: Path) -> tuple[subprocess.Popen[bytes], Times]:
    """nanoGPT's own loop, and a function that gives the milliseconds of its steps so far."""
    layers, heads, width, context, batch, _ = SIZES[given.size]
    text = (given.nanogpt / "train.py").read_text(encoding="utf-8")
    if (given.nanogpt_precision or given.precision) == "bf16":
        text = text.replace("ctx = nullcontext() if device_type == 'cpu' else", "ctx =")
        text = text.replace("device_type=device_type, dtype=ptdtype", "device_type=device_type, dtype=torch.bfloat16")
    copy, log = given.nanogpt / f"train_{os.getpid()}.py", scratch / "nanogpt.log"
    copy.write_text(text, encoding="utf-8")
    command = [
        *(sys.executable, "-u", str(copy), "config/train_shakespeare_char.py", "--device=cpu"),
        *(f"--compile={given.nanogpt_compile}", "--eval_iters=1", "--log_interval=1", f"--block_size={context}"),
        *(f"--batch_size={batch}", f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}"),
        *(f"--max_iters={ENDLESS}", f"--eval_interval={ENDLESS}", "--dropout=0.0", f"--out_dir={scratch}"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=given.nanogpt, env=ENV, stdout=out, stderr=subprocess.STDOUT)

    def times() -> list[float]:
        if log.stat().st_size:
            copy.unlink(missing_ok=True)  # it runs: the script has been read
        return [float(value) for value in re.findall(r"^iter \d+: .* time ([\d.]+)ms", log.read_text(), re.M)]

    return process, times


def start_glowflow(given: argparse.Namespace, scratch: Path) -> tuple[subprocess.Popen[bytes], Times]:
    """``glowflow train --local``, and a function that gives the milliseconds of its steps so far."""
    layers, heads, width, context, batch, ffn = SIZES[given.size]
    command = [
        *(sys.executable, "-m", "glowflow.cli.main", "train", str(ROOT / "configs/shakespeare_char.yaml"), "--local"),
        *(f"model.depth={layers}", f"model.heads={heads}", f"model.dim={width}", f"model.ffn_dim={ffn}"),
        *(f"data.context={context}", f"training.batch_size={batch}", f"training.max_steps={ENDLESS}"),
        *(f"training.precision={given.precision}", f"training.compile={str(given.compile).lower()}"),
        *("training.threads=1", f"training.checkpoint_interval={ENDLESS}", f"training.val_interval={ENDLESS}"),
        *("training.log_interval=1", f"tracking.storage={scratch}", "tracking.run=run", "tracking.backend=jsonl"),
        *("tracking.system_metrics=false", "resources.accelerator=cpu"),
    ]
    with (scratch / "glowflow.log").open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=out, stderr=subprocess.STDOUT)
    metrics = scratch / "run" / "metrics.jsonl"

    def times() -> list[float]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        points = [json.loads(line) for line in lines if line.endswith("}")]
        return [point["value"] for point in points if point["metric"] == "step_time_ms"]

    return process, times


def wait_until_steady(process: subprocess.Popen[bytes], times: Times, log: Path) -> int:
    """Wait for the first steps; how many there are then."""
    while len(times()) < WARMUP:
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.2)
    return len(times())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT with its data prepared")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--nanogpt-precision", choices=["fp32", "bf16"], help="default: the same")
    parser.add_argument("--compile", action="store_true", help="compile GlowFlow's blocks")
    parser.add_argument("--nanogpt-compile", action="store_true")
    parser.add_argument("--turns", type=int, default=20, help="turns of each")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    given = parser.parse_args()
    given.nanogpt = given.nanogpt.resolve()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        running: dict[str, tuple[subprocess.Popen[bytes], Times, int]] = {}
        for name, start in (("nanogpt", start_nanogpt), ("glowflow", start_glowflow)):
            process, times = start(given, scratch)
            stack.callback(process.kill)
            first = wait_until_steady(process, times, scratch / f"{name}.log")
            process.send_signal(signal.SIGSTOP)
            running[name] = (process, times, first)
        for _ in range(given.turns):
            for process, _, _ in running.values():
                process.send_signal(signal.SIGCONT)
                time.sleep(given.seconds)
                process.send_signal(signal.SIGSTOP)
        steps = {name: times()[first:] for name, (_, times, first) in running.items()}
    medians = {}
    for name, values in steps.items():
        # A step that was stopped in its middle lasted as long as the other's turn.
        kept = [value for value in values if value < 1000 * given.seconds]
        medians[name] = statistics.median(kept)
    result = {key: value for key, value in vars(given).items() if key != "nanogpt"}
    result |= {f"{name}_step_ms": value for name, value in medians.items()}
    result |= {"steps": {name: len(values) for name, values in steps.items()}}
    result["speed_relative_to_nanogpt"] = medians["nanogpt"] / medians["glowflow"]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
