"""A SQLite store whose tables exist already: making them takes MLflow seconds, so it is done once and copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glowflow.tracking.client import connect, default_uri


@pytest.fixture(autouse=True)
def _no_foreign_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty-store")
    connect(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path, empty_store: Path) -> Path:
    """A storage directory with an empty MLflow store."""
    folder = tmp_path / "runs of mine"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def uri(storage: Path) -> str:
    return default_uri(storage)


@pytest.fixture
def history() -> Callable[..., list[tuple[int, float]]]:
    """All rows of a metric in a store, as (step, value) in the order of steps."""

    def read(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
        rows: list[Any] = connect(uri).get_metric_history(run_id, metric)
        return sorted((row.step, row.value) for row in rows)

    return read
