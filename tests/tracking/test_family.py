"""A sweep as one family in a real SQLite store: resumed, killed, closed late, brought level, and read again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import PreflightError, RunError
from glowflow.tracking.base import Point
from glowflow.tracking.client import connect, default_uri
from glowflow.tracking.curves import SUMMARY_TAG, parse_summary
from glowflow.tracking.family import SweepTracking, history_from_mlflow, open_sweep_tracking, sync_sweep
from glowflow.tracking.jsonl import JsonlTracker
from glowflow.tracking.queries import list_runs
from glowflow.tracking.request import RunRequest, change_request
from glowflow.tracking.runrecord import RunRecord
from glowflow.tracking.sync import sync

CONFIG: dict[str, Any] = {
    "model": {"dim": 8},
    "data": {"context": 16},
    "training": {"lr": 1e-3, "batch_size": 4, "seed": 0},
    "tracking": {"experiment": "family"},
}
SPACE = {"space": {"training.lr": {"loguniform": [1e-4, 1e-2]}}, "trials": 4}
NOWHERE = "http://127.0.0.1:9"


def loss(step: int) -> float:
    return 5 / (step + 1)


def open_sweep(storage: Path, uri: str, name: str = "lr") -> SweepTracking:
    sweep_dir = storage / name
    sweep_dir.mkdir(exist_ok=True)
    (sweep_dir / "journal.jsonl").touch()
    tags = {"team": "blue", "empty": None}
    return open_sweep_tracking(
        sweep_dir, name=name, uri=uri, experiment="family", config=CONFIG, space=SPACE, tags=tags
    )


def open_trial(tracking: SweepTracking, name: str, lr: float = 1e-3, **tags: object) -> Path:
    run_dir = tracking.sweep_dir / name
    config = {**CONFIG, "training": {**CONFIG["training"], "lr": lr}}
    about = {"glowflow.sweep.trial": name, **tags}
    run_name = f"{tracking.sweep_dir.name}/{name}"
    tracking.open_trial(run_dir, name=run_name, config=config, tags=about, config_yaml="training: {}\n")
    return run_dir


def train(run_dir: Path, start: int, stop: int, status: str | None = "FINISHED", lr: float = 1e-3) -> None:
    """What the process of a trial writes."""
    tracker = JsonlTracker(run_dir)
    tracker.log_points([Point("train_loss", step, loss(step), 1000 + step + start) for step in range(start, stop)])
    tracker.log_points([Point("val_loss", stop, 2 * lr, 9000), Point("tokens", stop, 64.0 * stop, 9000)])
    tracker.log_checkpoint(stop, run_dir, {"val_loss": 2 * lr})
    tracker.close()
    config = {**CONFIG, "training": {**CONFIG["training"], "lr": lr}}
    record = RunRecord(run_dir.name, config=config, steps=stop, started="2030-01-01T00:00:00.000+00:00")
    record.status = status or "RUNNING"  # type: ignore[assignment]
    record.save(run_dir)


def family(uri: str) -> tuple[list[Any], list[Any]]:
    """Parents and children in the experiment."""
    client = connect(uri)
    runs = list(client.search_runs([client.get_experiment_by_name("family").experiment_id]))
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in runs if run not in children]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} <= {run.info.run_id for run in parents}
    return parents, sorted(children, key=lambda run: run.info.run_name)


def threads() -> int:
    return sum(thread.name == "glowflow-mlflow" for thread in threading.enumerate())


def test_one_parent_and_a_child_per_trial_with_all_that_was_said_of_them(storage: Path, uri: str, history) -> None:
    tracking = open_sweep(storage, uri)
    for number in range(4):
        run_dir = open_trial(tracking, f"{number:03d}", lr=1e-3 * (number + 1), rung=0)
        train(run_dir, 0, 20, lr=1e-3 * (number + 1))
        tracking.tag_trial(run_dir, {"rung": 1})
        tracking.tag_trial(run_dir, {"glowflow.sweep.status": "STOPPED" if number == 3 else "FINISHED"})
        assert tracking.close_trial(run_dir, "STOPPED" if number == 3 else "FINISHED")
    report = storage / "lr" / "report"
    report.mkdir()
    (report / "report.md").write_text("# lr\n")
    tracking.log_artifacts(report)
    tracking.log_sweep_metrics({"best_val_loss": 2e-3})
    tracking.log_sweep_metrics({"best_val_loss": 1e-3})
    tracking.tag({"best": "000"})
    assert tracking.close("FINISHED") and tracking.close("FINISHED")
    (parent,), children = family(uri)
    assert parent.info.run_id == tracking.run_id and parent.info.status == "FINISHED"
    assert parent.data.params["space.space.training.lr.loguniform"] == "[0.0001, 0.01]"
    assert parent.data.tags["team"] == "blue" and parent.data.tags["best"] == "000" and "empty" not in parent.data.tags
    assert history(uri, tracking.run_id, "best_val_loss") == [(0, 2e-3), (1, 1e-3)]
    artifacts = storage / "mlartifacts" / parent.info.run_id / "artifacts"
    assert (artifacts / "report" / "report.md").read_text() == "# lr\n"
    assert "dim: 8" in (artifacts / "config.yaml").read_text()
    assert [run.info.run_name for run in children] == ["000", "001", "002", "003"]
    assert [run.info.status for run in children] == ["FINISHED"] * 3 + ["KILLED"]
    assert all(run.data.tags["rung"] == "1" and run.data.tags["glowflow.sweep.name"] == "lr" for run in children)
    assert [run.data.params["training.lr"] for run in children] == ["0.001", "0.002", "0.003", "0.004"]
    for run in children:
        assert history(uri, run.info.run_id, "train_loss") == [(step, loss(step)) for step in range(20)]
    summary = parse_summary(children[0].data.tags[SUMMARY_TAG])["train_loss"]
    assert (summary.last.step, summary.best("min").step, summary.best("max").step) == (19, 19, 0)
    assert not summary.whole and summary.best("max").value == 5.0


DRIVER = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from glowflow.tracking.client import default_uri
    from tests.tracking.test_family import open_sweep, open_trial, train

    storage = Path(sys.argv[1])
    tracking = open_sweep(storage, default_uri(storage))
    for name, stop, status in (("000", 20, "FINISHED"), ("001", 30, None), ("002", 20, "FINISHED")):
        train(open_trial(tracking, name, glow="first"), 0, stop, status)
        if name == "000":
            tracking.close_trial(storage / "lr" / name, "FINISHED")
    time.sleep(3)  # the followers send
    os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_a_driver_that_was_killed_is_followed_by_another_and_each_step_is_there_once(
    storage: Path, uri: str, history, repository: Path
) -> None:
    command = [sys.executable, "-c", DRIVER, str(storage)]
    assert subprocess.run(command, timeout=180, cwd=repository).returncode == -9
    parents, children = family(uri)
    assert [run.info.status for run in [*parents, *children]] == ["RUNNING", "FINISHED", "RUNNING", "RUNNING"]
    before = {run.info.run_name: run.info.run_id for run in children}
    tracking = open_sweep(storage, uri)
    # 001 was at step 30 and goes on from its checkpoint at 10; 002 had ended, but nobody could say so; 003 is new.
    train(open_trial(tracking, "001", glow="second"), 10, 40)
    tracking.close_trial(storage / "lr" / "001", "FINISHED")
    train(open_trial(tracking, "003"), 0, 20)
    tracking.close_trial(storage / "lr" / "003", "FINISHED")
    assert tracking.close("FINISHED")
    (parent,), children = family(uri)
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"} and len(children) == 4
    assert {run.info.run_name: run.info.run_id for run in children}.items() >= before.items()
    assert children[1].data.tags["glow"] == "second"
    for run, stop in zip(children, (20, 40, 20, 20), strict=True):
        assert history(uri, run.info.run_id, "train_loss") == [(step, loss(step)) for step in range(stop)]


def test_a_tracker_that_is_away_holds_nobody_up_and_sync_makes_up_for_all(storage: Path, uri: str, caplog) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracking = open_sweep(storage, NOWHERE)
        assert tracking.run_id is None
        for number in range(20):
            run_dir = open_trial(tracking, f"{number:03d}")
            train(run_dir, 0, 5)
            tracking.tag_trial(run_dir, {"why": "budget"})
            assert not tracking.close_trial(run_dir, "FINISHED")
        report = storage / "lr" / "report"
        report.mkdir()
        (report / "a.txt").touch()
        tracking.log_artifacts(report)
        tracking.log_sweep_metrics({"best": 1.0})
        assert not tracking.close("FINISHED")
    assert time.monotonic() - began < 20
    assert threads() == 0
    assert caplog.text.count("does not answer") == 1 and caplog.text.count("glowflow runs sync lr") == 1
    reports = sync_sweep(storage / "lr", uri=uri)
    assert [report.run for report in reports] == ["lr", *(f"lr/{number:03d}" for number in range(20))]
    assert all(report.missing == 0 for report in reports) and reports[1].sent == 7
    (parent,), children = family(uri)
    assert Counter(run.info.status for run in [parent, *children]) == {"FINISHED": 21}
    assert all(run.data.tags["why"] == "budget" for run in children)
    assert (storage / "mlartifacts" / parent.info.run_id / "artifacts" / "report" / "a.txt").exists()
    assert [report.sent for report in sync_sweep(storage / "lr")] == [0] * 21


def test_a_child_whose_parent_could_only_be_made_later_gets_it(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, NOWHERE)
    run_dir = open_trial(tracking, "000")
    train(run_dir, 0, 5)
    tracking.close_trial(run_dir, "FINISHED")
    tracking.close("FINISHED")
    sync(run_dir, uri=uri)  # the child alone: it needs its parent
    (parent,), (child,) = family(uri)
    assert parent.info.run_name == "lr" and child.info.run_name == "000"
    sync_sweep(storage / "lr", uri=uri)
    assert [len(runs) for runs in family(uri)] == [1, 1]


def test_sync_leaves_a_live_sweep_running_and_kills_a_dead_one(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, uri)
    train(open_trial(tracking, "000"), 0, 5, status=None)
    open_trial(tracking, "001")  # asked for, never began
    sync_sweep(storage / "lr")
    parents, children = family(uri)
    assert {run.info.status for run in [*parents, *children]} == {"RUNNING"}
    tracking.close_trial(storage / "lr" / "000", "FINISHED")
    tracking._parent.close()  # what a kill does to its threads
    for follower in tracking._trials.values():
        follower.close()
    gone = {"host": "elsewhere", "pid": 1, "started": "1"}
    for folder in (storage / "lr", storage / "lr" / "001"):
        change_request(folder, lambda r: RunRequest(**{**vars(r), "process": gone}))
        (folder / ".heartbeat").unlink(missing_ok=True)
    sync_sweep(storage / "lr")
    (parent,), children = family(uri)
    assert parent.info.status == "KILLED" and [run.info.status for run in children] == ["FINISHED", "KILLED"]


def test_a_trial_that_was_not_closed_is_killed_with_the_sweep_and_may_go_on(storage: Path, uri: str, history) -> None:
    tracking = open_sweep(storage, uri)
    run_dir = open_trial(tracking, "000")
    train(run_dir, 0, 5, status=None)
    assert tracking.close("KILLED")
    parents, children = family(uri)
    assert [run.info.status for run in [*parents, *children]] == ["KILLED", "KILLED"]
    tracking = open_sweep(storage, uri)
    open_trial(tracking, "000")
    parents, children = family(uri)
    assert [run.info.status for run in [*parents, *children]] == ["RUNNING", "RUNNING"]
    train(run_dir, 3, 9)
    assert tracking.close_trial(run_dir, "FINISHED")
    tracking.tag_trial(run_dir, {"late": "yes"})
    assert tracking.close("FINISHED")
    _, (child,) = family(uri)
    assert child.data.tags["late"] == "yes" and child.info.status == "FINISHED"
    assert history(uri, child.info.run_id, "train_loss") == [(step, loss(step)) for step in range(9)]


def test_threads_end_with_their_trials_and_one_writes_at_a_time(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, uri)
    assert threads() == 1
    run_dirs = [open_trial(tracking, f"{number:03d}") for number in range(6)]
    assert threads() == 7
    for run_dir in run_dirs:
        train(run_dir, 0, 50)
    with pytest.MonkeyPatch.context() as patch:
        inside: list[int] = []
        together: list[int] = []
        patch.setattr("glowflow.tracking.follower.send_points", _watched(inside, together))
        closers = [threading.Thread(target=tracking.close_trial, args=(run_dir, "FINISHED")) for run_dir in run_dirs]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
    assert threads() == 1 and together and max(together) == 1
    assert tracking.close("FINISHED") and threads() == 0
    _, children = family(uri)
    assert [run.info.status for run in children] == ["FINISHED"] * 6


def _watched(inside: list[int], together: list[int]) -> Any:
    from glowflow.tracking.sender import send_points

    def send(*args: Any) -> int:
        inside.append(1)
        together.append(len(inside))
        try:
            return send_points(*args)
        finally:
            inside.pop()

    return send


def test_a_uri_that_can_never_work_is_refused_before_anything_starts(storage: Path) -> None:
    with pytest.raises(PreflightError, match=r"tracking\.uri"):
        open_sweep(storage, "foo://x")
    assert not (storage / "lr" / ".mlflow.json").exists()


def test_artifacts_that_cannot_be_sent_hold_nothing_else_up(storage: Path, uri: str, caplog) -> None:
    tracking = open_sweep(storage, uri)
    (storage / "mlartifacts").mkdir(exist_ok=True)
    run_id = tracking.run_id
    assert run_id is not None
    artifacts = storage / "mlartifacts" / run_id / "artifacts"
    (artifacts / "report").write_text("a file where a folder must go")
    (storage / "lr" / "report").mkdir()
    (storage / "lr" / "report" / "a.txt").touch()
    tracking.log_artifacts(storage / "lr" / "report")
    tracking.log_artifacts(storage / "lr" / "nothing")
    tracking.close("FINISHED")
    assert "stay in" in caplog.text and "there is no" in caplog.text
    (parent,), _ = family(uri)
    assert parent.info.status == "FINISHED"
    (artifacts / "report").unlink()
    sync_sweep(storage / "lr")
    assert (artifacts / "report" / "a.txt").exists()


def test_sync_makes_a_family_of_a_sweep_that_ran_without_mlflow(storage: Path, uri: str) -> None:
    sweep_dir = storage / "alone"
    sweep_dir.mkdir()
    about = {"event": "sweep", "name": "alone", "config": CONFIG, "space": SPACE}
    (sweep_dir / "journal.jsonl").write_text(json.dumps(about) + "\n")
    for name in ("000", "001"):
        (sweep_dir / name).mkdir()
        train(sweep_dir / name, 0, 5)
    sync_sweep(sweep_dir)
    parents, children = family(uri)
    assert [run.info.run_name for run in [*parents, *children]] == ["alone", "000", "001"]
    assert not list(sweep_dir.glob("*.db"))
    (storage / "broken").mkdir()
    (storage / "broken" / "journal.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="no sweep"):
        sync_sweep(storage / "broken")


def test_a_sweep_whose_storage_was_moved_is_known_in_its_store(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, uri)
    run_dir = open_trial(tracking, "000")
    train(run_dir, 0, 5)
    tracking.close_trial(run_dir, "FINISHED")
    tracking.close("FINISHED")
    moved = storage.rename(storage.parent / "elsewhere")
    assert [report.sent for report in sync_sweep(moved / "lr")] == [0, 0]
    assert [len(runs) for runs in family(default_uri(moved))] == [1, 1]
    assert not storage.exists()


def test_list_shows_trials_by_sweep_and_status_and_no_parents(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, uri)
    for name, status in (("000", "FINISHED"), ("001", "KILLED"), ("002", "FAILED")):
        run_dir = open_trial(tracking, name)
        train(run_dir, 0, 5, status)
        tracking.tag_trial(run_dir, {"glowflow.sweep.status": "STOPPED" if name == "001" else status})
        tracking.close_trial(run_dir, status)
    tracking.close("FINISHED")
    (storage / "single").mkdir()
    train(storage / "single", 0, 5)
    for rows in (list_runs(storage), list_runs(storage, use_mlflow=False)):
        statuses = {row["run"]: row["status"] for row in rows}
        assert statuses == {"lr/000": "FINISHED", "lr/001": "STOPPED", "lr/002": "FAILED", "single": "FINISHED"}
    elsewhere = list_runs(storage.parent / "nothing", uri=uri)
    assert {(row["run"], row["status"], row["sweep"], row["steps"]) for row in elsewhere} == {
        ("lr/000", "FINISHED", "lr", 5),
        ("lr/001", "STOPPED", "lr", 5),
        ("lr/002", "FAILED", "lr", 5),
    }
    assert {row["run"] for row in list_runs(storage, sweep="lr")} == {"lr/000", "lr/001", "lr/002"}
    assert [row["run"] for row in list_runs(storage, statuses=["FAILED"])] == ["lr/002"]
    assert len(list_runs(storage, limit=2)) == 2


def test_history_gives_finished_runs_of_the_same_family(storage: Path, uri: str) -> None:
    tracking = open_sweep(storage, uri)
    for name, lr, status in (("000", 1e-3, "FINISHED"), ("001", 3e-3, "FINISHED"), ("002", 5e-3, "STOPPED")):
        run_dir = open_trial(tracking, name, lr=lr)
        train(run_dir, 0, 5, lr=lr)
        tracking.close_trial(run_dir, status)
    tracking.close("FINISHED")
    keys, metrics = ["training.lr"], ["val_loss"]
    found = history_from_mlflow(uri, "family", keys, {"model.dim": 8, "training.batch_size": 4}, metrics)
    assert sorted(found, key=str) == [({"training.lr": 1e-3}, [2e-3]), ({"training.lr": 3e-3}, [6e-3])]
    assert history_from_mlflow(uri, "family", keys, {"model.dim": 16}, metrics) == []
    assert history_from_mlflow(uri, "family", [*keys, "model.depth"], {}, metrics) == []
    assert history_from_mlflow(uri, "family", keys, {}, ["perplexity"]) == []
    with pytest.raises(RunError, match="did you mean 'family'"):
        history_from_mlflow(uri, "familly", keys, {}, metrics)
    with pytest.raises(RunError, match="does not answer"):
        history_from_mlflow(NOWHERE, "family", keys, {}, metrics)
