"""Run directories: which run is meant, the lock of a live one, and what may change when a run goes on.

A live run holds an advisory lock on RUN/.lock, which the kernel takes away from a process that dies in any way: so a
run whose record still says RUNNING can be told from one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glowflow.config.errors import CheckpointError, ConfigError, Problem, RunError
from glowflow.config.loader import apply_overrides, load_config, to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.tracking.files import read_json, write_json
from glowflow.tracking.runrecord import find_run

if TYPE_CHECKING:
    from glowflow.data.manifest import Manifest

__all__ = [
    "CONFIG_NAME",
    "ResumePoint",
    "fixed_key_problems",
    "locate",
    "lock_run",
    "resume_config",
    "store_sources",
    "stored_sources",
]

CONFIG_NAME = "config.yaml"
_LOCK_NAME = ".lock"
_SOURCES_NAME = "data.json"

# Keys that may change between the parts of one run: where it runs, what is written how often, how long it lasts. All
# others decide the numbers, and a run that goes on with other ones would no longer be the run that its name says.
_MAY_CHANGE = (
    "model.attention.backend",
    "data.cache_dir",
    "data.max_bad_fraction",
    "data.on_bad_file",
    "data.on_bad_sample",
    "data.parallel_items",
    "data.prefetch_items",
    "data.steps_per_item",
    "data.val_split",
    "data.verify",
    "training.activation_checkpointing",
    "training.checkpoint_interval",
    "training.export_interval",
    "training.keep_checkpoints",
    "training.log_interval",
    "training.log_samples",
    "training.max_failures",
    "training.max_nonfinite_steps",
    "training.max_steps",
    "training.micro_batch_size",
    "training.monitor_metrics",
    "training.monitor_mode",
    "training.strategy",
    "training.threads",
    "training.val_batches",
    "training.val_interval",
    "resources.",
    "tracking.",
)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: its directory, and the checkpoint that the user named (None: the newest complete one)."""

    run_dir: Path
    checkpoint: Path | None = None


def locate(target: str | Path, storage: Path) -> ResumePoint:
    """The run that the user means: a name in ``storage``, a run directory, or a checkpoint in one.

    Raises:
        RunError: there is no such run, or it lacks its config.
        CheckpointError: a checkpoint was named that is not complete or damaged.
    """
    checkpoint = _named_checkpoint(Path(target).expanduser(), storage)
    if checkpoint is not None:
        return ResumePoint(checkpoint.parent.parent, _checked(checkpoint))
    run_dir = find_run(storage, target)
    if not (run_dir / CONFIG_NAME).is_file():
        raise RunError(Problem(str(run_dir / CONFIG_NAME), "does not exist, so the run cannot go on"))
    return ResumePoint(run_dir)


def _named_checkpoint(path: Path, storage: Path) -> Path | None:
    for candidate in (storage / path, path.absolute()):
        if candidate.name.startswith("step-") and (candidate.parent.parent / CONFIG_NAME).is_file():
            return candidate
    return None


def _checked(checkpoint: Path) -> Path:
    from glowflow.training.markers import verify

    problems = verify(checkpoint)
    if problems:
        raise CheckpointError(problems, title=f"checkpoint {checkpoint.name} cannot be resumed")
    return checkpoint


def resume_config(run_dir: Path, overrides: Sequence[str] | Mapping[str, Any]) -> GlowFlowConfig:
    """The config of a run with changes for its next part.

    Raises:
        ConfigError: a key that decides the numbers would change, or an override is wrong.
    """
    stored = load_config(run_dir / CONFIG_NAME, strict=False)
    # A run directory may have been moved since.
    here = {"tracking.storage": str(run_dir.parent), "tracking.run": run_dir.name}
    stored = apply_overrides(stored, here)
    changed = apply_overrides(stored, overrides)
    problems = fixed_key_problems(to_dict(stored), to_dict(changed))
    if changed.tracking.run != run_dir.name:
        problems.append(Problem("tracking.run", f"the run is called {run_dir.name!r}", changed.tracking.run))
    if problems:
        raise ConfigError(problems, title=f"run {run_dir.name} cannot go on with these changes")
    return apply_overrides(changed, here)


def fixed_key_problems(stored: Mapping[str, Any], changed: Mapping[str, Any], prefix: str = "") -> list[Problem]:
    """One problem for every key that differs and decides the numbers."""
    problems = []
    for key in sorted({*stored, *changed}):
        name, old, new = f"{prefix}{key}", stored.get(key), changed.get(key)
        if old == new or any(name == free or (free.endswith(".") and name.startswith(free)) for free in _MAY_CHANGE):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            problems += fixed_key_problems(old, new, f"{name}.")
        else:
            hint = "start a new run for another value"
            problems.append(Problem(name, f"cannot change when a run goes on, it was {old!r}", new, hint))
    return problems


def store_sources(run_dir: Path, sources: Sequence[tuple[Manifest, float]]) -> None:
    """Write down which shards the run reads."""
    rows = [[str(manifest.root), manifest.fingerprint, weight] for manifest, weight in sources]
    write_json(run_dir / _SOURCES_NAME, {"sources": rows})


def stored_sources(run_dir: Path, verify: Literal["size", "hash"]) -> list[tuple[Manifest, float]] | None:
    """The shards that a run began with; None where they are no longer there and must be built again.

    Raises:
        DataError: they are there but damaged.
    """
    from glowflow.data.manifest import MANIFEST_NAME
    from glowflow.data.prepare import load_built

    rows = (read_json(run_dir / _SOURCES_NAME) or {}).get("sources") or []
    if not rows or not all((Path(root) / MANIFEST_NAME).is_file() for root, _, _ in rows):
        return None
    built = [(load_built(Path(root), verify), float(weight)) for root, _, weight in rows]
    same = [manifest.fingerprint for manifest, _ in built] == [fingerprint for _, fingerprint, _ in rows]
    return built if same else None


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the run as its one driver.

    Raises:
        RunError: a live process holds it.
    """
    handle = os.open(run_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 4096).decode(errors="replace") or "another process"
            hint = "wait for it, or stop it with Ctrl-C there"
            raise RunError(Problem("resume", f"the run {run_dir.name} is still running: {owner}", hint=hint)) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(handle)
