"""Sweeps as whole commands: killed and resumed, early stops, populations, crashes; one family in MLflow; no leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from glowflow.experiments.journal import SweepState, leaderboard, read_journal
from glowflow.tracking.client import connect
from tests.journeys.support import glowflow, kill_everything, loss_curve, record, start, write_config

pytestmark = [pytest.mark.journey, pytest.mark.timeout(900)]

LR = {"training.lr": {"loguniform": [1e-4, 3e-2]}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    write_config(folder, training__warmup_steps=2, tracking__backend="mlflow")
    return folder


def write_space(home: Path, name: str, **content: Any) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def events(home: Path, sweep: str) -> list[dict[str, Any]]:
    path = home / "runs" / sweep / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(condition: Callable[[], bool], process: Any, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def family(home: Path, sweep: str) -> tuple[Any, list[Any], Any]:
    """(client, children, parent) as MLflow has them."""
    client = connect(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    parents = [run for run in runs if run.info.run_name == sweep]
    assert len(parents) == 1
    parent = parents[0]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return client, children, parent


def board(state: SweepState) -> list[tuple[Any, ...]]:
    return [(row["trial"], row["status"], row["step"], row["val_loss"]) for row in leaderboard(state)]


# -- killed and resumed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(home: Path) -> SweepState:
    space = write_space(
        home, "random", space=LR, trials=4, concurrency=2, scheduler={"name": "fifo", "interval_steps": 20}
    )
    done = glowflow("sweep", "tiny.yaml", space, "--name", "whole", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["status"] == "FINISHED" and len(document["trials"]) == 4
    assert document["best"]["trial"] == board(read_journal(home / "runs" / "whole"))[0][0]
    return read_journal(home / "runs" / "whole")


def before_the_first_report(seen: list[dict[str, Any]]) -> bool:
    return any(event["event"] == "running" for event in seen)


def in_the_middle(seen: list[dict[str, Any]]) -> bool:
    return sum(event["event"] == "done" for event in seen) >= 1 and any(e["event"] == "reported" for e in seen)


def at_the_last_trial(seen: list[dict[str, Any]]) -> bool:
    return sum(event["event"] == "done" for event in seen) >= 3


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(before_the_first_report, marks=pytest.mark.slow),
        in_the_middle,
        pytest.param(at_the_last_trial, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_was_killed_ends_as_if_nothing_had_been(
    home: Path, uninterrupted: SweepState, point: Callable[[list[dict[str, Any]]], bool]
) -> None:
    name, log = f"killed-{point.__name__}", home / f"{point.__name__}.log"
    process = start("sweep", "tiny.yaml", home / "random.yaml", "--name", name, cwd=home, log=log)
    try:
        wait_for(lambda: point(events(home, name)), process, log)
    finally:
        assert kill_everything(process) >= 3, "the kill must have hit the trials too"
    before = events(home, name)
    assert not any(event["event"] == "ended" for event in before), "the sweep was over before it could be killed"
    resumed = glowflow("sweep", "--resume", name, cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    state = read_journal(home / "runs" / name)
    assert board(state) == board(uninterrupted)
    whole = [event for event in events(home, name) if event["event"] in ("claimed", "done")]
    for kind in ("claimed", "done"):
        trials = [event["trial"] for event in whole if event["event"] == kind]
        assert sorted(trials) == ["000", "001", "002", "003"], f"{kind}: no trial twice, none missing"
    _, children, parent = family(home, name)
    assert len(children) == 4 and {run.info.status for run in [*children, parent]} == {"FINISHED"}
    again = glowflow("sweep", "--resume", name, cwd=home)
    assert again.returncode == 2 and "nothing left to do" in again.stderr


def test_a_resume_with_another_space_or_config_is_refused(home: Path, uninterrupted: SweepState) -> None:
    other = write_space(home, "other", space={"training.lr": {"loguniform": [1e-3, 1e-2]}}, trials=4)
    refused = glowflow("sweep", "tiny.yaml", other, "--resume", "whole", cwd=home)
    assert refused.returncode == 2 and "differs from the space" in refused.stderr
    changed = glowflow("sweep", "tiny.yaml", home / "random.yaml", "model.dim=64", "--resume", "whole", cwd=home)
    assert changed.returncode == 2 and "differs from the config" in changed.stderr
    unknown = glowflow("sweep", "--resume", "whol", cwd=home)
    assert unknown.returncode == 2 and "did you mean 'whole'" in unknown.stderr


def test_the_best_trial_becomes_a_config_that_trains(home: Path, uninterrupted: SweepState) -> None:
    exported = glowflow("runs", "best", "whole", "--export", "winner.yaml", cwd=home)
    assert exported.returncode == 0, exported.stderr
    best = board(uninterrupted)[0][0]
    winner = yaml.safe_load((home / "winner.yaml").read_text())
    assert winner["training"]["lr"] == pytest.approx(uninterrupted.trials[best].params["training.lr"])
    done = glowflow("train", "winner.yaml", "--local", "--run", "winner", cwd=home)
    assert done.returncode == 0, done.stderr
    # The same numbers as in the sweep: the trial was an ordinary run.
    assert loss_curve(home / "runs" / "winner") == loss_curve(home / "runs" / "whole" / best)


def test_the_commands_about_a_sweep(home: Path, uninterrupted: SweepState) -> None:
    status = glowflow("sweep", "status", "whole", cwd=home)
    assert status.returncode == 0 and "FINISHED" in status.stdout and "003" in status.stdout
    report = glowflow("sweep", "report", "whole", "--out", home / "out", cwd=home)
    assert report.returncode == 0, report.stderr
    text = (home / "out" / "report.md").read_text()
    assert "glowflow sweep" in text and "training.lr" in text
    compared = glowflow("runs", "compare", "whole", "--json", cwd=home)
    assert compared.returncode == 0 and len(json.loads(compared.stdout)["rows"]) == 4
    shown = glowflow("runs", "show", "whole/000", "--json", cwd=home)
    assert json.loads(shown.stdout)["status"] == "FINISHED"


# -- several workers, early stops, leaks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of this process, in which a sweep that is started here runs."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=120_000_000, log_to_driver=False)
    yield ray
    ray.shutdown()


def run_here(home: Path, space: Path, name: str, *overrides: str) -> SweepState:
    from glowflow.orchestration.sweep.driver import run_sweep
    from glowflow.orchestration.sweep.prepare import prepare_sweep

    return run_sweep(prepare_sweep(home / "tiny.yaml", space, overrides, name=name), progress=False)


def test_ten_trials_that_were_stopped_early_leave_nothing_behind(home: Path, cluster: Any) -> None:
    from ray.util import placement_group_table

    # Rates from good to useless: each trial but the first is worse than the one before it at the first rung.
    rates = [1e-2, *(3e-4 / 2**n for n in range(10))]
    space = write_space(
        home,
        "stops",
        space={"training.lr": {"grid": rates}},
        set={"training.min_lr": 0.0},
        scheduler={"name": "asha", "grace_steps": 10, "interval_steps": 10, "reduction_factor": 4},
        concurrency=2,
    )
    state = run_here(home, space, "stops")
    stopped = [trial for trial in state.trials.values() if trial.status == "STOPPED"]
    assert len(stopped) >= 10
    assert all(trial.step == 10 and "asha at step 10" in str(trial.why) for trial in stopped)
    assert all(max(loss_curve(home / "runs" / "stops" / trial.id)) == 10 for trial in stopped), "not a step too many"
    deadline = time.monotonic() + 10
    left: list[Any] = ["not looked yet"]
    while left and time.monotonic() < deadline:
        groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        titles = ["".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
        left = [*groups, *(title for title in titles if "SweepTrial" in title)]
        left += [] if cluster.available_resources().get("CPU") == 2.0 else ["CPUs"]
        time.sleep(0.2)
    assert not left
    _, children, _ = family(home, "stops")
    assert {run.info.status for run in children} == {"FINISHED", "KILLED"}
    tags = [run.data.tags for run in children if run.info.status == "KILLED"]
    assert all("asha at step 10" in tag["glowflow.sweep.why"] for tag in tags)


@pytest.mark.slow
def test_trials_of_two_workers_make_one_family_with_every_step_once(home: Path, cluster: Any) -> None:
    space = write_space(home, "two", space=LR, trials=4, set={"resources.workers": 2, "training.max_steps": 20})
    state = run_here(home, space, "two", "training.val_interval=10")
    assert [trial.status for trial in state.trials.values()] == ["FINISHED"] * 4
    client, children, parent = family(home, "two")
    assert len(children) == 4 and parent.info.status == "FINISHED"
    for child in children:
        history = client.get_metric_history(child.info.run_id, "train_loss")
        assert sorted(point.step for point in history) == list(range(1, 21))
        assert child.data.tags["glowflow.sweep.searcher"] == "random"
        assert "glowflow.sweep.param.training.lr" in child.data.tags
    artifacts = [item.path for item in client.list_artifacts(parent.info.run_id, "report")]
    assert {"report/report.html", "report/leaderboard.csv"} <= set(artifacts)


def test_a_population_copies_weights_over_more_than_one_generation(home: Path, cluster: Any) -> None:
    space = write_space(
        home,
        "pbt",
        space=LR,
        trials=4,
        scheduler={"name": "pbt", "interval_steps": 15},
        set={"training.max_steps": 75, "training.schedule": "constant"},
    )
    assert_population(run_here(home, space, "pbt"), home, "pbt")


@pytest.mark.timeout(240)
def test_a_population_whose_time_is_up_ends_by_itself(
    home: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a round some trials are paused until the others come, who never will."""
    from glowflow.orchestration.sweep import stop

    def clock() -> float:
        # An hour has passed as soon as one trial is paused, however long this machine took for that.
        paused = any(event["event"] == "reported" for event in events(home, "budget"))
        return time.monotonic() + 3600.0 * paused

    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(stop, "_DRAIN_SECONDS", 4.0)
    space = write_space(
        home,
        "budget",
        space=LR,
        trials=4,
        scheduler={"name": "pbt", "interval_steps": 5},
        set={"training.max_steps": 100_000, "training.schedule": "constant"},
        time_budget="1h",
    )
    state = run_here(home, space, "budget", "tracking.backend=jsonl")
    assert (state.status, state.why) == ("STOPPED", "the time budget of 3600 s is used up")
    assert {trial.status for trial in state.trials.values()} == {"KILLED"}, "none runs, and all may go on later"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_population_on_the_quickstart(repository: Path, tmp_path: Path) -> None:
    """The shipped space, for real: minutes on two idle cores."""
    storage = f"tracking.storage={tmp_path / 'runs'}"
    typed = ("sweep", "configs/quickstart.yaml", "tune_spaces/population.yaml", "--name", "population", storage)
    done = glowflow(*typed, cwd=repository, timeout=1700)
    assert done.returncode == 0, done.stderr
    assert_population(read_journal(tmp_path / "runs" / "population"), tmp_path, "population")


