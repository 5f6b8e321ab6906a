"""``ray job submit`` on a loopback cluster with a token: the script trains, and its exit code is passed on."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.support import ROOT, environment, kill_everything, record, write_config
from tests.training.distributed import free_port

pytestmark = pytest.mark.journey

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job-submit")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of two CPUs on ports of its own: (address of the jobs API, environment with the token)."""
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    dashboard = free_port()
    # Ray's sockets need a short path.
    scratch = tempfile.mkdtemp(prefix="rj-")
    ports = {"port": free_port(), "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    ports |= {"dashboard-agent-listen-port": free_port(), "dashboard-agent-grpc-port": free_port()}
    arguments = [f"--{name}={port}" for name, port in ports.items()]
    arguments += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2", "--block"]
    arguments += [f"--object-store-memory={200 * 2**20}", f"--temp-dir={scratch}"]
    log = home / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            [RAY, "start", "--head", *arguments], env=env, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for_jobs_api(address, env["RAY_AUTH_TOKEN"], head, log)
        yield address, env
    finally:
        kill_everything(head)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_jobs_api(address: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def working_dir(home: Path) -> Path:
    """What a job needs of the repository: the package and the script, uninstalled."""
    folder = home / "working-dir"
    shutil.copytree(ROOT / "glowflow", folder / "glowflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "pipelines", folder / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(
    cluster: tuple[str, dict[str, str]], working_dir: Path, *entrypoint: str
) -> subprocess.CompletedProcess[str]:
    address, env = cluster
    # The package must come from the working directory, on every node.
    env = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [RAY, "job", "submit", f"--address={address}", "--working-dir", ".", "--", sys.executable, *entrypoint],
        cwd=working_dir,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.timeout(900)
def test_a_job_trains_on_the_cluster_that_it_was_submitted_to(
    cluster: tuple[str, dict[str, str]], working_dir: Path, home: Path
) -> None:
    config = write_config(home, resources__workers=2, tracking__run="job")
    done = submit(cluster, working_dir, "pipelines/train.py", str(config), "training.max_steps=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert record(home / "runs" / "job")["status"] == "FINISHED"
    assert record(home / "runs" / "job")["steps"] == 20


@pytest.mark.timeout(600)
def test_a_job_that_can_not_run_passes_its_exit_code_on(
    cluster: tuple[str, dict[str, str]], working_dir: Path, home: Path
) -> None:
    config = write_config(home, tracking__run="refused")
    for overrides, message in [(["training.lr=-1"], "training.lr"), (["resources.workers=16"], "resources.workers")]:
        done = submit(cluster, working_dir, "pipelines/train.py", str(config), *overrides)
        assert done.returncode != 0
        assert message in done.stdout
        assert "Traceback" not in done.stdout
    assert not os.path.exists(home / "runs" / "refused")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_runs_on_the_cluster_that_it_was_submitted_to(
    cluster: tuple[str, dict[str, str]], working_dir: Path, home: Path
) -> None:
    config = write_config(home, tracking__run=None)
    space = home / "lr.yaml"
    body = {"space": {"training.lr": {"loguniform": [1e-3, 1e-2]}}, "trials": 3, "set": {"resources.workers": 1}}
    space.write_text(json.dumps({"metric": "val_loss", **body}))
    command = [str(config), str(space), "--name", "lr", "--storage", str(home / "runs"), "training.max_steps=20"]
    done = submit(cluster, working_dir, "pipelines/sweep.py", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record(home / "runs" / "lr" / f"{n:03d}")["steps"] for n in range(3)] == [20, 20, 20]
    assert (home / "runs" / "lr" / "report" / "report.md").is_file()
    assert "Traceback" not in done.stdout
