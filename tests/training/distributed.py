"""Runs a function in N gloo processes on loopback and brings back what each returned, or the worker's traceback."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["WorkerError", "free_port", "run_workers"]

TIMEOUT_SECONDS = 60.0


class WorkerError(AssertionError):
    """A worker raised, died or did not end in time; the message holds the tracebacks."""


def free_port() -> int:
    """A port on loopback that nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_workers(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks with a gloo group up.

    Args:
        world_size: number of processes; the function and its arguments must be picklable (module level).
        timeout: seconds after which every worker is killed.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        WorkerError: with every worker's traceback.
    """
    context = mp.get_context("spawn")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_worker, args=(rank, world_size, port, pipes[rank][1], function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # ours; the worker's own end stays open, so its death reads as end of file
    try:
        outcomes = _collect([receiver for receiver, _ in pipes], processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failures:
        raise WorkerError("\n".join(failures))
    return [value for _, value in outcomes]


def _collect(receivers: list[Connection], processes: list[Any], deadline: float) -> list[tuple[bool, Any]]:
    outcomes: list[tuple[bool, Any]] = []
    for receiver, process in zip(receivers, processes, strict=True):
        try:
            if receiver.poll(max(0.0, deadline - time.monotonic())):
                outcomes.append(receiver.recv())
                process.join(max(0.1, deadline - time.monotonic()))
            else:
                outcomes.append((False, "did not end in time"))
        except EOFError:
            process.join(1)
            outcomes.append((False, f"died with exit code {process.exitcode}"))
        # A rank that failed leaves the others waiting for it: do not wait with them.
        if not outcomes[-1][0]:
            deadline = min(deadline, time.monotonic() + 5)
    return outcomes


def _worker(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        value = function(*args)
        dist.barrier()  # nobody leaves while another still needs the group
        dist.destroy_process_group()
        sender.send((True, value))
    except BaseException:
        sender.send((False, traceback.format_exc()))
