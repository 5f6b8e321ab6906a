"""RUN/run.json: what a run is, what it did and how it ended; and the run directories themselves.

The record is written whole at the start (RUNNING), at checkpoints and at the end. A RUNNING record whose process is
gone is found out by process id and start time on the same machine, by the age of RUN/.heartbeat elsewhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from glowflow.config.errors import PreflightError, Problem, RunError
from glowflow.tracking.base import RunStatus
from glowflow.tracking.client import redact
from glowflow.tracking.files import jsonable, read_json, write_json
from glowflow.tracking.jsonl import HEARTBEAT_NAME

__all__ = [
    "DEAD",
    "JOURNAL_NAME",
    "RECORD_NAME",
    "RunRecord",
    "create_run_dir",
    "display_status",
    "find_run",
    "is_alive",
    "is_live",
    "iter_runs",
    "new_run_name",
    "now_iso",
    "run_name",
    "storage_of",
    "this_process",
]

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
JOURNAL_NAME = "journal.jsonl"  # of a sweep, in the directory above the run directories of its trials
DEAD = "DEAD"
HEARTBEAT_SECONDS = 180.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


@dataclass
class RunRecord:
    """What run.json holds; also what ``train --json`` and ``runs show --json`` print."""

    run: str
    status: RunStatus = "RUNNING"
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    final: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, float | None] = field(default_factory=dict)
    tokens_per_second: float | None = None
    goodput: float | None = None
    checkpoints: list[Any] = field(default_factory=list)
    mlflow_run_id: str | None = None
    mlflow_uri: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    started: str | None = None
    ended: str | None = None
    seconds: float | None = None
    error: str | None = None
    process: dict[str, Any] = field(default_factory=lambda: this_process())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: NaN and infinities are null."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        record["mlflow_uri"] = redact(self.mlflow_uri)
        return dict(jsonable(record))

    def save(self, run_dir: str | Path) -> None:
        """Write RUN/run.json; a reader sees the old or the new one, never a part."""
        write_json(Path(run_dir) / RECORD_NAME, self.to_dict())

    @classmethod
    def load(cls, run_dir: str | Path) -> RunRecord:
        """Read RUN/run.json; keys of a newer version are passed over.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        path = Path(run_dir) / RECORD_NAME
        record = read_json(path)
        if record is None or "run" not in record:
            rule = "cannot be read" if path.exists() else "does not exist, so this is no run directory"
            raise RunError(Problem(str(path), rule))
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{"process": {}} | {key: value for key, value in record.items() if key in names})

    def started_ms(self) -> int | None:
        """When it was first started, as Unix time in milliseconds."""
        return _milliseconds(self.started)

    def ended_ms(self) -> int | None:
        """When it ended, as Unix time in milliseconds."""
        return _milliseconds(self.ended)


def _milliseconds(iso: str | None) -> int | None:
    return None if iso is None else int(datetime.fromisoformat(iso).timestamp() * 1000)


def now_iso() -> str:
    """The present time, UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def this_process() -> dict[str, Any]:
    """What identifies this process: machine, process id, and start time against re-use of the id."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}


def _process_start(pid: int) -> str | None:
    """Start time of a process in the kernel's ticks since boot; None where there is no /proc or no such process."""
    try:
        # The second field is the command in brackets, which may hold spaces: count from behind it.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_alive(record: RunRecord, run_dir: str | Path) -> bool:
    """Whether a RUNNING record's process still lives, as far as can be told from here."""
    return record.status == "RUNNING" and is_live(record.process, run_dir)


def is_live(process: Mapping[str, Any], run_dir: str | Path) -> bool:
    """Whether a process, as ``this_process`` describes it, still works in this directory."""
    if process.get("host") == socket.gethostname() and isinstance(process.get("pid"), int):
        if not _process_exists(process["pid"]):
            return False
        started = process.get("started")
        return started is None or _process_start(process["pid"]) == started
    try:
        age = time.time() - (Path(run_dir) / HEARTBEAT_NAME).stat().st_mtime
    except OSError:
        return False
    return age < HEARTBEAT_SECONDS


def display_status(record: RunRecord, run_dir: str | Path) -> str:
    """The status to show: DEAD for a RUNNING one whose process is gone."""
    return DEAD if record.status == "RUNNING" and not is_alive(record, run_dir) else record.status


def new_run_name(config_name: str) -> str:
    """A name nobody has: the config's name, the time, and four random digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config_name).stem).strip("-._") or "run"
    return f"{stem[:80]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def create_run_dir(storage: str | Path, name: str) -> Path:
    """Make STORAGE/NAME, whose path is absolute.

    Raises:
        RunError: the name is not usable, or a run has it already.
        PreflightError: the storage cannot be written.
    """
    if not _NAME.fullmatch(name):
        rule = "must be letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise RunError(Problem("tracking.run", rule, name))
    storage = Path(storage).expanduser().absolute()
    run_dir = storage / name
    if run_dir.exists():
        hint = f"choose another name, or go on with `glowflow train --resume {name}`"
        raise RunError(Problem("tracking.run", "a run of this name exists", name, hint))
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        if run_dir.exists():  # somebody was faster
            raise RunError(Problem("tracking.run", "a run of this name exists", name)) from error
        raise _not_writable(storage, error) from error
    except OSError as error:
        raise _not_writable(storage, error) from error
    return run_dir


def _not_writable(storage: Path, error: OSError) -> PreflightError:
    reason = error.strerror or str(error)
    problem = Problem("tracking.storage", f"cannot be written: {reason}", str(storage), "choose another directory")
    return PreflightError(problem)


def iter_runs(storage: str | Path) -> list[Path]:
    """The run directories in ``storage``, by name; the trials of a sweep lie one level deeper."""
    storage = Path(storage).expanduser().absolute()
    return sorted(path.parent for level in ("*", "*/*") for path in storage.glob(f"{level}/{RECORD_NAME}"))


def storage_of(run_dir: str | Path) -> Path:
    """The storage that a run directory lies in, also that of a trial (STORAGE/SWEEP/TRIAL)."""
    above = Path(run_dir).absolute().parent
    return above.parent if (above / JOURNAL_NAME).is_file() else above


def run_name(run_dir: str | Path) -> str:
    """What commands call a run: its directory's name, and for a trial SWEEP/TRIAL."""
    run_dir = Path(run_dir).absolute()
    return run_dir.relative_to(storage_of(run_dir)).as_posix()


def find_run(storage: str | Path, name_or_path: str | Path) -> Path:
    """The directory of a run that is given by its name or path.

    Raises:
        RunError: there is no such run; the message suggests names that are close.
    """
    storage = Path(storage).expanduser().absolute()
    given = Path(name_or_path).expanduser()
    for candidate in (storage / given, given.absolute()):
        if (candidate / RECORD_NAME).is_file():
            return candidate
    names = [path.relative_to(storage).as_posix() for path in iter_runs(storage)]
    close = difflib.get_close_matches(str(name_or_path), names, n=3) or difflib.get_close_matches(given.name, names)
    if close:
        hint = "did you mean " + " or ".join(repr(name) for name in close) + "?"
    else:
        many = f"{len(names)} runs are in {storage}; `glowflow runs list` shows them"
        hint = many if names else f"{storage} holds no runs"
    raise RunError(Problem("run", "is not known", str(name_or_path), hint))
