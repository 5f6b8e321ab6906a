"""A real MLflow server that dies, comes back, hangs; a run that is killed and resumed; the UI. No metric step twice."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from glowflow.tracking.base import Point
from glowflow.tracking.client import connect
from glowflow.tracking.mlflow import MlflowTracker, create_run, default_uri
from glowflow.tracking.queries import list_runs
from glowflow.tracking.runrecord import RunRecord
from glowflow.tracking.spool import curves, read_points
from glowflow.tracking.sync import sync
from glowflow.tracking.ui import free_port, ui_plan

pytestmark = pytest.mark.journey


def loss(step: int) -> float:
    return 5 / (step + 1)


def points(start: int, stop: int, timestamp_ms: int = 1000) -> list[Point]:
    return [Point("train_loss", step, loss(step), timestamp_ms + step) for step in range(start, stop)]


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Server:
    """``mlflow server`` on loopback, over a SQLite file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port(0)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            # Its own process group: the server has children, and only they must die with it.
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        while not answers(f"{self.uri}/health"):
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.3)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def up(server: Server) -> Server:
    """The server, started again if the test before killed it."""
    if server.process is None:
        server.start()
    return server


def history(uri: str, run_id: str, metric: str = "train_loss") -> list[tuple[int, float]]:
    return sorted((row.step, row.value) for row in connect(uri).get_metric_history(run_id, metric))


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


def begin(tmp_path: Path, uri: str) -> tuple[Path, str]:
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    RunRecord("one", config={"training": {"lr": 0.001}}).save(run_dir)
    run_id = create_run(run_dir, name="one", config={"training": {"lr": 0.001}}, uri=uri, config_yaml="training: {}\n")
    assert run_id is not None
    return run_dir, run_id


def end(run_dir: Path, status: str = "FINISHED") -> None:
    record = RunRecord.load(run_dir)
    record.status = status  # type: ignore[assignment]
    record.save(run_dir)


