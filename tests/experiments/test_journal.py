"""The journal: whole or not written, folded to the same state by everyone, held by one driver; and the leaderboard."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import RunError
from glowflow.experiments.journal import (
    Journal,
    SweepState,
    Trial,
    best_trial,
    driver_of,
    find_sweep,
    iter_sweeps,
    leaderboard,
    lock_sweep,
    read_journal,
)

ABOUT = {"name": "s", "config": {"training": {"lr": 0.1}}, "metric": ["val_loss"], "mode": ["min"], "max_steps": 100}
Event = tuple[str, dict[str, Any]]
STORY: list[Event] = [
    ("sweep", ABOUT),
    ("claimed", {"trial": "000", "point": 0, "label": None, "seed": 1, "params": {"training.lr": 0.1}}),
    ("claimed", {"trial": "001", "point": 1, "label": None, "seed": 1, "params": {"training.lr": 0.2}}),
    ("running", {"trial": "000", "directory": "000", "mlflow_run_id": "abc", "attempt": 1, "from_step": 0}),
    ("running", {"trial": "001", "directory": "001", "mlflow_run_id": None, "attempt": 1, "from_step": 0}),
    ("reported", {"trial": "000", "step": 25, "metrics": {"val_loss": 3.0}, "checkpoint": "000/c-25", "seconds": 1.5}),
    ("reported", {"trial": "001", "step": 25, "metrics": {"val_loss": math.nan, "lr": 0.2}, "seconds": 1.0}),
    ("decided", {"trial": "001", "step": 25, "action": "stop", "why": "asha at step 25"}),
    (
        "done",
        {"trial": "001", "status": "STOPPED", "why": "asha at step 25", "step": 25, "metrics": {}, "seconds": 2.0},
    ),
    ("reported", {"trial": "000", "step": 50, "metrics": {"val_loss": 2.0}, "checkpoint": None, "seconds": 3.0}),
    ("exploited", {"trial": "000", "step": 50, "donor": "001", "donor_step": 25, "params": {"training.lr": 0.3}}),
    (
        "done",
        {"trial": "000", "status": "FINISHED", "step": 100, "metrics": {"val_loss": 1.5}, "best": {"val_loss": 1.25}},
    ),
    ("ended", {"status": "FINISHED", "why": None}),
]


def write(folder: Path, events: list[Event]) -> SweepState:
    """A journal of these events, and the state that a driver has folded while it wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    journal, state = Journal(folder), SweepState()
    for event, content in events:
        state.apply(journal.append(event, **content))
    journal.close()
    return state


def test_a_story_is_folded_to_its_state(tmp_path: Path) -> None:
    folded = write(tmp_path, STORY)
    state = read_journal(tmp_path)
    assert repr(state) == repr(folded)  # repr: NaN is not equal to itself
    assert state.about == ABOUT and (state.status, state.metrics, state.modes) == ("FINISHED", ("val_loss",), ("min",))
    first, second = state.trials["000"], state.trials["001"]
    assert list(state.trials) == ["000", "001"]
    assert (first.status, first.step, first.attempts, first.mlflow_run_id) == ("FINISHED", 100, 1, "abc")
    assert first.reports == [(25, {"val_loss": 3.0}), (50, {"val_loss": 2.0})]
    assert first.checkpoints == {25: "000/c-25"} and first.best == {"val_loss": 1.25}
    assert first.params == {"training.lr": 0.3} and first.proposed == {"training.lr": 0.1}
    assert [(copied["donor"], copied["donor_step"]) for copied in first.lineage] == [("001", 25)]
    assert first.value("val_loss") == 1.5 and first.over
    assert (second.status, second.why, second.seconds) == ("STOPPED", "asha at step 25", 2.0)
    assert math.isnan(second.reports[0][1]["val_loss"])
    assert second.value("lr") == 0.2 and second.value("perplexity") is None
    assert state.started is not None and state.updated == state.ended >= state.started


