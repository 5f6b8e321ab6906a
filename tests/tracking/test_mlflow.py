"""MLflow on a real SQLite store: what arrives, what arrives once, and what happens when it cannot."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glowflow.config.errors import PreflightError
from glowflow.tracking.base import Point
from glowflow.tracking.client import connect, default_uri, redact
from glowflow.tracking.jsonl import JsonlTracker
from glowflow.tracking.mlflow import DatasetRef, MlflowFollower, MlflowTracker, create_run
from glowflow.tracking.request import RunRequest
from glowflow.tracking.spool import read_points

CONFIG = {"model": {"arch": "transformer", "dim": 8}, "training": {"lr": 3e-4, "tags": {}}, "long": "x" * 9000}


def points(start: int, stop: int, metric: str = "train_loss") -> list[Point]:
    return [Point(metric, step, 1 / (step + 1), 1000 + step) for step in range(start, stop)]


def make(storage: Path, uri: str, name: str = "one") -> tuple[Path, str]:
    run_dir = storage / name
    run_dir.mkdir(exist_ok=True)
    run_id = create_run(
        run_dir,
        name=name,
        config=CONFIG,
        uri=uri,
        tags={"glowflow.code": "abc", "team": "blue", "empty": None},
        datasets=[DatasetRef("stdlib", "f" * 64, "/data/stdlib")],
        config_yaml="model: {dim: 8}\n",
    )
    assert run_id is not None
    return run_dir, run_id


def test_create_run_writes_params_tags_data_set_and_config(storage: Path, uri: str) -> None:
    _, run_id = make(storage, uri)
    client = connect(uri)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.info.run_name == "one"
    assert run.data.params["model.dim"] == "8" and run.data.params["training.lr"] == "0.0003"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["team"] == "blue" and "empty" not in run.data.tags
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == "f" * 36
    assert {tag.key: tag.value for tag in data.tags}["fingerprint"] == "f" * 64
    assert (storage / "mlartifacts" / run_id / "artifacts" / "config.yaml").read_text() == "model: {dim: 8}\n"


def test_create_run_again_takes_up_the_same_run(storage: Path, uri: str) -> None:
    run_dir, run_id = make(storage, uri)
    connect(uri).set_terminated(run_id, "KILLED")
    assert make(storage, uri) == (run_dir, run_id)
    assert connect(uri).get_run(run_id).info.status == "RUNNING"


def test_a_lost_answer_does_not_make_a_second_run(storage: Path, uri: str) -> None:
    run_dir, run_id = make(storage, uri)
    request = RunRequest.load(run_dir)
    assert request is not None
    RunRequest(**{**vars(request), "run_id": None, "experiment_id": None}).save(run_dir)  # died before it was noted
    assert make(storage, uri)[1] == run_id


def test_points_arrive_exactly_and_replay_adds_no_row(storage: Path, uri: str, history) -> None:
    run_dir, run_id = make(storage, uri)
    tracker = MlflowTracker(uri, run_id, run_dir, interval=0.05)
    tracker.log_points(points(0, 60))
    tracker.log_points([Point("grad_norm", 3, math.nan, 5)])
    time.sleep(0.3)
    tracker.close()  # the process dies at step 60; its checkpoint was at step 25
    tracker = MlflowTracker(uri, run_id, run_dir, interval=0.05)
    tracker.log_points([Point(p.metric, p.step, p.value, p.timestamp_ms + 9999) for p in points(25, 80)])
    tracker.finish("FINISHED")
    tracker.close()
    assert history(uri, run_id, "train_loss") == [(step, 1 / (step + 1)) for step in range(80)]
    assert math.isnan(history(uri, run_id, "grad_norm")[0][1])
    run = connect(uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.end_time is not None


def test_a_lost_hint_makes_it_send_again_without_new_rows(storage: Path, uri: str, history) -> None:
    run_dir, run_id = make(storage, uri)
    for _ in range(2):
        tracker = MlflowTracker(uri, run_id, run_dir, interval=0.05)
        tracker.log_points(points(0, 1500))
        tracker.finish("FINISHED")
        tracker.close()
        (run_dir / ".mlflow-sent.json").unlink()
    assert len(history(uri, run_id, "train_loss")) == 1500


def test_a_follower_sends_what_another_process_spools(storage: Path, uri: str, history) -> None:
    run_dir, run_id = make(storage, uri)
    follower = MlflowFollower(run_dir, interval=0.05)
    follower.start()
    code = (
        "import sys; from glowflow.tracking.jsonl import JsonlTracker; from glowflow.tracking.base import Point\n"
        "tracker = JsonlTracker(sys.argv[1])\n"
        "tracker.log_points([Point('train_loss', s, 1 / (s + 1), 1000 + s) for s in range(30)])\n"
        "tracker.log_checkpoint(30, sys.argv[1], {'val_loss': 2.0}); tracker.close()\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, timeout=60)
    assert follower.finish("FINISHED", timeout=20)
    assert history(uri, run_id, "train_loss") == [(step, 1 / (step + 1)) for step in range(30)]


def test_checkpoints_become_one_logged_model_each(storage: Path, uri: str) -> None:
    run_dir, run_id = make(storage, uri)
    for step in (10, 20):
        (run_dir / f"step-{step}").mkdir()
        (run_dir / f"step-{step}" / "COMPLETE.json").write_text("{}")
    for last in (20, 10):  # the second process repeats step 10
        tracker = MlflowTracker(uri, run_id, run_dir, interval=0.05)
        for step in (10, last):
            tracker.log_checkpoint(step, run_dir / f"step-{step}", {"val_loss": 2.0 / step})
        if last == 10:
            (run_dir / "step-10" / "COMPLETE.json").unlink()
            (run_dir / "step-10").rmdir()  # pruned
        tracker.finish("FINISHED")
        tracker.close()
    request = RunRequest.load(run_dir)
    assert request is not None and request.experiment_id is not None
    models = connect(uri).search_logged_models([request.experiment_id])
    assert sorted(model.name for model in models) == ["one-step-10", "one-step-20"]
    by_step = {model.tags["step"]: model for model in models}
    assert by_step["20"].params == {"val_loss": "0.1"} and by_step["20"].source_run_id == run_id
    assert by_step["20"].tags["path"] == str(run_dir / "step-20") and len(by_step["20"].tags["sha256"]) == 64
    assert by_step["10"].tags.get("pruned") == "true" and "pruned" not in by_step["20"].tags


def test_a_metric_that_mlflow_refuses_does_not_hold_up_the_others(storage: Path, uri: str, history, caplog) -> None:
    run_dir, run_id = make(storage, uri)
    tracker = MlflowTracker(uri, run_id, run_dir, interval=0.05)
    tracker.log_points([*points(0, 20), Point("odd name: 100%", 1, 1.0, 1), Point("", 1, 1.0, 1), *points(20, 40)])
    with caplog.at_level(logging.WARNING):
        tracker.finish("FINISHED")
    tracker.close()
    assert len(history(uri, run_id, "train_loss")) == 40
    assert history(uri, run_id, "odd name: 100_") == [(1, 1.0)]
    assert "refuses" in caplog.text


def test_a_deleted_run_ends_the_sending_and_nothing_else(storage: Path, uri: str, caplog) -> None:
    run_dir, run_id = make(storage, uri)
    connect(uri).delete_run(run_id)
    tracker = MlflowTracker(uri, run_id, run_dir, interval=0.02)
    tracker.log_points(points(0, 5))
    time.sleep(0.5)
    tracker.log_points(points(5, 10))
    tracker.finish("FINISHED")
    tracker.close()
    assert len(read_points(run_dir / "metrics.jsonl")) == 10
    assert caplog.text.count("was deleted") == 1


def test_a_server_that_is_down_neither_raises_nor_blocks(tmp_path: Path, caplog) -> None:
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    uri = "http://127.0.0.1:9"
    started = time.monotonic()
    assert create_run(run_dir, name="one", config=CONFIG, uri=uri) is None
    tracker = MlflowTracker(uri, None, run_dir, interval=0.02, finish_timeout=1.0)
    before = time.monotonic()
    for step in range(200):
        tracker.log_points(points(step, step + 1))
    assert time.monotonic() - before < 2.0
    tracker.log_checkpoint(200, run_dir, {})
    tracker.finish("FINISHED")
    tracker.close()
    assert time.monotonic() - started < 15.0
    assert len(read_points(run_dir / "metrics.jsonl")) == 200
    assert caplog.text.count("does not answer") == 2  # once by create_run, once by the thread
    tracker.log_points(points(300, 301))  # after the end: ignored, not an error
    assert len(read_points(run_dir / "metrics.jsonl")) == 200


@pytest.mark.parametrize("bad", ["foo://x", "file:///tmp/mlruns", "http://", "sqlite:////proc/none/mlflow.db"])
def test_a_uri_that_can_never_work_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(PreflightError, match=r"tracking\.uri"):
        create_run(tmp_path, name="one", config={}, uri=bad)
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_refused(storage: Path, uri: str) -> None:
    client = connect(uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(PreflightError, match="gone"):
        create_run(storage, name="one", config={}, uri=uri, experiment="gone")


def test_uri_comes_from_the_config_then_the_environment_then_the_storage(tmp_path: Path, monkeypatch) -> None:
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert default_uri("runs") == "http://there:5000"
    assert default_uri("runs", "sqlite:///mine.db") == f"sqlite:///{tmp_path}/mine.db"


def test_passwords_are_not_shown(storage: Path) -> None:
    assert redact("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert redact("http://host:5000") == "http://host:5000"
    run_dir = storage / "one"
    run_dir.mkdir()
    assert create_run(run_dir, name="one", config={}, uri="http://me:secret@127.0.0.1:9") is None
    assert (run_dir / ".mlflow.json").stat().st_mode & 0o077 == 0


def test_system_metrics_go_on_behind_the_last_step(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = JsonlTracker(tmp_path, system_metrics=True, system_interval=0.05)
        time.sleep(0.4)
        tracker.finish("FINISHED")
        tracker.close()
    cpu = [p for p in read_points(tmp_path / "metrics.jsonl") if p.metric == "system/cpu_percent"]
    memory = [p for p in read_points(tmp_path / "metrics.jsonl") if p.metric == "system/memory_used_mib"]
    assert [p.step for p in cpu] == list(range(len(cpu))) and len(cpu) >= 6
    assert all(100 < p.value < 1e8 for p in memory)
    raw = (tmp_path / "metrics.jsonl").read_text().count('"system/cpu_percent"')
    assert raw == len(cpu)


def test_importing_tracking_imports_no_mlflow() -> None:
    rooms = "mlflow, jsonl, spool, runrecord, queries, sync, ui, tables, versions"
    code = f"import sys; from glowflow.tracking import {rooms}\n"
    code += "assert not {'torch', 'ray', 'numpy', 'sqlalchemy'} & set(sys.modules)\n"
    code += "assert getattr(sys.modules.get('mlflow'), '__version__', None) is None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
