"""Whole commands on Ray: a tracked run that loses a worker, an error that is not retried, and bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from glowflow.cli.main import run
from glowflow.training.callbacks.samples import read_samples
from tests.journeys.support import (
    command,
    environment,
    glowflow,
    kill_everything,
    loss_curve,
    members,
    record,
    wait_for_step,
    write_config,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train-ray")


@pytest.mark.journey
@pytest.mark.timeout(900)
def test_a_tracked_run_on_two_workers_survives_the_loss_of_one(home: Path) -> None:
    import subprocess

    config = write_config(
        home, resources__workers=2, tracking__backend="mlflow", tracking__run="lost", tracking__system_metrics=False
    )
    run_dir, log = home / "runs" / "lost", home / "lost.log"
    with log.open("wb") as errors, (home / "lost.json").open("wb") as output:
        process = subprocess.Popen(
            command("train", str(config), "--json"),
            cwd=home,
            env=environment(),
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        wait_for_step(run_dir, 25, process, log)
        workers = [member for member in members(process.pid) if "TrainWorker" in " ".join(member.cmdline())]
        assert len(workers) == 2
        workers[-1].send_signal(signal.SIGKILL)
        assert process.wait(300) == 0, log.read_text()
    finally:
        kill_everything(process)
    shown = log.read_text()
    assert "workers restarted, going on from step" in shown
    assert "ray" not in shown.lower().replace("starting ray ...", "").replace("train-ray", ""), "Ray's own log is quiet"
    document = json.loads((home / "lost.json").read_text())
    assert document == record(run_dir) and document["status"] == "FINISHED" and document["steps"] == 60
    assert document["device"] == "2 x cpu" and document["final"]["train_loss"] < 5
    assert list(loss_curve(run_dir)) == list(range(1, 61))
    assert list(read_samples(run_dir)) == list(range(60))
    assert not (run_dir / "ray").exists()
    assert (run_dir / "checkpoints" / "model-60.pt").is_file()
    _check_mlflow(home, run_dir, document["mlflow_run_id"])


def _check_mlflow(home: Path, run_dir: Path, run_id: str) -> None:
    """Each step of the curve once, the run's end, its data set and its checkpoints."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    history = client.get_metric_history(run_id, "train_loss")
    assert sorted(point.step for point in history) == list(range(1, 61))
    assert {point.step: point.value for point in history} == loss_curve(run_dir)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.inputs.dataset_inputs[0].dataset.digest
    assert found.data.params["model.dim"] == "32"


@pytest.mark.journey
@pytest.mark.timeout(600)
def test_an_error_that_no_retry_mends_ends_the_run_at_once(home: Path) -> None:
    config = write_config(
        home, "diverges", tracking__run="diverges", training__lr=1e30, training__max_nonfinite_steps=0
    )
    done = glowflow("train", config, cwd=home)
    assert done.returncode != 0
    assert "training.max_nonfinite_steps" in done.stderr and "Traceback" not in done.stderr
    assert "restarted" not in done.stderr
    assert record(home / "runs" / "diverges")["status"] == "FAILED"


def test_bad_input_is_refused_with_exit_code_2_and_nothing_written(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("glowflow.orchestration.cluster.logical_cpus", lambda: 2)
    config = write_config(home)
    (home / "runs" / "taken").mkdir(parents=True)
    (home / "file").write_text("")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        cases = {
            "there are 2": ["resources.workers=64", "training.batch_size=64"],
            "training would hang": ["resources.workers=2", "resources.cpus_per_worker=1"],
            "cannot be written": [f"tracking.storage={home / 'file' / 'runs'}"],
            "a run of this name exists": ["tracking.run=taken"],
            "no Ray cluster answers there": [f"resources.address={address}"],
            "must be `auto` or host:port": ["resources.address=somewhere"],
        }
        before = sorted(home.rglob("*"))
        for message, overrides in cases.items():
            began = time.monotonic()
            assert run(["train", str(config), *overrides]) == 2, message
            assert message in capsys.readouterr().err
            assert time.monotonic() - began < 30
    assert run(["train", "--resume", "unknown", f"tracking.storage={home / 'runs'}"]) == 2
    assert "is not known" in capsys.readouterr().err
    assert sorted(home.rglob("*")) == before
    assert os.listdir(home / "runs" / "taken") == []
