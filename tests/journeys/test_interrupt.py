"""Ctrl-C: the first one ends cleanly with a checkpoint of that very step, the second at once; both exit with 130."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.journeys.support import (
    glowflow,
    kill_everything,
    loss_curve,
    members,
    record,
    start,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.journey


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupt")


@pytest.mark.timeout(600)
def test_ctrl_c_on_ray_saves_a_checkpoint_and_the_run_goes_on_from_it(home: Path) -> None:
    config = write_config(home, training__max_steps=5000, resources__workers=2, tracking__run="stopped")
    run_dir, log = home / "runs" / "stopped", home / "stopped.log"
    process = start("train", config, cwd=home, log=log)
    try:
        wait_for_step(run_dir, 12, process, log)
        # As a terminal does: to every process of the foreground group.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(180) == 130, log.read_text()
        deadline = time.monotonic() + 30  # Ray's processes see that their raylet is gone
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(process.pid), "nothing of the run is left"
    finally:
        kill_everything(process)
    assert "writing a checkpoint" in log.read_text() and "Traceback" not in log.read_text()
    stopped = record(run_dir)
    step = stopped["steps"]
    assert stopped["status"] == "KILLED" and 12 <= step < 5000
    assert stopped["checkpoints"][-1]["step"] == step
    # Another number of workers, and this process instead of Ray.
    place = f"tracking.storage={home / 'runs'}"
    resumed = glowflow("train", "--resume", "stopped", place, f"training.max_steps={step + 5}", "--local", cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from the newest complete checkpoint, step-{step}" in resumed.stderr
    assert record(run_dir)["steps"] == step + 5
    assert list(loss_curve(run_dir)) == list(range(1, step + 6))


def test_a_second_ctrl_c_ends_a_run_at_once(home: Path) -> None:
    # Steps of some seconds: the first Ctrl-C must still be waiting for its step when the second comes.
    config = write_config(
        home, "slow", model__dim=256, data__context=512, training__batch_size=32, tracking__run="twice"
    )
    run_dir, log = home / "runs" / "twice", home / "twice.log"
    process = start("train", config, "--local", cwd=home, log=log)
    try:
        wait_for_step(run_dir, 1, process, log)
        process.send_signal(signal.SIGINT)
        while "writing a checkpoint" not in log.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    finally:
        kill_everything(process)
    assert record(run_dir)["status"] == "KILLED"
    assert record(run_dir)["error"] == "stopped at once by the user"
    assert "Traceback" not in log.read_text()


def test_a_run_that_is_still_running_cannot_be_resumed(home: Path) -> None:
    config = write_config(home, "busy", training__max_steps=100_000, tracking__run="busy")
    run_dir, log = home / "runs" / "busy", home / "busy.log"
    process = start("train", config, "--local", cwd=home, log=log)
    try:
        wait_for_step(run_dir, 1, process, log)
        refused = glowflow("train", "--resume", "busy", f"tracking.storage={home / 'runs'}", "--local", cwd=home)
        assert refused.returncode == 2
        assert "still running" in refused.stderr and str(process.pid) in refused.stderr
    finally:
        kill_everything(process)
    assert record(run_dir)["status"] == "RUNNING"
