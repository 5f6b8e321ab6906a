"""The one door to MLflow: where its store is, a quiet client for it, and what its errors mean.

MLflow is imported inside functions only: the import takes seconds and its first use of a new SQLite file some more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glowflow.config.errors import PreflightError, Problem

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "PermanentTrackingError",
    "artifact_root",
    "connect",
    "default_uri",
    "experiment_id",
    "flatten",
    "is_permanent",
    "redact",
    "sqlite_path",
]

logger = logging.getLogger(__name__)

_QUIET = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own patience (7 retries of 120 s) is for scripts; ours is a thread that tries again later.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class PermanentTrackingError(Exception):
    """The tracker will never take this, however often it is sent."""


def default_uri(storage: str | Path, uri: str | None = None) -> str:
    """The MLflow store of the runs in ``storage``: the given URI, else MLFLOW_TRACKING_URI, else SQLite in ``storage``.

    A SQLite path becomes absolute, since workers have other working directories.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        return f"sqlite:///{Path(storage).expanduser().absolute() / 'mlflow.db'}"
    path = sqlite_path(chosen)
    return chosen if path is None else f"sqlite:///{path.expanduser().absolute()}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite URI, None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_root(uri: str) -> str | None:
    """Where artifacts of a SQLite store go: ``mlartifacts`` beside the file. Servers decide for themselves."""
    path = sqlite_path(uri)
    return None if path is None else str(path.parent / "mlartifacts")


def redact(uri: str | None) -> str | None:
    """The URI without a password, for files and screens."""
    if not uri or "@" not in uri:
        return uri
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":***@", 1)


def connect(uri: str, *, timeout: float = 3.0) -> MlflowClient:
    """A quiet client; a server that does not listen is found out within ``timeout`` seconds.

    Raises:
        PreflightError: no client can be made for this URI, or its SQLite file cannot be written.
        ConnectionError: the server does not listen (it may later).
    """
    _check_listening(uri, timeout)
    client_class = _import_client()
    try:
        with _first_use_lock(uri):
            return client_class(tracking_uri=uri, registry_uri=uri)
    except OSError as error:
        raise PreflightError(Problem("tracking.uri", f"cannot be used: {error}", redact(uri))) from error
    except Exception as error:
        if _is_refusal(error):
            raise PreflightError(
                Problem("tracking.uri", f"MLflow cannot use it: {_first_line(error)}", redact(uri), _URI_HINT)
            ) from error
        raise


_URI_HINT = "use http(s)://host:port, sqlite:////absolute/path.db, or leave it out"


def _import_client() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        chatty = logging.getLogger(name)
        if chatty.level == logging.NOTSET:
            chatty.setLevel(logging.ERROR if name.startswith("urllib3") else logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient


def _check_listening(uri: str, timeout: float) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    if not parts.hostname:
        raise PreflightError(Problem("tracking.uri", "has no host name", redact(uri), _URI_HINT))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if os.environ.get("HTTP_PROXY" if parts.scheme == "http" else "HTTPS_PROXY"):
        return  # a proxy stands between: only a request can tell
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {redact(uri)}: {error}") from error


@contextlib.contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """One process at a time makes the tables of a new SQLite file: MLflow's migrations do not bear company."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def is_permanent(error: BaseException) -> bool:
    """Whether the tracker understood the request and refused it: sending it again cannot help."""
    if isinstance(error, (PermanentTrackingError, PreflightError)):
        return True
    return _is_refusal(error)


def _is_refusal(error: BaseException) -> bool:
    code = getattr(error, "error_code", None)
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def experiment_id(client: MlflowClient, name: str, root: str | None) -> str:
    """The id of the experiment, made if there is none; two processes may ask at once.

    Raises:
        PermanentTrackingError: an experiment of this name was deleted and still occupies it.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # Else MLflow's pages open on an empty overview of language model calls instead of on the runs.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=root, tags=tags))
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise PermanentTrackingError(
            f"the MLflow experiment {name!r} was deleted: restore it, or choose another (tracking.experiment)"
        )
    return str(found.experiment_id)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with string values, as MLflow's params want them."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = str(value)
    return flat