def assert_population(state: SweepState, home: Path, sweep: str) -> None:
    """Every trial ended; weights were copied more than once, and MLflow says from whom."""
    assert [trial.status for trial in state.trials.values()] == ["FINISHED"] * 4
    copies = [(trial, copy) for trial in state.trials.values() for copy in trial.lineage]
    assert len({copy["donor_step"] for _, copy in copies}) >= 2, "more than one generation"
    runs = home / "runs" / sweep
    for trial, copy in copies:
        donor, mine = loss_curve(runs / copy["donor"]), loss_curve(runs / trial.id)
        at = copy["donor_step"]
        assert trial.params != trial.proposed
        # Right after the copy the loss goes on from the donor's, not from where this trial was.
        assert abs(mine[at + 1] - donor[at + 1]) < 0.02, (trial.id, copy)
    _, children, _ = family(home, sweep)
    lineage = {run.data.tags["glowflow.sweep.trial"]: run.data.tags.get("glowflow.sweep.donor") for run in children}
    assert {name for name, donor in lineage.items() if donor} == {trial.id for trial, _ in copies}


def test_trials_that_crash_are_named_and_end_the_sweep(home: Path, cluster: Any) -> None:
    space = write_space(
        home,
        "crash",
        space={"training.lr": {"grid": [1e30, 2e30, 3e30, 4e30, 5e30, 6e30]}},
        set={"training.max_nonfinite_steps": 0, "training.grad_clip": 1e30, "training.min_lr": 0.0},
        concurrency=1,
    )
    state = run_here(home, space, "crash")
    failed = [trial for trial in state.trials.values() if trial.status == "FAILED"]
    assert state.status == "FAILED" and "trials failed, more than max_failed" in str(state.why)
    assert 3 <= len(failed) < 6 and all("finite" in str(trial.error) for trial in failed)
    assert record(home / "runs" / "crash" / failed[0].id)["status"] == "FAILED"


