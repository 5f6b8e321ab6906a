"""Instruments of the loop that never make the host wait for the device between log steps.

``StepBuffer`` keeps the numbers of each step on the device, ``StepClock`` times steps (with CUDA events on a GPU);
both are read together at a log step.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor

__all__ = ["StepBuffer", "StepClock", "memory_mib"]


class StepBuffer:
    """A device table with one row of float64 per step since the last read; the first row says how wide it is.

    float64 holds every float32 exactly, so what is read is bit for bit what was computed.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._table = torch.zeros(capacity, 0, dtype=torch.float64, device=device)
        self._used = 0

    def append(self, *values: Tensor) -> None:
        """Add a row of () tensors, as many as in every row before."""
        if not self._table.shape[1]:
            self._table = self._table.new_zeros(len(self._table), len(values))
        self._table[self._used].copy_(torch.stack([value.detach().double() for value in values]))
        self._used += 1

    def read(self) -> list[list[float]]:
        """All rows since the last read, as plain floats; waits for the device."""
        rows: list[list[float]] = self._table[: self._used].tolist()
        self._used = 0
        return rows


class StepClock:
    """Durations of steps in seconds. On CUDA the time between events on the stream, else between calls."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []
        self._begin: float | torch.cuda.Event = 0.0

    def start(self) -> None:
        self._begin = self._event() if self._cuda else time.perf_counter()

    def stop(self) -> None:
        if isinstance(self._begin, float):
            self._seconds.append(time.perf_counter() - self._begin)
        else:
            self._marks.append((self._begin, self._event()))

    def read(self) -> list[float]:
        """Durations since the last read; call it after the device was waited for."""
        seconds, self._seconds = self._seconds, []
        marks, self._marks = self._marks, []
        if marks:
            marks[-1][1].synchronize()
        return seconds + [first.elapsed_time(second) / 1000 for first, second in marks]

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
