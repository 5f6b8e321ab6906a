"""The MLflow UI on the right store, reachable from this machine only."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from glowflow.config.errors import Problem, RunError
from glowflow.tracking.client import artifact_root, default_uri, redact, sqlite_path

__all__ = ["UiPlan", "free_port", "ui_plan"]


@dataclass(frozen=True)
class UiPlan:
    """What to start and where to look.

    ``command`` is None where the store is a server already, whose own pages are at ``url``.
    """

    command: list[str] | None
    url: str
    environment: dict[str, str]


def free_port(preferred: int = 5000, host: str = "127.0.0.1") -> int:
    """``preferred`` if nobody listens there, else one that the system chooses."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RunError(Problem("port", f"no free port on {host}"))


def ui_plan(storage: str | Path, *, uri: str | None = None, port: int | None = None) -> UiPlan:
    """How to show the runs in ``storage``.

    Raises:
        RunError: no run was tracked there yet.
    """
    store = default_uri(storage, uri)
    if store.startswith(("http://", "https://")):
        return UiPlan(None, str(redact(store)), {})
    path = sqlite_path(store)
    if path is not None and not path.is_file():
        hint = "train a run first, or name the storage"
        raise RunError(Problem("tracking.storage", "holds no MLflow store yet", str(path), hint))
    chosen = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(chosen), "--workers", "1"]
    root = artifact_root(store)
    command += ["--artifacts-destination", root] if root else []
    # By environment, not by argument: a URI may hold a password, and arguments are public on the machine.
    environment = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    # Showing runs needs no job queue: ten processes of 240 MB that compete with training.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    return UiPlan(command, f"http://127.0.0.1:{chosen}", environment)