def test_resending_over_http_adds_no_row(up: Server, tmp_path: Path) -> None:
    run_dir, run_id = begin(tmp_path, up.uri)
    for _ in range(2):
        tracker = MlflowTracker(up.uri, run_id, run_dir, interval=0.05, finish_timeout=60)
        tracker.log_points([*points(0, 300), Point("grad_norm", 1, float("nan"), 5), Point("mfu", 1, float("inf"), 5)])
        tracker.log_checkpoint(300, run_dir, {"val_loss": 1.0})
        tracker.finish("FINISHED")
        tracker.close()
        (run_dir / ".mlflow-sent.json").unlink()
    assert history(up.uri, run_id) == [(step, loss(step)) for step in range(300)]
    assert len(history(up.uri, run_id, "grad_norm")) == len(history(up.uri, run_id, "mfu")) == 1
    run = connect(up.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(connect(up.uri).search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")) == 1


def test_a_tracker_killed_in_mid_run_is_brought_level_by_sync(up: Server, tmp_path: Path) -> None:
    run_dir, run_id = begin(tmp_path, up.uri)
    tracker = MlflowTracker(up.uri, run_id, run_dir, interval=0.05, finish_timeout=2)
    tracker.log_points(points(0, 100))
    assert wait_for(lambda: len(history(up.uri, run_id)) == 100)
    up.kill()
    slowest = 0.0
    for step in range(100, 400):
        before = time.perf_counter()
        tracker.log_points(points(step, step + 1))
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.002)
    tracker.log_checkpoint(400, run_dir, {"val_loss": 1.0})
    before = time.perf_counter()
    tracker.finish("FINISHED")
    tracker.close()
    assert time.perf_counter() - before < 10.0
    assert slowest < 1.0
    end(run_dir)
    up.start()
    report = sync(run_dir)
    assert report.missing == 0 and report.sent + report.already == 400 and report.sent > 0
    assert report.checkpoints_sent == 1
    assert history(up.uri, run_id) == [(step, loss(step)) for step in range(400)]
    assert connect(up.uri).get_run(run_id).info.status == "FINISHED"
    assert sync(run_dir).sent == 0


def test_a_tracker_that_comes_back_in_mid_run_gets_everything_without_sync(up: Server, tmp_path: Path) -> None:
    up.kill()
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    assert create_run(run_dir, name="one", config={}, uri=up.uri) is None
    tracker = MlflowTracker(up.uri, None, run_dir, interval=0.1, max_backoff=0.5, finish_timeout=60)
    tracker.log_points(points(0, 50))
    up.start()
    assert wait_for(lambda: tracker.run_id is not None)
    tracker.log_points(points(50, 80))
    tracker.finish("FINISHED")
    tracker.close()
    assert tracker.run_id is not None
    assert history(up.uri, tracker.run_id) == [(step, loss(step)) for step in range(80)]


def test_a_server_that_accepts_and_says_nothing_holds_nobody_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = MlflowTracker(uri, "0" * 32, run_dir, interval=0.05, finish_timeout=1)
        before = time.perf_counter()
        for step in range(300):
            tracker.log_points(points(step, step + 1))
        tracker.finish("FINISHED")
        tracker.close()
        assert time.perf_counter() - before < 10.0
    assert len(read_points(run_dir / "metrics.jsonl")) == 300


TRAINER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from glowflow.tracking.base import Point
    from glowflow.tracking.mlflow import MlflowTracker, create_run, default_uri
    from glowflow.tracking.runrecord import RunRecord, create_run_dir

    storage, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    uri = default_uri(storage)
    run_dir = storage / "one" if first else create_run_dir(storage, "one")
    run_id = create_run(run_dir, name="one", config={}, uri=uri)
    RunRecord("one", mlflow_run_id=run_id).save(run_dir)
    options = {"interval": 0.05, "finish_timeout": 60, "system_metrics": True, "system_interval": 0.1}
    tracker = MlflowTracker(uri, run_id, run_dir, **options)
    print("ready", flush=True)
    for step in range(first, last):
        now = int(time.time() * 1000)  # another one in each part: the first must win
        tracker.log_points([Point("train_loss", step, 5 / (step + 1), now), Point("lr", step, step / 7, now)])
        time.sleep(0.01)
    tracker.finish("FINISHED")
    tracker.close()
    RunRecord("one", status="FINISHED", mlflow_run_id=run_id).save(run_dir)
    """
)


def test_a_run_killed_and_resumed_from_an_older_checkpoint_has_each_step_once(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    command = [sys.executable, "-c", TRAINER, str(storage)]
    first = subprocess.Popen([*command, "0", "100000"], stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"ready\n"
    assert wait_for(lambda: len(read_points(storage / "one" / "metrics.jsonl")) > 200)
    assert [row["status"] for row in list_runs(storage)] == ["RUNNING"]
    first.kill()
    first.wait()
    first.stdout.close()
    assert [row["status"] for row in list_runs(storage)] == ["DEAD"]
    reached = max(curves(storage / "one" / "metrics.jsonl")["train_loss"])
    assert reached > 60
    subprocess.run([*command, "25", str(reached + 40)], check=True, timeout=120)
    uri = default_uri(storage)
    run_id = RunRecord.load(storage / "one").mlflow_run_id
    assert run_id is not None
    assert history(uri, run_id) == [(step, loss(step)) for step in range(reached + 40)]
    assert history(uri, run_id, "lr") == [(step, step / 7) for step in range(reached + 40)]
    system = [step for step, _ in history(uri, run_id, "system/cpu_percent")]
    assert system == list(range(len(system))) and len(system) > 2
    rows = list_runs(storage)
    assert [(row["status"], row["source"]) for row in rows] == [("FINISHED", "mlflow")]
    assert sync(storage / "one").sent == 0


def test_two_processes_may_make_a_new_store_at_once_without_chatter(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from glowflow.tracking.mlflow import create_run, default_uri\n"
        "d = Path(sys.argv[1]) / sys.argv[2]; d.mkdir()\n"
        "print(create_run(d, name=sys.argv[2], config={}, uri=default_uri(sys.argv[1]), experiment='new'))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen([*command, name], stdout=pipe, stderr=pipe, text=True) for name in ("a", "b")]
    results = [process.communicate(timeout=240) for process in started]
    assert all(process.returncode == 0 for process in started), results
    ids = {out.strip() for out, _ in results}
    assert len(ids) == 2 and "None" not in ids
    assert [err for _, err in results] == ["", ""]
    assert {row["mlflow_run_id"] for row in list_runs(tmp_path)} == ids


def test_the_ui_serves_the_right_store_on_loopback(tmp_path: Path) -> None:
    begin(tmp_path, default_uri(tmp_path))
    plan = ui_plan(tmp_path, port=free_port(0))
    assert plan.command is not None and plan.url.startswith("http://127.0.0.1:")
    environment = {**os.environ, **plan.environment}
    with open(tmp_path / "ui.log", "wb") as log:
        process = subprocess.Popen(
            plan.command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        assert wait_for(lambda: answers(f"{plan.url}/health"), 180), (tmp_path / "ui.log").read_text()
        assert [row["run"] for row in list_runs(tmp_path / "elsewhere", uri=plan.url)] == ["one"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    allowed = {"one", "mlflow.db", ".mlflow.db.lock", "mlartifacts", "ui.log"}
    assert {path.name for path in tmp_path.iterdir()} <= allowed
