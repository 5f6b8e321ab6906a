"""Ray itself: which cluster, how many CPUs each worker gets, and a start that says nothing.

Without an address a private cluster is started on this machine with exactly its logical CPUs, on loopback, with a
token that only this process and its children know. With one (``resources.address`` or ``RAY_ADDRESS``, which
``ray job submit`` sets) that cluster is joined. Ray is imported only inside functions, after its environment is set.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glowflow.config.errors import PreflightError, Problem
from glowflow.config.schema import GlowFlowConfig

__all__ = [
    "MAP_CPUS",
    "address_problem",
    "cluster_cpus",
    "connected",
    "cpu_problem",
    "cpus_per_worker",
    "logical_cpus",
    "object_store_bytes",
    "ray_address",
    "set_environment",
]

logger = logging.getLogger(__name__)

MAP_CPUS = 0.25  # logical CPUs that one map task of a worker's stream reserves (data/stream.py)
_MIN_WORKER_CPUS = 0.25  # below this `auto` refuses: so many workers on so few cores would only wait for each other
_GIB = 1024**3

# Read by Ray when it is imported or started. The poll interval bounds how long `report()` blocks and how late the
# driver sees the end of a run (ray/train/v2/_internal/constants.py).
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}
_TOKEN = secrets.token_hex(32)
_LOUD_LOGGERS = ("ray", "ray.data", "ray.train", "ray.serve", "ray.tune", "ray._private")


def set_environment() -> None:
    """Set Ray's environment variables; those that the user has set stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def logical_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, math.floor(quota))) if quota else count


def _cgroup_quota() -> float | None:
    """CPU quota of cgroup v2 or v1 in CPUs; None without one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        period_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
        return quota / period_us if quota > 0 else None
    except (OSError, ValueError):
        return None


def cpus_per_worker(config: GlowFlowConfig, total_cpus: float) -> float:
    """Logical CPUs that Ray reserves per worker.

    `auto` shares what the maps leave, at most one CPU each. The maps run beside the workers for as long as training
    runs, so a cluster whose CPUs are all reserved by workers would never deliver a batch.
    """
    asked = config.resources.cpus_per_worker
    if asked != "auto":
        return float(asked)
    workers = config.resources.workers
    share = (total_cpus - MAP_CPUS * workers) / workers
    # Ray counts in ten-thousandths; two decimals keep workers x share below the total in any rounding.
    return min(1.0, math.floor(share * 100) / 100)


def cpu_problem(config: GlowFlowConfig, total_cpus: float) -> Problem | None:
    """What is wrong with the number of workers on that many logical CPUs; None if they and their maps fit."""
    workers, asked = config.resources.workers, config.resources.cpus_per_worker
    maps = MAP_CPUS * workers
    if asked == "auto":
        if cpus_per_worker(config, total_cpus) >= _MIN_WORKER_CPUS:
            return None
        most = math.floor(total_cpus / (MAP_CPUS + _MIN_WORKER_CPUS))
        return Problem(
            "resources.workers",
            f"{workers} workers and their data maps need at least {workers * (MAP_CPUS + _MIN_WORKER_CPUS):g} "
            f"logical CPUs, there are {total_cpus:g}",
            workers,
            f"use at most {most} workers here",
        )
    needed = workers * float(asked) + maps
    if needed <= total_cpus + 1e-9:
        return None
    most_cpus = math.floor(100 * (total_cpus - maps) / workers) / 100
    hint = f"use at most {most_cpus:g}, or `auto`" if most_cpus > 0 else "use fewer workers"
    return Problem(
        "resources.cpus_per_worker",
        f"{workers} workers x {float(asked):g} CPUs + {maps:g} for their data maps need {needed:g} logical CPUs, "
        f"there are {total_cpus:g}: the maps would never run and training would hang",
        asked,
        hint,
    )


def ray_address(config: GlowFlowConfig) -> str | None:
    """Address of the cluster to join; None: start a private one."""
    address = config.resources.address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def address_problem(address: str, timeout: float = 3.0) -> Problem | None:
    """What is wrong with a Ray address; the port is tried, since ray.init would wait for a minute.

    Args:
        address: `auto` or host:port of the head node's GCS.
        timeout: seconds.
    """
    key = "resources.address"
    if address == "auto":
        return None
    if "://" in address:
        return Problem(key, "must be `auto` or host:port", address, "from outside the cluster use `ray job submit`")
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        return Problem(key, "must be `auto` or host:port", address)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout):
            return None
    except OSError as error:
        return Problem(key, f"no Ray cluster answers there: {error}", address, "start one with `ray start --head`")


def object_store_bytes(config: GlowFlowConfig) -> int:
    """Size of a private cluster's object store in bytes: as configured, else at most 2 GiB and what /dev/shm holds."""
    if config.resources.object_store_gib is not None:
        return int(config.resources.object_store_gib * _GIB)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [2 * _GIB, int(0.3 * memory)]
    if Path("/dev/shm").is_dir():
        # Ray moves a store that /dev/shm cannot hold to the disk, which is slow.
        limits.append(int(0.8 * shutil.disk_usage("/dev/shm").free))
    return max(80 * 1024**2, min(limits))


@contextmanager
def connected(config: GlowFlowConfig, *, verbose: bool = False) -> Iterator[None]:
    """Start or join Ray, and leave it again; a connection that the caller already had is used and left as it is.

    Raises:
        PreflightError: the cluster does not let us in.
    """
    set_environment()
    if not verbose:
        _quieten()
    import ray

    if ray.is_initialized():
        yield
        return
    address = ray_address(config)
    token_before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    try:
        if address is None:
            _start_private(ray, config, verbose)
        else:
            _join(ray, address, verbose)
        yield
    finally:
        ray.shutdown()
        if address is None:
            _restore(token_before)


def _start_private(ray: Any, config: GlowFlowConfig, verbose: bool) -> None:
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        # In the environment, not in ~/.ray: the cluster lives and dies with this process. Ray itself turns the
        # token mode on for a new local cluster, and keeps the first token that it reads in a process.
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    ray.init(
        address="local",
        num_cpus=logical_cpus(),
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        object_store_memory=object_store_bytes(config),
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
    )


def _join(ray: Any, address: str, verbose: bool) -> None:
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "if the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        problem = Problem("resources.address", f"cannot join the Ray cluster: {first_line}", address, hint)
        raise PreflightError(problem) from error


def _restore(saved: dict[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _quieten() -> None:
    """Leave the terminal to our own display: Ray's chatter stays in its log files."""
    # Without it Ray prints the raylet's messages on stdout, whatever `log_to_driver` says, and stdout is for JSON.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    for name in _LOUD_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray(\.|$)")
    # Ray announces the coming change of a default that GlowFlow does not use.
    warnings.filterwarnings("ignore", message=r".*accelerator visible devices env var.*", category=FutureWarning)


def cluster_cpus() -> dict[str, list[float]]:
    """CPUs and GPUs of every live node of the cluster that we joined."""
    import ray

    every: list[dict[str, Any]] = ray.nodes()
    nodes = [node["Resources"] for node in every if node.get("Alive")]
    return {name: [float(node.get(name, 0.0)) for node in nodes] for name in ("CPU", "GPU")}