@pytest.mark.parametrize("length", range(3, len(STORY) + 1))
def test_a_journal_cut_at_any_byte_says_what_its_whole_lines_say(tmp_path: Path, length: int) -> None:
    write(tmp_path, STORY[:length])
    path = tmp_path / "journal.jsonl"
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for end in range(len(data) - len(lines[-1]) - len(lines[-2]), len(data) + 1):
        whole = [line for i, line in enumerate(lines) if sum(map(len, lines[: i + 1])) <= end]
        expected = SweepState()
        for line in whole:
            expected.apply(json.loads(line))
        path.write_bytes(data[:end])
        assert repr(read_journal(tmp_path)) == repr(expected)
        # The driver that comes next writes behind the whole lines, whatever the one before it left.
        journal = Journal(tmp_path)
        expected.apply(journal.append("ended", status="KILLED", why=None))
        journal.close()
        assert repr(read_journal(tmp_path)) == repr(expected)
        assert len(path.read_bytes().splitlines()) == len(whole) + 1


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    script = f"""
import resource
from glowflow.experiments.journal import Journal
journal = Journal({str(tmp_path)!r})
journal.append("sweep", name="s")
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
try:
    journal.append("sweep", name="x" * 500)
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append("ended", status="FAILED", why="disk")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["sweep", "ended"]


def test_what_another_version_wrote_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write(tmp_path, STORY)
    path = tmp_path / "journal.jsonl"
    strange = [
        '{"event": "coloured", "trial": "000", "colour": "blue"}',
        '{"event": "reported", "trial": "999", "step": 1, "metrics": {}}',
        '{"event": "claimed", "trial": "009"}',
        '{"event": "reported", "trial": "000", "step": 75, "metrics": 7}',
        '{"no": "event"}',
        "[1, 2]",
        '{"event": "rep',
        "",
        '{"event": "ended", "status": "FINISHED", "why": null, "colour": "blue", "time": "2030"}',
    ]
    path.write_bytes(path.read_bytes() + "".join(f"{line}\n" for line in strange).encode())
    state = read_journal(tmp_path)
    expected.ended = expected.updated = "2030"
    assert repr(state) == repr(expected)
    assert "cannot be read" in caplog.text and "makes no sense" in caplog.text


def test_a_trial_that_is_taken_up_again_repeats_steps(tmp_path: Path) -> None:
    def report(step: int, loss: float) -> Event:
        return "reported", {"trial": "000", "step": step, "metrics": {"val_loss": loss}}

    killed: Event = (
        "done",
        {"trial": "000", "status": "KILLED", "why": "cut", "step": 75, "metrics": {"val_loss": 1.0}},
    )
    again: Event = (
        "running",
        {"trial": "000", "directory": "000", "mlflow_run_id": None, "attempt": 2, "from_step": 25},
    )
    events = [*STORY[:4], report(25, 3.0), report(50, 2.0), report(75, 1.0), killed]
    state = write(tmp_path / "a", [*events, ("ended", {"status": "KILLED", "why": "SIGTERM"})])
    assert (state.status, state.trials["000"].status, state.trials["000"].over) == ("KILLED", "KILLED", False)
    state = write(tmp_path / "b", [*events, ("sweep", {**ABOUT, "resumed": 1}), again, report(50, 2.5)])
    trial = state.trials["000"]
    assert (state.status, state.why, trial.status, trial.why, trial.attempts) == ("RUNNING", None, "RUNNING", None, 2)
    assert trial.mlflow_run_id == "abc" and trial.step == 50
    assert trial.reports == [(25, {"val_loss": 3.0}), (50, {"val_loss": 2.5}), (75, {"val_loss": 1.0})]


@given(st.dictionaries(st.text(max_size=5), st.floats(), max_size=4))
def test_metrics_come_back_bit_for_bit(metrics: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reported: Event = ("reported", {"trial": "000", "step": 1, "metrics": metrics})
        write(Path(folder), [*STORY[:4], reported])
        found = read_journal(folder).trials["000"].reports[0][1]
    assert {name: repr(value) for name, value in found.items()} == {name: repr(v) for name, v in metrics.items()}


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("sweep", **ABOUT)
    for number in range(8):
        journal.append("claimed", trial=f"{number:03d}", point=number, label=None, seed=0, params={})

    def work(number: int) -> None:
        for step in range(25):
            journal.append(
                "reported", trial=f"{number:03d}", step=step, metrics={"val_loss": float(step)}, pad="x" * 500
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert [len(trial.reports) for trial in read_journal(tmp_path).trials.values()] == [25] * 8


def test_two_hundred_trials_are_read_in_well_under_a_second(tmp_path: Path) -> None:
    lines = [{"event": "sweep", "time": "t", **ABOUT}]
    for n in range(200):
        params = {"training.lr": n / 7, "training.optimizer.weight_decay": n / 3}
        lines.append({"event": "claimed", "trial": f"{n:03d}", "point": n, "label": None, "seed": 0, "params": params})
    for step in range(40):
        metrics = dict.fromkeys(("val_loss", "perplexity", "train_loss", "lr", "tokens_per_second"), step / 3)
        lines += [
            {"event": "reported", "time": "t", "trial": f"{n:03d}", "step": step, "metrics": metrics, "checkpoint": "c"}
            for n in range(200)
        ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        state = read_journal(tmp_path)
        board = leaderboard(state)
        seconds.append(time.perf_counter() - began)
    assert len(board) == 200 and len(state.trials["199"].reports) == 40
    assert min(seconds) < 0.7


# -- finding and holding ---------------------------------------------------------------------------------------------


def test_a_sweep_is_found_by_name_or_path(tmp_path: Path) -> None:
    for name in ("lr-one", "lr-two"):
        write(tmp_path / name, STORY[:1])
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "run.json").write_text("{}")
    assert [path.name for path in iter_sweeps(tmp_path)] == ["lr-one", "lr-two"]
    assert find_sweep(tmp_path, "lr-one") == tmp_path / "lr-one"
    assert find_sweep("elsewhere", tmp_path / "lr-two") == tmp_path / "lr-two"
    with pytest.raises(RunError, match=r"is not known \(got 'lr-on'\); did you mean 'lr-one'"):
        find_sweep(tmp_path, "lr-on")
    with pytest.raises(RunError, match="is a run, not a sweep"):
        find_sweep(tmp_path, "a-run")
    with pytest.raises(RunError, match="holds no sweeps"):
        find_sweep(tmp_path / "lr-one", "x")


@pytest.mark.parametrize("content", [None, "", '{"event": "ended", "status": "FAILED"}\n', '{"event": "sweep"'])
def test_what_is_no_sweep_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(RunError, match=r"journal\.jsonl: does not"):
        read_journal(tmp_path)


HOLD = """
import os, sys, time
from glowflow.experiments.journal import lock_sweep
with lock_sweep(sys.argv[1]):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_one_process_drives_a_sweep_until_it_is_dead(tmp_path: Path) -> None:
    assert driver_of(tmp_path) is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        assert driver_of(tmp_path) == holder.pid
        with pytest.raises(RunError, match=f"is being driven by process {holder.pid}"), lock_sweep(tmp_path):
            pass
        assert driver_of(tmp_path) == holder.pid  # neither look nor try has taken it away
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # a forked helper outlives its driver, and does not hold the sweep
        assert driver_of(tmp_path) is None
        with lock_sweep(tmp_path):
            assert driver_of(tmp_path) == os.getpid()
    finally:
        holder.kill()
        holder.wait()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_one_thread_of_a_process_drives_a_sweep(tmp_path: Path) -> None:
    with lock_sweep(tmp_path):
        with pytest.raises(RunError, match=f"is being driven by process {os.getpid()}"), lock_sweep(tmp_path):
            pass
        assert driver_of(tmp_path) == os.getpid()
        look = "import sys; from glowflow.experiments.journal import driver_of; print(driver_of(sys.argv[1]))"
        seen = subprocess.run([sys.executable, "-c", look, str(tmp_path)], stdout=subprocess.PIPE, check=True)
        assert int(seen.stdout) == os.getpid()
    with lock_sweep(tmp_path):
        pass
    assert driver_of(tmp_path) is None


