"""STORAGE/SWEEP/journal.jsonl: everything that happened in a sweep, in the order in which it happened.

One JSON object a line, only appended to, on the disk before `Journal.append` returns: a driver killed at any moment
leaves whole lines and at most one torn one, which counts as not written. One process at a time may drive a sweep.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glowflow.config.errors import Problem, RunError
from glowflow.experiments.ranking import best_trial, leaderboard
from glowflow.experiments.state import SweepState, Trial
from glowflow.tracking.files import jsonable
from glowflow.tracking.runrecord import now_iso

__all__ = [
    "JOURNAL_NAME",
    "Journal",
    "SweepState",
    "Trial",
    "best_trial",
    "driver_of",
    "find_sweep",
    "iter_sweeps",
    "leaderboard",
    "lock_sweep",
    "read_journal",
]

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
_LOCK_NAME = ".lock"
_METRICS = ("metrics", "best")
_LOOKS = 5
_LOOK_SECONDS = 0.02


class Journal:
    """Writes events; whoever writes holds the sweep (see `lock_sweep`). Any thread may append.

    Args:
        path: the journal, or the sweep's directory; a torn last line in it is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / JOURNAL_NAME if path.is_dir() else path
        self._lock = threading.Lock()
        is_new = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._good = _whole(self.path.read_bytes())
        os.ftruncate(self._fd, self._good)
        if is_new:
            _sync_folder(self.path.parent)

    def append(self, event: str, /, **content: Any) -> dict[str, Any]:
        """Write one event; when this returns, it survives the death of the process and of the machine.

        Args:
            event: its name.
            content: plain values; NaN is kept in metrics and becomes null elsewhere.

        Returns:
            The event as a reader will get it, for `SweepState.apply`.
        """
        record = {"event": event, "time": now_iso()}
        record |= {key: _encoded(key, value) for key, value in content.items() if key not in record}
        line = json.dumps(record, allow_nan=False)
        with self._lock:
            try:
                _write(self._fd, f"{line}\n".encode())
                os.fsync(self._fd)
            except BaseException:
                # A full disk may have taken a part of the line: what comes next must not stand behind it.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._good)
                raise
            self._good = os.fstat(self._fd).st_size
        return dict(json.loads(line))

    def close(self) -> None:
        """Nothing is written any more."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _encoded(key: str, value: Any) -> Any:
    if key in _METRICS and isinstance(value, Mapping):
        return {str(name): _number(item) for name, item in value.items()}
    return jsonable(value)


def _number(value: Any) -> float | str | None:
    """JSON has no NaN and no infinity: they are written as the strings that ``float()`` reads."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _whole(data: bytes) -> int:
    """How many bytes the whole lines take."""
    return data.rfind(b"\n") + 1


def read_journal(sweep_dir: str | Path) -> SweepState:
    """What has happened in a sweep so far; it may be running.

    Raises:
        RunError: there is no journal, or it does not say what the sweep is.
    """
    path = Path(sweep_dir) / JOURNAL_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        rule = "does not exist, so this is no sweep" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise RunError(Problem(str(path), rule)) from None
    state = SweepState()
    for line in data[: _whole(data)].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            logger.warning("a line of %s cannot be read and is passed over: %.80r", path, line)
            continue
        if isinstance(event, dict):
            state.apply(event)
    if not state.about:
        raise RunError(Problem(str(path), "does not say what the sweep is", hint="start the sweep anew"))
    return state


def iter_sweeps(storage: str | Path) -> list[Path]:
    """The sweep directories in ``storage``, by name."""
    storage = Path(storage).expanduser().absolute()
    return sorted(path.parent for path in storage.glob(f"*/{JOURNAL_NAME}"))


def find_sweep(storage: str | Path, name_or_path: str | Path) -> Path:
    """The directory of a sweep that is given by its name or path.

    Raises:
        RunError: there is no such sweep; the message suggests names that are close.
    """
    storage = Path(storage).expanduser().absolute()
    given = Path(name_or_path).expanduser()
    for candidate in (storage / given, given.absolute()):
        if (candidate / JOURNAL_NAME).is_file():
            return candidate
    names = [path.name for path in iter_sweeps(storage)]
    close = difflib.get_close_matches(given.name, names, n=3)
    if close:
        hint = "did you mean " + " or ".join(repr(name) for name in close) + "?"
    else:
        hint = f"{storage} holds " + (f"{len(names)} sweeps: {', '.join(names[:8])}" if names else "no sweeps")
    rule = "is a run, not a sweep" if (storage / given / "run.json").is_file() else "is not known"
    raise RunError(Problem("sweep", rule, str(name_or_path), hint))


_held: set[Path] = set()
_held_lock = threading.Lock()


@contextlib.contextmanager
def lock_sweep(sweep_dir: str | Path) -> Iterator[None]:
    """Hold a sweep as its one driver.

    A record lock: unlike flock it is not inherited by forked helpers, which may outlive a driver that was killed.
    Within the process, where record locks do not exclude each other, a set of the sweeps held does.

    Raises:
        RunError: a live process holds it.
    """
    folder = Path(sweep_dir).resolve()
    with _held_lock:
        if folder in _held:
            raise _taken(folder, os.getpid())
        _held.add(folder)
    try:
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(fd, folder)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(fd)
    finally:
        with _held_lock:
            _held.discard(folder)


def _lock(fd: int, folder: Path) -> None:
    for look in range(_LOOKS):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            # `driver_of` holds it for a moment when it looks.
            if look < _LOOKS - 1:
                time.sleep(_LOOK_SECONDS)
    raise _taken(folder, _owner(fd))


def _owner(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).decode(errors="replace")
    return int(text) if text.isdigit() else None


def _taken(folder: Path, pid: int | None) -> RunError:
    who = "another process" if pid is None else f"process {pid}"
    hint = f"`glowflow sweep status {folder.name}` shows how far it is; Ctrl-C there stops it"
    return RunError(Problem("sweep", f"is being driven by {who}", folder.name, hint))


def driver_of(sweep_dir: str | Path) -> int | None:
    """The process that drives a sweep, on this machine or on another that shares the storage; None: nobody does."""
    folder = Path(sweep_dir).resolve()
    with _held_lock:
        if folder in _held:
            return os.getpid()
        # Under the lock: a record lock of this process ends when any descriptor of its file is closed.
        try:
            fd = os.open(folder / _LOCK_NAME, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return _owner(fd)
        finally:
            os.close(fd)
