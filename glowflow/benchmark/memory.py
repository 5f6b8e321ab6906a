"""The most memory that a call holds at a time, beyond what there was before it, and whether it fits at all.

Both devices are asked the same question, what torch's allocator gives out: on CUDA it counts by itself
(``max_memory_allocated``); on a CPU torch's profiler writes down every allocation and release, and the highest sum is
the peak. Unlike the resident set of the process it is the same in every run, knows no page that lingers, and includes
the scratch space of torch's kernels. A CPU has no error for memory that runs out: the kernel ends some process. So a
first try goes into a child process whose address space is limited; its death is an answer like any other.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Apart", "DoesNotFit", "available_memory", "out_of_memory", "peak_memory"]

P = ParamSpec("P")
R = TypeVar("R")
GIB = 2**30


class DoesNotFit(Exception):
    """More memory was needed than there is; the text says what is known."""


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator gives out during a call at most, what was there before not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as trace:
        call()
    with tempfile.TemporaryDirectory(prefix="glowflow-bench-") as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def out_of_memory(device: torch.device) -> Iterator[None]:
    """Turns a refused allocation into `DoesNotFit`, and gives back what a GPU keeps of the try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DoesNotFit(f"does not fit in memory: {str(error).splitlines()[0]}") from None
    except MemoryError:
        raise DoesNotFit("does not fit in memory") from None
    except RuntimeError as error:
        # torch's CPU allocator has no type of its own for it.
        if device.type != "cpu" or "allocate memory" not in str(error):
            raise
        raise DoesNotFit(f"does not fit in memory: {str(error).splitlines()[0]}") from None


def available_memory() -> int | None:
    """Bytes that this process could still take without swapping; None where the system does not say.

    The least of what Linux estimates for the machine and of what the control group leaves.
    """
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            group = Path("/sys/fs/cgroup")
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
    return max(min(found), 0) if found else None


class Apart:
    """One child process that runs calls one by one; when a call ends it, the next one gets another.

    Args:
        memory_limit: bytes that the calls may take; None: what is available when the child starts.
    """

    def __init__(self, memory_limit: int | None = None) -> None:
        self._limit = memory_limit
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function of a module with arguments that pickle takes.

        Raises:
            DoesNotFit: the function did, or the system ended the child.
        """
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
            settings = (torch.get_num_threads(), self._limit or available_memory())
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=settings)
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            self.close()
            raise DoesNotFit("does not fit in memory: the system ended the process that tried") from None

    def close(self) -> None:
        """End the child."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None


def _begin(threads: int, memory: int | None) -> None:
    """In the child: as many threads as its parent has, a limit on memory, and nothing on the terminal.

    The profiler writes notes to the file descriptor, past Python; errors come back through the pool.
    """
    torch.set_num_threads(threads)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        torch.ones(256, 256) @ torch.ones(256, 256)  # the threads' stacks are address space too
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
