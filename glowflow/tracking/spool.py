"""The spool: every point once, in RUN/metrics.jsonl, before it goes anywhere else.

The file is only appended to, one JSON object a line, by one ``os.write`` per call: a process killed at any moment
leaves whole lines and at most one torn line, which readers pass over. A point is keyed (metric, step); its first
value and timestamp win, so a step replayed after a restart adds nothing. Readers follow the file behind the writer.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from glowflow.tracking.base import CheckpointEvent, Point

__all__ = [
    "CHECKPOINTS_NAME",
    "METRICS_NAME",
    "CheckpointLog",
    "Spool",
    "SpoolTail",
    "curves",
    "decode_point",
    "read_checkpoints",
    "read_points",
]

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints.jsonl"


class _Appender:
    """An append-only file of lines that starts on a fresh line after a torn one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        # A torn line is ended by the next write, and becomes one that no reader can parse.
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def append(self, lines: Sequence[str]) -> None:
        data = ("\n" if self._torn else "").encode() + "".join(f"{line}\n" for line in lines).encode()
        self._torn = True  # until all is written: a full disk may take a part and then refuse
        while data:
            data = data[os.write(self._fd, data) :]
        self._torn = False

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Spool:
    """Writes points, each (metric, step) once over the whole life of the run.

    Args:
        path: RUN/metrics.jsonl; what earlier processes of the run wrote there counts as written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int]] = {(p.metric, p.step) for p in read_points(self.path)}
        self._file = _Appender(self.path)

    def append(self, points: Sequence[Point]) -> list[Point]:
        """Write the points that are new and give them back; on return they survive the death of this process."""
        with self._lock:
            new: dict[tuple[str, int], Point] = {}
            for point in points:
                key = (point.metric, point.step)
                if key not in self._seen:
                    new.setdefault(key, point)
            if new:
                self._file.append([_encode(point) for point in new.values()])
                self._seen.update(new)
            return list(new.values())

    def sync(self) -> None:
        """Bring the file to the disk: at checkpoints and at the end, not at every point."""
        with self._lock:
            self._file.sync()

    def last_step(self, prefix: str) -> int | None:
        """The greatest step of the metrics whose name starts with ``prefix``."""
        with self._lock:
            return max((step for metric, step in self._seen if metric.startswith(prefix)), default=None)

    def close(self) -> None:
        with self._lock:
            self._file.close()


class SpoolTail:
    """Reads a spool behind its writer: every point once, in the order written.

    Args:
        path: the spool; it may not exist yet.
        offset: byte offset up to which an earlier reader is done. A wrong one (longer than the file) counts as 0.
    """

    def __init__(self, path: str | Path, offset: int = 0) -> None:
        self.path = Path(path)
        self.offset = 0
        self._seen: set[tuple[str, int]] = set()
        size = self.path.stat().st_size if self.path.exists() else 0
        while self.offset < offset <= size and self._read(limit=offset - self.offset) is not None:
            pass

    def read(self, max_bytes: int = 128 * 1024) -> list[Point]:
        """The next points that are complete; empty when there is nothing new.

        Points are given once: whoever reads them must hold them until they are delivered.
        """
        while True:
            points, advanced = self._take(max_bytes)
            if points or not advanced:
                return points

    def _take(self, max_bytes: int) -> tuple[list[Point], bool]:
        before = self.offset
        points = self._read(max_bytes) or []
        return points, self.offset > before

    def _read(self, limit: int) -> list[Point] | None:
        """Points of the whole lines in the next ``limit`` bytes (or of one longer line); None at the end."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(limit)
                if data and b"\n" not in data:
                    data += file.readline()
        except FileNotFoundError:
            return None
        end = data.rfind(b"\n") + 1
        if not end:
            return None
        self.offset += end
        points = []
        for line in data[:end].splitlines():
            point = decode_point(line)
            if point is not None and (point.metric, point.step) not in self._seen:
                self._seen.add((point.metric, point.step))
                points.append(point)
        return points


def read_points(path: str | Path) -> list[Point]:
    """All points of a spool, each (metric, step) once, in the order written; no file gives none."""
    tail = SpoolTail(path)
    points: list[Point] = []
    while batch := tail.read(1 << 22):
        points.extend(batch)
    return points


def curves(path: str | Path) -> dict[str, dict[int, float]]:
    """The curves in a spool: metric -> step -> value, steps ascending."""
    table: dict[str, dict[int, float]] = {}
    for point in read_points(path):
        table.setdefault(point.metric, {})[point.step] = point.value
    return {metric: dict(sorted(values.items())) for metric, values in sorted(table.items())}


class CheckpointLog:
    """RUN/checkpoints.jsonl: which checkpoints were completed, each step once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._steps = {event.step for event in read_checkpoints(self.path)}
        self._file = _Appender(self.path)

    def append(self, step: int, path: str | Path, metrics: Mapping[str, float], sha256: str | None) -> bool:
        """Note a checkpoint; False where this step was noted before."""
        if step in self._steps:
            return False
        values = {name: _number(float(value)) for name, value in metrics.items()}
        record = {"step": int(step), "path": str(path), "metrics": values, "sha256": sha256}
        self._file.append([json.dumps(record)])
        self._file.sync()
        self._steps.add(step)
        return True

    def close(self) -> None:
        self._file.close()


def read_checkpoints(path: str | Path) -> list[CheckpointEvent]:
    """The checkpoints noted in RUN/checkpoints.jsonl, each step once, in the order written."""
    events: dict[int, CheckpointEvent] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            metrics = {str(name): float(value) for name, value in record["metrics"].items()}
            event = CheckpointEvent(int(record["step"]), str(record["path"]), metrics, record.get("sha256"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        events.setdefault(event.step, event)
    return list(events.values())


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as the strings that ``float()`` reads."""
    return value if math.isfinite(value) else str(value)


def _encode(point: Point) -> str:
    # repr of a float64 is exact, and a float32 is exact in a float64: values round-trip bit for bit.
    record = {
        "metric": point.metric,
        "step": int(point.step),
        "value": _number(float(point.value)),
        "timestamp_ms": int(point.timestamp_ms),
    }
    return json.dumps(record)


def decode_point(line: bytes) -> Point | None:
    """The point in a line of a spool, None for a torn one."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
        return Point(str(record["metric"]), int(record["step"]), float(record["value"]), int(record["timestamp_ms"]))
    except (ValueError, KeyError, TypeError):
        logger.debug("a torn line in the spool is passed over: %r", line[:80])
        return None