# -- who is best -----------------------------------------------------------------------------------------------------


def sweep(
    *rows: tuple[str, int, dict[str, float] | None], metric: Any = ("val_loss",), mode: Any = ("min",)
) -> SweepState:
    """Trials 000, 001, ... with (status, step, metrics)."""
    state = SweepState({"metric": list(metric), "mode": list(mode)})
    for number, (status, step, metrics) in enumerate(rows):
        trial = Trial(f"{number:03d}", number, None, 0, {"training.lr": number}, status, step=step)
        if metrics is not None:
            trial.reports = [(step, metrics)]
        state.trials[trial.id] = trial
    return state


def order(state: SweepState) -> list[tuple[str, int | None]]:
    return [(row["trial"], row["rank"]) for row in leaderboard(state)]


def test_full_budgets_come_first_then_who_got_furthest() -> None:
    state = sweep(
        ("STOPPED", 25, {"val_loss": 0.5}),
        ("FINISHED", 100, {"val_loss": 2.0}),
        ("RUNNING", 50, {"val_loss": 3.0}),
        ("FINISHED", 100, {"val_loss": 1.0}),
        ("FAILED", 75, {"val_loss": 0.1}),
        ("FINISHED", 100, {"val_loss": 1.0}),
        ("STOPPED", 25, {"val_loss": 0.4}),
        ("CLAIMED", 0, None),
        ("FINISHED", 100, {"val_loss": math.nan}),
        ("FINISHED", 100, {"lr": 1.0}),
        ("FINISHED", 100, {"val_loss": -math.inf}),
    )
    ranked = [("003", 1), ("005", 2), ("001", 3), ("002", 4), ("006", 5), ("000", 6), ("004", 7)]
    assert order(state) == [*ranked, ("008", None), ("009", None), ("010", None), ("007", None)]
    row = leaderboard(state)[0]
    assert row == {
        "rank": 1, "trial": "003", "point": 3, "label": None, "seed": 0, "status": "FINISHED", "step": 100,
        "val_loss": 1.0, "params": {"training.lr": 3}, "why": None,
    }  # fmt: skip
    best = best_trial(state)
    assert best is not None and best.id == "003"


