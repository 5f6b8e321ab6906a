"""Runs a function in N gloo processes on loopback and brings back what each returned, or the worker's traceback."""

from __future__ import annotations

import io
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["WorkerError", "free_port", "run_workers"]

TIMEOUT_SECONDS = 60.0
START_SECONDS = 180.0  # importing torch on a busy machine is not what is tested
GRACE_SECONDS = 2.0


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
        timeout: seconds after which every worker is killed, counted from when all have started.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        WorkerError: with every worker's traceback.
    """
    context = mp.get_context("forkserver")  # as clean as spawn, but torch is imported once for all tests
    context.set_forkserver_preload(["glowflow.training.checkpoint", "glowflow.core.architectures.transformer"])
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
        receivers = [receiver for receiver, _ in pipes]
        outcomes = _collect(receivers, processes, START_SECONDS)
        if all(started for started, _ in outcomes):
            outcomes = _collect(receivers, processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failures:
        raise WorkerError("\n".join(failures))
    return [torch.load(io.BytesIO(value), weights_only=False) for _, value in outcomes]


def _collect(receivers: list[Connection], processes: list[Any], seconds: float) -> list[tuple[bool, Any]]:
    """The next message (worked, result or text) of each rank, in order of rank, taken as they come."""
    deadline = time.monotonic() + seconds
    outcomes: dict[int, tuple[bool, Any]] = {}
    while len(outcomes) < len(receivers):
        waiting = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return [outcomes.get(rank, (False, "did not end in time")) for rank in range(len(receivers))]
        for receiver in ready:
            rank = waiting[receiver]  # type: ignore[index]
            try:
                outcomes[rank] = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(1)
                outcomes[rank] = (False, f"died with exit code {processes[rank].exitcode}")
            if not outcomes[rank][0]:
                # The others may be waiting for the one that failed: do not wait with them.
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return [outcomes[rank] for rank in range(len(receivers))]


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
            timeout=timedelta(seconds=START_SECONDS),
        )
        sender.send((True, None))
        value = function(*args)
        dist.barrier()  # nobody leaves while another still needs the group
        dist.destroy_process_group()
        packed = io.BytesIO()
        torch.save(value, packed)  # plain bytes: shared-memory handles would die with this process
        sender.send((True, packed.getvalue()))
    except BaseException:
        sender.send((False, traceback.format_exc()))
