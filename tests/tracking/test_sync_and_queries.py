"""`runs sync`, list, show and the UI's plan, on a real SQLite store."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from glowflow.config.errors import RunError
from glowflow.tracking.base import Point
from glowflow.tracking.client import connect
from glowflow.tracking.jsonl import JsonlTracker
from glowflow.tracking.mlflow import create_run
from glowflow.tracking.queries import list_runs, show_run
from glowflow.tracking.runrecord import RunRecord
from glowflow.tracking.sender import send_points
from glowflow.tracking.spool import read_points
from glowflow.tracking.sync import sync
from glowflow.tracking.tables import format_run, format_runs
from glowflow.tracking.ui import free_port, ui_plan


def train(storage: Path, name: str, *, steps: int = 30, lr: float = 1e-3, status: str = "FINISHED") -> Path:
    """A run directory as a training without MLflow leaves it."""
    run_dir = storage / name
    run_dir.mkdir()
    tracker = JsonlTracker(run_dir)
    tracker.log_points([Point("train_loss", step, 5 / (step + 1), 1000 + step) for step in range(steps)])
    tracker.log_points([Point("val_loss", steps, 2.5, 9000)])
    tracker.log_checkpoint(steps, run_dir, {"val_loss": 2.5})
    tracker.finish("FINISHED")
    tracker.close()
    RunRecord(
        name,
        status=status,  # type: ignore[arg-type]
        config={"training": {"lr": lr, "max_steps": steps}, "model": {"dim": 8}},
        final={"train_loss": 5 / steps, "val_loss": 2.5},
        best={"val_loss": 2.5},
        steps=steps,
        started=f"2030-01-01T00:00:0{steps % 10}.000+00:00",
        ended="2030-01-01T00:01:00.000+00:00",
        seconds=60.0,
        fingerprints={"config": "c" * 64},
    ).save(run_dir)
    return run_dir


def test_sync_makes_the_run_that_could_not_be_made_and_sends_everything_once(storage: Path, uri: str, history) -> None:
    run_dir = train(storage, "one")
    # The tracker was down at the start: the wish for a run is noted, nothing else.
    assert create_run(run_dir, name="one", config={}, uri="http://127.0.0.1:9", tags={"a": "b"}) is None
    report = sync(run_dir, uri=uri)
    assert (report.sent, report.already, report.missing, report.checkpoints_sent) == (31, 0, 0, 1)
    record = RunRecord.load(run_dir)
    assert record.mlflow_run_id == report.mlflow_run_id and record.mlflow_uri == uri
    run = connect(uri).get_run(report.mlflow_run_id)
    assert run.info.status == "FINISHED" and run.data.tags["a"] == "b"
    assert run.info.end_time == record.ended_ms()
    again = sync(run_dir)
    assert (again.sent, again.already, again.missing, again.checkpoints_sent) == (0, 31, 0, 0)
    assert history(uri, report.mlflow_run_id, "train_loss") == [(step, 5 / (step + 1)) for step in range(30)]


def test_sync_sends_only_the_steps_that_lack_even_if_values_there_differ(storage: Path, uri: str, history) -> None:
    run_dir = train(storage, "one")
    run_id = create_run(run_dir, name="one", config={}, uri=uri)
    assert run_id is not None
    points = read_points(run_dir / "metrics.jsonl")
    odd = [p._replace(timestamp_ms=1) for p in points if p.metric == "train_loss" and p.step % 2]
    send_points(connect(uri), run_id, odd)
    report = sync(run_dir)
    assert (report.sent, report.already) == (16, 15)
    assert [step for step, _ in history(uri, run_id, "train_loss")] == list(range(30))


def test_sync_of_a_run_without_mlflow_uses_the_storage(storage: Path, uri: str) -> None:
    report = sync(train(storage, "one"))
    assert connect(uri).get_run(report.mlflow_run_id).data.params["training.lr"] == "0.001"


def test_sync_finds_the_store_of_a_storage_that_was_moved(storage: Path, uri: str) -> None:
    report = sync(train(storage, "one"))
    moved = storage.rename(storage.parent / "elsewhere")
    again = sync(moved / "one")
    assert (again.mlflow_run_id, again.sent, again.already) == (report.mlflow_run_id, 0, 31)
    assert not storage.exists()


def test_sync_closes_a_dead_run_and_leaves_a_live_one_running(storage: Path, uri: str) -> None:
    live = train(storage, "live", status="RUNNING")
    dead = train(storage, "dead", status="RUNNING")
    record = RunRecord.load(dead)
    record.process["started"] = "1"
    record.save(dead)
    assert connect(uri).get_run(sync(live).mlflow_run_id).info.status == "RUNNING"
    assert connect(uri).get_run(sync(dead).mlflow_run_id).info.status == "KILLED"


def test_sync_with_a_tracker_that_is_down_or_no_run_is_an_error(storage: Path) -> None:
    run_dir = train(storage, "one")
    with pytest.raises(RunError, match="nothing is lost"):
        sync(run_dir, uri="http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"run\.json"):
        sync(storage / "none")


def test_list_merges_mlflow_and_directories(storage: Path, uri: str) -> None:
    tracked, alone = train(storage, "tracked", steps=21), train(storage, "alone", steps=22)
    sync(tracked)
    client = connect(uri)
    (other,) = {run.info.experiment_id for run in client.search_runs(["1"])}
    elsewhere = client.create_run(other, run_name="elsewhere", tags={"glowflow.token": "x"}, start_time=0)
    client.create_run(other, run_name="not-ours")
    rows = {row["run"]: row for row in list_runs(storage)}
    assert rows.keys() == {"tracked", "alone", "elsewhere"}
    assert rows["tracked"]["source"] == "mlflow" and rows["alone"]["source"] == "directory"
    assert rows["elsewhere"]["directory"] is None and rows["elsewhere"]["mlflow_run_id"] == elsewhere.info.run_id
    assert rows["alone"]["directory"] == str(alone) and rows["alone"]["val_loss"] == 2.5
    assert [row["run"] for row in list_runs(storage)] == ["alone", "tracked", "elsewhere"]  # newest first
    table = format_runs(list_runs(storage))
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["alone", "tracked", "elsewhere"]
    json.dumps(list_runs(storage))


def test_list_without_a_tracker_reads_directories_and_makes_no_store(tmp_path: Path) -> None:
    train(tmp_path, "one", status="RUNNING")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    rows = list_runs(tmp_path)
    assert [row["run"] for row in rows] == ["one"] and rows[0]["status"] == "RUNNING"
    assert [row["run"] for row in list_runs(tmp_path, uri="http://127.0.0.1:9")] == ["one"]
    assert not (tmp_path / "mlflow.db").exists()
    assert list_runs(tmp_path, experiment="other") == [] and list_runs(tmp_path / "empty") == []
    assert format_runs([]) == "no runs"


def test_show_repeats_run_json(storage: Path, uri: str) -> None:
    run_dir = train(storage, "one")
    report = sync(run_dir)
    shown = show_run(storage, "one")
    written = json.loads((run_dir / "run.json").read_text())
    assert written.items() <= shown.items()
    view = show_run(storage, "one", use_mlflow=True)["mlflow"]
    assert view["status"] == "FINISHED" and view["metrics"]["val_loss"] == 2.5
    assert report.mlflow_run_id in format_run(shown) and "final.val_loss" in format_run(shown)
    with pytest.raises(RunError, match="did you mean 'one'"):
        show_run(storage, "onee")


def test_ui_is_planned_on_loopback_with_the_right_store(storage: Path, uri: str, tmp_path: Path) -> None:
    plan = ui_plan(storage)
    assert plan.command is not None and plan.command[plan.command.index("--host") + 1] == "127.0.0.1"
    assert plan.environment["MLFLOW_BACKEND_STORE_URI"] == uri and str(uri) not in plan.command
    assert plan.command[plan.command.index("--port") + 1] == plan.url.rsplit(":", 1)[1]
    assert ui_plan(storage, uri="http://me:pw@there:1").url == "http://me:***@there:1"
    assert ui_plan(storage, uri="http://there:1").command is None
    with pytest.raises(RunError, match="no MLflow store"):
        ui_plan(tmp_path / "nothing")


def test_a_taken_port_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) not in (port, 0)
