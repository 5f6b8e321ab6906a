"""Which checkpoint directories are whole: RUN/checkpoints/step-N with a marker that lists every file and its hash.

A directory is written first and marked last, by one atomic rename, so whatever kills a run leaves either a checkpoint
with its marker or a directory that is ignored. Nothing here needs torch, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glowflow.config.errors import CheckpointError, Problem

__all__ = [
    "CheckpointInfo",
    "best_checkpoint",
    "checkpoint_path",
    "latest_complete",
    "list_checkpoints",
    "prune",
    "read_extra",
    "read_header",
    "read_info",
    "remove_checkpoint",
    "resolve_checkpoint",
    "verify",
    "write_marker",
]

logger = logging.getLogger(__name__)

VERSION = 1
MARKER = "COMPLETE.json"
EXTRA = "extra.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint directory.

    ``sequence`` counts the checkpoints of a run in the order in which they were written: after a resume from an older
    checkpoint a smaller step may be the newer one.
    """

    step: int
    path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    complete: bool = False
    sequence: int = -1
    world_size: int = 0
    bytes: int = 0


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in a run directory."""
    return Path(run_dir) / FOLDER / f"step-{step}"


def write_marker(path: Path, *, step: int, sequence: int, world_size: int, metrics: dict[str, float]) -> CheckpointInfo:
    """Hash every file under ``path`` and declare the checkpoint complete, atomically and durably."""
    files = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    marker = {
        "version": VERSION,
        "step": step,
        "sequence": sequence,
        "world_size": world_size,
        "metrics": metrics,
        "files": files,
    }
    write_json(path / MARKER, marker)
    return _info(path, marker)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the whole new one, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_info(path: Path) -> CheckpointInfo | None:
    """What the marker of a checkpoint directory says; None when there is no readable marker."""
    if not (path / MARKER).is_file():
        return None  # before any message is made: that one lists the neighbours, which asks here again
    try:
        return _info(path, _read_marker(path))
    except CheckpointError:
        return None


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """Every checkpoint directory of a run by step, incomplete ones included."""
    found = []
    for path in Path(run_dir, FOLDER).glob("step-*"):
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdecimal():
            found.append(read_info(path) or CheckpointInfo(int(number), path))
    return sorted(found, key=lambda info: info.step)


def latest_complete(run_dir: Path, *, check: bool = False) -> Path | None:
    """The complete checkpoint that was written last.

    Args:
        run_dir: the run directory.
        check: also compare sizes and hashes; a damaged checkpoint is named in a warning and the one before is taken.
    """
    complete = [info for info in list_checkpoints(run_dir) if info.complete]
    for info in sorted(complete, key=lambda info: info.sequence, reverse=True):
        problems = verify(info.path) if check else []
        if not problems:
            return info.path
        logger.warning("checkpoint %s is damaged and passed over: %s", info.path, "; ".join(map(str, problems)))
    return None


def best_checkpoint(run_dir: Path, metric: str, mode: Literal["min", "max"] = "min") -> CheckpointInfo | None:
    """The complete checkpoint with the smallest or largest value of a metric; the newer one of two equal ones."""
    return _best([info for info in list_checkpoints(run_dir) if info.complete], metric, mode)


def verify(path: Path) -> list[Problem]:
    """What is wrong with a checkpoint directory: no marker, a missing file, another size, another hash."""
    path = Path(path)
    try:
        files = _read_marker(path)["files"]
    except CheckpointError as error:
        return list(error.problems)
    problems = []
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            problems.append(Problem(str(file), "is listed in the checkpoint's marker but missing"))
        elif file.stat().st_size != expected["bytes"]:
            problems.append(Problem(str(file), f"must have {expected['bytes']} bytes", file.stat().st_size))
        elif _sha256(file) != expected["sha256"]:
            problems.append(Problem(str(file), "is damaged: its SHA-256 is not the one in the checkpoint's marker"))
    if EXTRA not in files:
        problems.append(Problem(str(path / MARKER), f"does not list {EXTRA}"))
    return problems


def read_header(path: Path) -> dict[str, Any]:
    """The whole ``extra.json`` of a complete checkpoint: the store's own header and the caller's ``extra``.

    Raises:
        CheckpointError: there is no complete checkpoint, or the file cannot be read.
    """
    _read_marker(Path(path))
    file = Path(path) / EXTRA
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        header["extra"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(str(file), f"cannot be read: {error}")) from None
    return header


def read_extra(path: Path) -> dict[str, Any]:
    """What the loop stored beside the tensors: config, tokenizer, cursor, scaler, thread count, ...

    Raises:
        CheckpointError: there is no complete checkpoint, or the file cannot be read.
    """
    return read_header(path)["extra"]


def resolve_checkpoint(
    target: str | Path, *, best_metric: str | None = None, best_mode: Literal["min", "max"] = "min"
) -> Path:
    """The checkpoint directory that a person means.

    Args:
        target: a run directory (its newest complete checkpoint is taken) or a directory ``.../step-N``.
        best_metric: of a run directory, take the checkpoint that is best in this metric instead.

    Raises:
        CheckpointError: there is no such directory or no complete checkpoint; the message says what there is.
    """
    path = Path(target).expanduser()
    if not path.is_dir():
        hint = "a single-file checkpoint is not a directory" if path.is_file() else _siblings(path)
        raise CheckpointError(Problem(str(target), "is neither a run directory nor a checkpoint directory", hint=hint))
    if path.name.startswith("step-"):
        _read_marker(path)
        return path
    run_dir = path.parent if path.name == FOLDER else path
    if best_metric is not None:
        best = best_checkpoint(run_dir, best_metric, best_mode)
        found = best.path if best else None
    else:
        found = latest_complete(run_dir)
    if found is None:
        measured = f" with the metric {best_metric}" if best_metric else ""
        raise CheckpointError(Problem(str(target), f"holds no complete checkpoint{measured}", hint=_contents(run_dir)))
    return found


def prune(run_dir: Path, *, keep: int, best_metric: str | None, best_mode: Literal["min", "max"]) -> list[Path]:
    """Remove all but the ``keep`` newest complete checkpoints and the best one; returns what was removed.

    Incomplete directories go too: they are what a crash left. So this must not run while a checkpoint is written.
    """
    found = list_checkpoints(run_dir)
    complete = sorted((info for info in found if info.complete), key=lambda info: info.sequence)
    kept = {info.path for info in complete[-keep:]}
    if best_metric is not None and (best := _best(complete, best_metric, best_mode)):
        kept.add(best.path)
    removed = [info.path for info in found if info.path not in kept]
    for path in removed:
        remove_checkpoint(path)
    return removed


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint directory, its marker first: a half-removed one is incomplete, never corrupt."""
    (path / MARKER).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def _read_marker(path: Path) -> dict[str, Any]:
    """The marker, checked for its form.

    Raises:
        CheckpointError: missing, unreadable, or written by another version.
    """
    file = path / MARKER
    if not path.is_dir():
        raise CheckpointError(Problem(str(path), "is not a directory", hint=_siblings(path)))
    if not file.is_file():
        raise CheckpointError(
            Problem(str(path), f"is not a complete checkpoint: it has no {MARKER}", hint=_siblings(path))
        )
    try:
        marker = json.loads(file.read_text(encoding="utf-8"))
        if marker["version"] == VERSION:
            _info(path, marker)
            return marker
        version = marker["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(Problem(str(file), f"cannot be read as a checkpoint's marker: {error!r}")) from None
    hint = "it was written by another version of GlowFlow"
    raise CheckpointError(Problem(str(file), f"must have the format version {VERSION}", version, hint))


def _info(path: Path, marker: dict[str, Any]) -> CheckpointInfo:
    return CheckpointInfo(
        step=int(marker["step"]),
        path=path,
        metrics={name: float(value) for name, value in marker["metrics"].items()},
        complete=True,
        sequence=int(marker["sequence"]),
        world_size=int(marker["world_size"]),
        bytes=sum(int(entry["bytes"]) for entry in marker["files"].values()),
    )


def _best(infos: list[CheckpointInfo], metric: str, mode: Literal["min", "max"]) -> CheckpointInfo | None:
    sign = 1 if mode == "max" else -1
    # A metric that is not a number cannot be the best (NaN is not equal to itself).
    measured = [info for info in infos if metric in info.metrics and info.metrics[metric] == info.metrics[metric]]
    return max(measured, key=lambda info: (sign * info.metrics[metric], info.sequence), default=None)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _contents(run_dir: Path) -> str:
    found = list_checkpoints(run_dir)
    if not found:
        return f"there is no step-N directory under {run_dir / FOLDER}"
    return "there is " + ", ".join(f"{i.path.name} ({'complete' if i.complete else 'incomplete'})" for i in found)


def _siblings(path: Path) -> str:
    """What lies beside a checkpoint that is not there."""
    if path.name.startswith("step-") and path.parent.name == FOLDER and path.parent.is_dir():
        return _contents(path.parent.parent)
    return ""
