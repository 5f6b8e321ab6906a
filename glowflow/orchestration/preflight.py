"""What can be known to fail is said before anything starts: all problems at once, and nothing is written.

``preflight`` looks at this machine; ``check_cluster`` looks at the nodes of a cluster that was joined. Both only read,
but for a probe file in the storage directory, which is removed together with every directory made for it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from glowflow.config.errors import PreflightError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.orchestration import cluster

__all__ = ["check_cluster", "encoder_files", "preflight", "resolve_accelerator", "run_name_problem", "storage_dir"]

logger = logging.getLogger(__name__)

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_TRACKING_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_TITLE = "preflight"


def storage_dir(config: GlowFlowConfig) -> Path:
    """Absolute directory of the run directories: Ray's workers have other working directories."""
    return Path(config.tracking.storage).expanduser().absolute()


def preflight(config: GlowFlowConfig, *, local: bool, new_run: bool = True) -> list[str]:
    """Check everything that this machine can tell.

    Args:
        config: the checked config.
        local: whether training runs in this process, without Ray.
        new_run: whether ``tracking.run`` must not exist yet.

    Returns:
        Warnings for the user.

    Raises:
        PreflightError: with all problems.
        ConfigError: a custom architecture cannot be trained, with everything that is wrong with it; or the worst
            checkpoint would be kept as the best.
    """
    problems = [*_storage_problems(config, new_run), *_tracking_problems(config)]
    problems += _encoder_problems(config) if new_run else []  # a run that goes on has these weights already
    address = None if local else cluster.ray_address(config)
    if address is not None:
        problem = cluster.address_problem(address)
        problems += [problem] if problem else []
    else:
        problems += _machine_problems(config, local)
    if problems:
        raise PreflightError(problems, title=_TITLE)
    _check_monitor(config)
    found = _architecture_warnings(config)
    if address is not None:
        return found
    return [*found, *_precision_warnings(config), *([] if local else _object_store_warnings(config))]


def run_name_problem(name: str) -> Problem | None:
    """Run names become directories and MLflow run names."""
    if _RUN_NAME.fullmatch(name):
        return None
    return Problem("tracking.run", "must be letters, digits, `.`, `_` and `-`, and start with a letter or digit", name)


def resolve_accelerator(config: GlowFlowConfig, *, joined: bool) -> Literal["cpu", "gpu"]:
    """What `auto` means: a GPU where there is one for every worker.

    Args:
        joined: the cluster's GPUs count, not this machine's.
    """
    asked = config.resources.accelerator
    if asked != "auto":
        return asked
    return "gpu" if _num_gpus(joined) >= config.resources.workers else "cpu"


def _num_gpus(joined: bool) -> int:
    if joined:
        return int(sum(cluster.cluster_cpus()["GPU"]))
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_cluster(config: GlowFlowConfig) -> None:
    """Check the nodes of the cluster that was joined.

    Raises:
        PreflightError: the workers and their maps can never be placed.
    """
    nodes = cluster.cluster_cpus()
    problems = []
    total_cpus = max(sum(nodes["CPU"]), _autoscaler_limit("CPU"))
    problem = cluster.cpu_problem(config, total_cpus)
    if problem is not None:
        problems.append(problem)
    elif not _autoscaler_limit("CPU"):
        each = cluster.cpus_per_worker(config, total_cpus)
        places = sum(math.floor(cpus / each + 1e-9) for cpus in nodes["CPU"])
        if places < config.resources.workers:
            rule = f"no more than {places} workers of {each:g} CPUs fit on the cluster's nodes"
            problems.append(Problem("resources.workers", rule, config.resources.workers))
    gpus = max(sum(nodes["GPU"]), _autoscaler_limit("GPU"))
    if config.resources.accelerator == "gpu" and gpus < config.resources.workers:
        problems.append(_gpu_problem(config.resources.workers, int(gpus), "the cluster"))
    if problems:
        raise PreflightError(problems, title=_TITLE)


def _autoscaler_limit(resource: str) -> float:
    """How much the cluster's autoscaler may still bring; 0 without one."""
    try:
        from ray._private.state import state

        # The public API does not tell; Ray Train asks the same function (worker_group.py) for the same purpose.
        limits = state.get_max_resources_from_cluster_config() or {}
    except Exception as error:  # a private place may move: then only the nodes count
        logger.debug("the autoscaler's limits are unknown: %s", error)
        return 0.0
    return float(limits.get(resource, 0))