def test_a_metric_that_is_never_reported_ends_the_sweep_with_its_name(home: Path, cluster: Any) -> None:
    from glowflow.config.errors import RunError

    space = write_space(home, "strange", metric="mine/score", space=LR, trials=3)
    with pytest.raises(RunError, match="mine/score") as caught:
        run_here(home, space, "strange")
    assert "val_loss" in str(caught.value), "it says what is reported"
    assert read_journal(home / "runs" / "strange").status == "FAILED"


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_sweep_goes_on_later(home: Path) -> None:
    log = home / "stopped.log"
    process = start("sweep", "tiny.yaml", home / "random.yaml", "--name", "stopped", cwd=home, log=log)
    try:
        wait_for(lambda: any(event["event"] == "reported" for event in events(home, "stopped")), process, log)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()
    finally:
        kill_everything(process)
    text = log.read_text()
    assert "glowflow sweep --resume stopped" in text and "Traceback" not in text
    state = read_journal(home / "runs" / "stopped")
    assert state.status == "KILLED"
    assert not any(trial.status in ("RUNNING", "FAILED") for trial in state.trials.values())
    _, children, parent = family(home, "stopped")
    assert all(run.info.status != "RUNNING" for run in [*children, parent])


# -- what never starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"space": {"training.learning_rate": {"uniform": [0, 1]}}, "trials": 2}, "did you mean 'training.lr'"),
        ({"space": {}}, "space"),
        ({"space": LR}, "trials"),
        ({"space": {"model.heads": {"choice": [2, 3]}}, "trials": 2}, "model.heads"),
        ({"space": LR, "trials": 2, "concurrency": 64}, "concurrency"),
        ({"space": LR, "trials": 2, "metric": "val_los"}, "did you mean 'val_loss'"),
        ({"space": LR, "trials": 2, "set": {"resources.workers": 64}}, "resources.workers"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(home: Path, content: dict[str, Any], words: str) -> None:
    space = write_space(home, "bad", **content)
    before = sorted(path.name for path in (home / "runs").glob("*"))
    refused = glowflow("sweep", "tiny.yaml", space, "--name", "bad", cwd=home)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert words in refused.stderr and "Traceback" not in refused.stderr
    assert sorted(path.name for path in (home / "runs").glob("*")) == before, "nothing is written"


def test_a_dry_run_shows_the_points_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "tiny.yaml", tmp_path)
    space = write_space(tmp_path, "dry", space=LR, trials=3, seeds=2)
    shown = glowflow("sweep", "tiny.yaml", space, "--dry-run", f"tracking.storage={tmp_path / 'none'}", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"trials\s+6", shown.stdout) and "002" in shown.stdout
    assert not (tmp_path / "none").exists()
