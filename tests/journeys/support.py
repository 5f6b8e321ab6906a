"""What the journeys share: a small corpus and config, whole commands in processes of their own, and reading runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp

from glowflow.config.loader import apply_overrides, load_config, to_yaml
from glowflow.tracking.spool import curves
from glowflow.training.flat_state import MetadataReader, saved_tensors

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "model": {"arch": "transformer", "dim": 32, "depth": 2, "heads": 2},
    "data": {"tokenizer": "bytes", "context": 64, "steps_per_item": 8},
    "training": {
        "max_steps": 60,
        "batch_size": 16,
        "lr": 3e-3,
        "warmup_steps": 5,
        "checkpoint_interval": 10,
        "log_interval": 5,
        "val_interval": 20,
        "val_batches": 2,
        "threads": 1,
        "log_samples": True,
    },
    "tracking": {"backend": "jsonl"},
    "resources": {"accelerator": "cpu"},
}


def write_corpus(folder: Path, *, files: int = 12, seed: int = 1) -> Path:
    """Text with words that repeat, so that a small model learns something in a few steps."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 7))) for _ in range(150)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [" ".join(generator.choices(words, k=10)) for _ in range(60)]
        (folder / f"file-{number:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_config(folder: Path, name: str = "tiny", **overrides: Any) -> Path:
    """The small config as YAML beside its corpus; ``training__lr=1`` sets training.lr. Paths are absolute."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    places = {
        "data.dataset": str(corpus),
        "data.cache_dir": str(folder / "cache"),
        "tracking.storage": str(folder / "runs"),
    }
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(apply_overrides(load_config(TINY), {**places, **given})), encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: this package, and nothing of Ray or MLflow that a user would not have set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_")) and k != "PYTHONPATH"}
    # Two workers and their maps share the machine's cores: more threads would only fight.
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "glowflow.cli.main", *map(str, arguments)]


def glowflow(*arguments: Any, cwd: Path, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a whole command to its end."""
    return subprocess.run(
        command(*map(str, arguments)),
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: Any, cwd: Path, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own; its output goes to a file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command(*map(str, arguments)),
            cwd=cwd,
            env=environment(**extra),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def members(session: int) -> list[psutil.Process]:
    """Every process of a session: the command, Ray's daemons and all workers."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def kill_everything(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to every process of the command's session, again until none is left; returns how many there were."""
    killed = set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        alive = [member for member in members(process.pid) if not _is_zombie(member)]
        if not alive:
            break
        for member in alive:
            killed.add(member.pid)
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.poll()
        time.sleep(0.02)
    process.wait(30)
    return len(killed)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def steps_done(run_dir: Path, rank: int = 0) -> int:
    """Steps that a rank has finished, from its log of samples."""
    path = run_dir / "samples" / f"rank-{rank}.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except ValueError:
            continue
    return 0


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes], log: Path, timeout: float = 240) -> int:
    """Wait until a run has done that many steps; fails with the command's output when it ends before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done = steps_done(run_dir)
        if done >= step:
            return done
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before step {step}:\n{log.read_text()}")
        time.sleep(0.005)
    raise AssertionError(f"did not come to step {step} in {timeout} s:\n{log.read_text()}")


def record(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return content


def loss_curve(run_dir: Path, metric: str = "train_loss") -> dict[int, float]:
    """Step -> value, as it was logged."""
    return curves(run_dir / "metrics.jsonl")[metric]


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds as tensors, whole: weights and optimiser state."""
    reader = MetadataReader(run_dir / "checkpoints" / f"step-{step}")
    saved = saved_tensors(reader.read_metadata())
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in saved.items()}
    dcp.load(tensors, storage_reader=MetadataReader(run_dir / "checkpoints" / f"step-{step}"), no_dist=True)
    return tensors


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, different