def _storage_problems(config: GlowFlowConfig, new_run: bool) -> list[Problem]:
    problems = []
    storage, name = storage_dir(config), config.tracking.run
    problem = _unwritable(storage)
    if problem is not None:
        problems.append(problem)
    if name is not None:
        bad_name = run_name_problem(name)
        if bad_name is not None:
            problems.append(bad_name)
        elif new_run and (storage / name).exists():
            hint = f"choose another name, or go on with it: glowflow train --resume {name}"
            problems.append(Problem("tracking.run", f"a run of this name exists in {storage}", name, hint))
    return problems


def _unwritable(directory: Path) -> Problem | None:
    """Try to make the directory and a file in it; leave no trace."""
    made: list[Path] = []
    try:
        for path in [*reversed(directory.parents), directory]:
            if not path.exists():
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        hint = "choose a directory that can be written"
        return Problem("tracking.storage", f"cannot be written: {error.strerror or error}", str(directory), hint)
    finally:
        for path in reversed(made):
            path.rmdir()


def encoder_files(config: GlowFlowConfig) -> dict[str, Path]:
    """Config key -> absolute path of the weights that an encoder starts from (workers run in other directories)."""
    if not isinstance(config.model, MultimodalConfig):
        return {}
    named = {f"model.{name}.checkpoint": getattr(config.model, name).checkpoint for name in config.model.modalities}
    return {key: Path(path).expanduser().absolute() for key, path in named.items() if path is not None}


def _encoder_problems(config: GlowFlowConfig) -> list[Problem]:
    return [
        Problem(key, "does not exist", str(path)) for key, path in encoder_files(config).items() if not path.is_file()
    ]


def _tracking_problems(config: GlowFlowConfig) -> list[Problem]:
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if config.tracking.backend != "mlflow" or not uri:
        return []
    key = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
    scheme = urlsplit(uri).scheme.split("+")[0]
    shown = re.sub(r"//[^@/]*@", "//***@", uri)  # it may hold a password
    if scheme in ("", "file"):
        return [
            Problem(key, "MLflow no longer keeps runs in plain directories", shown, "use sqlite:////absolute/path.db")
        ]
    if scheme not in _TRACKING_SCHEMES:
        return [Problem(key, f"must be a URI of MLflow: {', '.join(_TRACKING_SCHEMES)}", shown)]
    if scheme == "sqlite" and not uri.startswith("sqlite:///"):
        return [Problem(key, "must start with sqlite:/// and a path", shown, "an absolute path has four slashes")]
    if scheme in ("http", "https") and not urlsplit(uri).hostname:
        return [Problem(key, "has no host name", shown, "use http://host:port")]
    return []


def _machine_problems(config: GlowFlowConfig, local: bool) -> list[Problem]:
    problems = []
    workers = 1 if local else config.resources.workers
    if not local:
        problem = cluster.cpu_problem(config, cluster.logical_cpus())
        problems += [problem] if problem else []
    if config.resources.accelerator == "gpu":
        there = _num_gpus(joined=False)
        if there < workers:
            problems.append(_gpu_problem(workers, there, "this machine"))
    return problems


def _gpu_problem(wanted: int, there: int, where: str) -> Problem:
    rule = f"{wanted} worker{'s' if wanted > 1 else ''} need as many GPUs, {where} has {there or 'none'}"
    return Problem("resources.accelerator", rule, "gpu", "use `auto`, which takes what is there, or `cpu`")


def _check_monitor(config: GlowFlowConfig) -> None:
    from glowflow.training.callbacks.best import monitored_metric
    from glowflow.training.passes import task_of

    monitored_metric(config.training, task_of(config))


def _architecture_warnings(config: GlowFlowConfig) -> list[str]:
    from glowflow.core.architectures.validation import validate_architecture

    return validate_architecture(config)


def _precision_warnings(config: GlowFlowConfig) -> list[str]:
    import torch

    from glowflow.training.precision import precision_warnings

    device = "cuda" if resolve_accelerator(config, joined=False) == "gpu" else "cpu"
    return precision_warnings(config.training.precision, torch.device(device))


def _object_store_warnings(config: GlowFlowConfig) -> list[str]:
    shared = Path("/dev/shm")
    wanted = cluster.object_store_bytes(config)
    if not shared.is_dir() or shutil.disk_usage(shared).free >= wanted:
        return []
    free_mib = shutil.disk_usage(shared).free // 2**20
    return [
        f"/dev/shm has {free_mib} MiB free, the object store wants {wanted // 2**20}: Ray will put it on the disk, "
        "which is slow. In a container raise --shm-size, or lower resources.object_store_gib"
    ]
