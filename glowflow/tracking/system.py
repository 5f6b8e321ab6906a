"""Samples what the machine does (CPU, memory, disk, network, GPUs) as points named ``system/...``.

The step is the sample's number over the life of the run: after a restart it goes on behind the last one in the
spool, so that no step is written twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from glowflow.tracking.base import Point

__all__ = ["SystemSampler", "SystemUsage"]

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024


class SystemUsage:
    """Reads the counters of this machine; rates are since the reading before."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self._gpus = _open_gpus()
        self._before = self._counters()
        psutil.cpu_percent()  # the first call only sets the starting point

    def read(self) -> dict[str, float]:
        """Metric name (without prefix) -> value; sizes in MiB, shares in percent, rates in MiB per second."""
        memory = self._psutil.virtual_memory()
        values = {
            "cpu_percent": self._psutil.cpu_percent(),
            "memory_used_mib": (memory.total - memory.available) / _MIB,
            "memory_percent": memory.percent,
            "process_rss_mib": self._process.memory_info().rss / _MIB,
        }
        now, before = self._counters(), self._before
        seconds = max(now["time"] - before["time"], 1e-6)
        for name in sorted(now.keys() & before.keys() - {"time"}):
            values[f"{name}_mib_per_second"] = max(0.0, now[name] - before[name]) / _MIB / seconds
        self._before = now
        return values | self._read_gpus()

    def _counters(self) -> dict[str, float]:
        """Bytes so far; containers may have no disk or network counters."""
        counters = {"time": time.monotonic()}
        disk, network = self._psutil.disk_io_counters(), self._psutil.net_io_counters()
        if disk is not None:
            counters |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        if network is not None:
            counters |= {"network_receive": network.bytes_recv, "network_send": network.bytes_sent}
        return counters

    def _read_gpus(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if self._gpus is None:
            return values
        for index in range(self._gpus.nvmlDeviceGetCount()):
            handle = self._gpus.nvmlDeviceGetHandleByIndex(index)
            memory = self._gpus.nvmlDeviceGetMemoryInfo(handle)
            values[f"gpu_{index}_percent"] = float(self._gpus.nvmlDeviceGetUtilizationRates(handle).gpu)
            values[f"gpu_{index}_memory_used_mib"] = memory.used / _MIB
            values[f"gpu_{index}_power_watts"] = self._gpus.nvmlDeviceGetPowerUsage(handle) / 1000
        return values


def _open_gpus() -> Any | None:
    """NVIDIA's management library through ``pynvml``, or None without it or without a GPU."""
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]

        pynvml.nvmlInit()
    except Exception:  # absent, or present without a driver: its error types are its own
        return None
    return pynvml


class SystemSampler:
    """A daemon thread that hands samples on.

    Args:
        log: takes the points of one sample.
        last_step: the last step written under a prefix, None where there is none (``Spool.last_step``).
        interval: seconds between samples.
    """

    def __init__(
        self,
        log: Callable[[Sequence[Point]], None],
        last_step: Callable[[str], int | None],
        *,
        interval: float = 10.0,
        prefix: str = "system/",
    ) -> None:
        self._log, self._interval, self._prefix = log, interval, prefix
        last = last_step(prefix)
        self._step = 0 if last is None else last + 1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glowflow-system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            usage = SystemUsage()
            while not self._stopping.wait(self._interval):
                now = int(time.time() * 1000)
                self._log([Point(self._prefix + name, self._step, float(v), now) for name, v in usage.read().items()])
                self._step += 1
        except Exception as error:  # a counter that cannot be read must not end the training
            logger.warning("system metrics stop: %s: %s", type(error).__name__, error)
