"""Everything that can be known to fail is reported at once, and nothing is written."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import ConfigError, PreflightError
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.orchestration import cluster
from glowflow.orchestration.preflight import preflight, resolve_accelerator


@pytest.fixture(autouse=True)
def _two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(cluster, "logical_cpus", lambda: 2)


def config(storage: Path, **overrides: Any) -> GlowFlowConfig:
    base = load_config({"tracking": {"storage": str(storage)}, "resources": {"accelerator": "cpu"}})
    return apply_overrides(base, {key.replace("__", "."): value for key, value in overrides.items()})


def problems(config: GlowFlowConfig, **options: Any) -> dict[str, str]:
    with pytest.raises(PreflightError) as caught:
        preflight(config, **{"local": False, **options})
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_sound_config_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert preflight(config(tmp_path / "a" / "b"), local=False) == []
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "file"
    file.write_text("")
    wrong = config(
        file / "runs",
        tracking__run="bad name/..",
        tracking__uri="file:///tmp/mlruns",
        training__batch_size=64,
        resources__workers=64,
        resources__accelerator="gpu",
    )
    found = problems(wrong)
    assert set(found) == {
        "tracking.storage",
        "tracking.run",
        "tracking.uri",
        "resources.workers",
        "resources.accelerator",
    }
    assert "Not a directory" in found["tracking.storage"]
    assert "64 workers need as many GPUs, this machine has none" in found["resources.accelerator"]
    assert "at most 4 workers" in found["resources.workers"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_local_runs_need_no_cpus_for_maps(tmp_path: Path) -> None:
    many = config(tmp_path, resources__workers=64, training__batch_size=64)
    assert preflight(many, local=True) == []


def test_the_name_of_an_existing_run_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    named = config(tmp_path, tracking__run="mine")
    assert "--resume mine" in problems(named)["tracking.run"]
    assert preflight(named, local=False, new_run=False) == []


@pytest.mark.parametrize(
    "uri", ["mlruns", "file:/tmp/x", "ftp://host/x", "sqlite://relative.db", "http://", "http:///path-only"]
)
def test_tracking_uris_that_can_never_work(tmp_path: Path, uri: str) -> None:
    assert set(problems(config(tmp_path, tracking__uri=uri))) == {"tracking.uri"}


def test_a_wrong_uri_from_the_environment_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://user:secret@host")
    found = problems(config(tmp_path))
    assert set(found) == {"MLFLOW_TRACKING_URI"}
    assert "secret" not in found["MLFLOW_TRACKING_URI"]
    assert preflight(config(tmp_path, tracking__backend="jsonl"), local=False) == []


def test_an_address_where_no_cluster_answers_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = problems(config(tmp_path, resources__address=address))
    assert "no Ray cluster answers there" in found["resources.address"]


def test_bf16_on_a_cpu_that_emulates_it_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glowflow.training.precision.cpu_has_native_bf16", lambda: False)
    (warning,) = preflight(config(tmp_path, training__precision="bf16"), local=True)
    assert "training.precision" in warning and "emulated" in warning


def test_auto_takes_a_gpu_only_where_every_worker_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for workers, expected in [(1, "gpu"), (2, "gpu"), (4, "cpu")]:
        asked = config(tmp_path, resources__accelerator="auto", resources__workers=workers, training__batch_size=8)
        assert resolve_accelerator(asked, joined=False) == expected
    assert resolve_accelerator(config(tmp_path), joined=False) == "cpu"


def test_weights_of_an_encoder_must_be_there_when_a_run_starts(tmp_path: Path) -> None:
    model = {"model.arch": "multimodal", "model.image": {"checkpoint": "nowhere.pt"}}
    wanted = apply_overrides(config(tmp_path / "runs"), model)
    found = problems(wanted)
    assert (
        set(found) == {"model.image.checkpoint"}
        and str(Path("nowhere.pt").absolute()) in found["model.image.checkpoint"]
    )
    assert preflight(wanted, local=True, new_run=False) is not None, "a run that goes on has them"


def test_the_worst_checkpoint_is_not_kept_as_the_best(tmp_path: Path) -> None:
    model = {"model.arch": "multimodal", "model.image": {}, "model.task": "classification"}
    wanted = apply_overrides(config(tmp_path / "runs"), {**model, "training.monitor_metrics": ["val_accuracy"]})
    with pytest.raises(ConfigError, match="must be max for val_accuracy"):
        preflight(wanted, local=True)
