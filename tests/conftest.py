"""What all tests share: an environment that is quiet, quick and private, set before anything imports Ray or MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Ray reads these when it is imported, so they stand here and not in a fixture.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # else ray.init() writes a token into the home directory
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often the controller polls: 2 s by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",  # two busy cores start workers slowly
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# A developer's own cluster or tracking server must see nothing of the tests.
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
    os.environ.pop(_name, None)

settings.register_profile(
    "glowflow", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "glowflow"))

REPOSITORY = Path(__file__).resolve().parent.parent


_WITHOUT_RAY = (
    "test_base_config.py",
    "test_custom_architecture.py",
    "test_sweep_tracking_server.py",
    "test_tracking_server.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: it takes longest, and with ``pytest -n 2`` the rest fills the other worker."""
    items.sort(key=lambda item: "journeys" not in item.path.parts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All that starts Ray in one worker, one after another; of the rest each file in one, for its fixtures' sake."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(nodeid).partition("::")[0]
            with_ray = "/journeys/" in file and Path(file).name not in _WITHOUT_RAY
            return "ray" if with_ray else file

    return ByRoom(config, log)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def glowflow_data() -> Path:
    """The folder of real data sets that GLOWFLOW_DATA names; tests that need one are skipped without it."""
    value = os.environ.get("GLOWFLOW_DATA")
    if not value:
        pytest.skip("GLOWFLOW_DATA is not set: it names the folder that holds wikitext-2, tinyshakespeare, ...")
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        pytest.skip(f"GLOWFLOW_DATA is not a directory: {path}")
    return path