def test_the_best_of_trials_that_did_not_finish() -> None:
    rows = [("STOPPED", 25, {"val_loss": 0.5}), ("KILLED", 50, {"val_loss": 3.0}), ("RUNNING", 50, {"val_loss": 2.0})]
    best = best_trial(sweep(*rows))
    assert best is not None and best.id == "002"
    assert best_trial(sweep(("CLAIMED", 0, None), ("FINISHED", 9, {"val_loss": math.nan}))) is None
    assert best_trial(sweep()) is None and leaderboard(sweep()) == []


def test_greatest_is_best_where_the_mode_says_so() -> None:
    rows = [("FINISHED", 9, {"a/b": 1.0, "c/d": 1.0}), ("FINISHED", 9, {"a/b": 2.0, "c/d": 0.5})]
    state = sweep(*rows, metric=["a/b"], mode=["max"])
    assert order(state) == [("001", 1), ("000", 2)]
    best = best_trial(state, "c/d")  # not named by the sweep: the least
    assert best is not None and best.id == "001"


def test_several_metrics_have_the_pareto_front_first() -> None:
    def loss_and_speed(loss: float, speed: float | None) -> tuple[str, int, dict[str, float]]:
        speeds = {} if speed is None else {"tokens_per_second": speed}
        return "FINISHED", 9, {"val_loss": loss, **speeds}

    state = sweep(
        loss_and_speed(1.5, 10.0),  # dominated by 001 and 002
        loss_and_speed(1.0, 10.0),
        loss_and_speed(1.2, 20.0),
        loss_and_speed(0.5, None),
        loss_and_speed(2.0, 30.0),
        loss_and_speed(1.6, 9.0),  # dominated by 000 too
        loss_and_speed(1.0, 10.0),
        metric=["val_loss", "tokens_per_second"],
        mode=["min", "max"],
    )
    rows = leaderboard(state)
    assert [(row["trial"], row["front"]) for row in rows] == [
        ("001", 1), ("006", 1), ("002", 1), ("004", 1), ("000", 2), ("005", 3), ("003", None),
    ]  # fmt: skip
    best = best_trial(state)
    fastest = best_trial(state, "tokens_per_second")
    assert best is not None and best.id == "001"
    assert fastest is not None and fastest.id == "004"


def test_a_value_from_before_a_divergence_is_no_result() -> None:
    reports = [(25, {"val_loss": 1.0}), (50, {"lr": 0.1})]
    running = Trial("000", 0, None, 0, {}, "RUNNING", reports=reports)
    assert running.value("val_loss") == 1.0
    assert Trial("000", 0, None, 0, {}, "FINISHED", reports=reports).value("val_loss") is None


@given(st.lists(st.tuples(st.sampled_from(["FINISHED", "STOPPED", "FAILED"]), st.floats(), st.floats()), max_size=12))
def test_no_line_of_a_board_is_beaten_by_a_later_one(rows: list[tuple[str, float, float]]) -> None:
    state = sweep(
        *((status, 9, {"a/b": a, "c/d": b}) for status, a, b in rows), metric=["a/b", "c/d"], mode=["min", "max"]
    )
    board = leaderboard(state)
    assert sorted(row["trial"] for row in board) == sorted(state.trials)
    ranks = [row["rank"] for row in board]
    placed = [row for row in board if row["rank"] is not None]
    assert ranks == [*range(1, len(placed) + 1), *[None] * (len(board) - len(placed))]
    assert all(math.isfinite(row["a/b"]) and math.isfinite(row["c/d"]) for row in placed)
    for i, row in enumerate(placed):
        for later in placed[i + 1 :]:
            if later["status"] == row["status"]:
                better = later["a/b"] <= row["a/b"] and later["c/d"] >= row["c/d"]
                assert not better or (later["a/b"], later["c/d"]) == (row["a/b"], row["c/d"])
