"""The driver's book: what it hands out, what it writes down, and how it goes on after a crash. No Ray, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.loader import load_config
from glowflow.config.space import load_space
from glowflow.experiments.journal import Journal, SweepState, read_journal
from glowflow.experiments.searchers import make_strategy, replay
from glowflow.orchestration.sweep.book import SPECS, SweepBook, TrialSpec
from glowflow.orchestration.sweep.settings import settle
from tests.journeys.support import TINY


def open_book(tmp_path: Path, *, limit: int | None = 2, **content: Any) -> SweepBook:
    """A new book, or the one that goes on from the journal that is there."""
    given = {"space": {"training.lr": {"loguniform": [1e-4, 1e-2]}}, "trials": 4, **content}
    config, space = load_config(TINY), load_space(given)
    sweep_dir = tmp_path / "sweep"
    sweep_dir.mkdir(exist_ok=True)
    settings = settle(config, space, sweep_dir, cpus=2, gpus=0, accelerator="cpu")
    known = (sweep_dir / "journal.jsonl").exists()
    state = read_journal(sweep_dir) if known else SweepState()
    journal = Journal(sweep_dir)
    about = {"name": "sweep", "metric": list(space.metrics), "mode": list(space.modes), "space": space.to_dict()}
    state.apply(journal.append("sweep", **about))
    strategy = make_strategy(space, config)
    replay(strategy, state, space)
    return SweepBook(settings, strategy, state, journal, None, limit)


def report(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "metrics": {"val_loss": loss}, "checkpoint": None, **more}


def end(step: int, loss: float) -> dict[str, Any]:
    return report(step, loss, status="FINISHED", best={}, seconds=1.0)


def test_it_hands_out_as_many_as_may_run_and_the_next_when_one_ends(tmp_path: Path) -> None:
    book = open_book(tmp_path)
    assert book.next_trial("a") == {"trial": "000"} and book.next_trial("b") == {"trial": "001"}
    assert book.next_trial("c") is None
    book.ended("a", end(60, 2.0))
    assert book.next_trial("c") == {"trial": "002"}
    spec = TrialSpec.load(tmp_path / "sweep" / SPECS, "c")
    assert spec.trial == "002" and spec.params == book.state.trials["002"].params


def test_when_all_points_are_out_it_says_so(tmp_path: Path) -> None:
    book = open_book(tmp_path, limit=None)
    handed = [book.next_trial(str(n)) for n in range(4)]
    assert all(isinstance(one, dict) for one in handed) and book.next_trial("x") == "FINISHED"
    assert book.num_trials == 4


def test_each_seed_of_a_point_is_a_trial_of_its_own(tmp_path: Path) -> None:
    book = open_book(tmp_path, limit=None, trials=2, seeds=2)
    names = [book.next_trial(str(n))["trial"] for n in range(4)]  # type: ignore[index, call-overload]
    assert names == ["000-s0", "000-s1", "001-s0", "001-s1"]
    trials = book.state.trials
    assert trials["000-s0"].params == trials["000-s1"].params != trials["001-s0"].params


def test_a_trial_that_the_scheduler_stopped_says_why(tmp_path: Path) -> None:
    book = open_book(tmp_path, scheduler={"name": "asha", "grace_steps": 10})
    book.next_trial("a"), book.next_trial("b")
    book.reported("a", report(10, 2.0))
    book.reported("b", report(10, 3.0))
    book.decided("b", 10)
    book.ended("b", report(10, 3.0))
    trial = book.state.trials["001"]
    assert (trial.status, trial.step) == ("STOPPED", 10)
    assert trial.why == "asha at step 10: rank 2 of 2 so far, val_loss 3"


def test_a_crash_is_a_failure_but_not_once_the_sweep_is_being_stopped(tmp_path: Path) -> None:
    book = open_book(tmp_path)
    book.next_trial("a"), book.next_trial("b")
    book.crashed("a", "out of memory")
    book.closed = lambda: True
    book.crashed("b", "killed")
    assert [trial.status for trial in book.state.trials.values()] == ["FAILED", "KILLED"]
    assert book.state.trials["000"].error == "out of memory"
    assert book.next_trial("c") == "FINISHED", "nothing new begins"


def test_too_many_failures_are_a_share_of_those_that_are_over(tmp_path: Path) -> None:
    book = open_book(tmp_path, limit=None, trials=8)
    for n in range(8):
        book.next_trial(str(n))
    for n in (0, 1):
        book.ended(str(n), end(60, 2.0))
    for n in (2, 3):
        book.crashed(str(n), "no")
    assert not book.too_many_failed(), "2 of 4 are not more than half, and not yet 3"
    book.crashed("4", "no")
    assert book.too_many_failed()


def test_a_driver_that_died_leaves_its_open_trials_to_the_next_and_no_point_is_drawn_twice(tmp_path: Path) -> None:
    whole = open_book(tmp_path / "whole" if (tmp_path / "whole").mkdir() is None else tmp_path, limit=None)
    expected = [whole.next_trial(str(n)) and whole.state.trials[f"{n:03d}"].params for n in range(4)]
    (tmp_path / "cut").mkdir()
    first = open_book(tmp_path / "cut")
    first.next_trial("a"), first.next_trial("b")
    first.ended("a", end(60, 2.0))
    first.reported("b", report(20, 3.0))  # and then the process is killed
    second = open_book(tmp_path / "cut", limit=None)
    handed = [second.next_trial(f"n{n}") for n in range(4)]
    assert handed == [{"trial": "001"}, {"trial": "002"}, {"trial": "003"}, "FINISHED"]
    assert [trial.params for trial in second.state.trials.values()] == expected
    assert second.past == ["000"] and second.past_reports("001") == [(20, 3.0)]
    assert second.state.trials["001"].attempts == 2
    lines = (tmp_path / "cut" / "sweep" / "journal.jsonl").read_text().splitlines()
    claimed = [json.loads(line)["trial"] for line in lines if '"claimed"' in line]
    assert claimed == ["000", "001", "002", "003"]


def test_a_metric_that_no_report_has_is_fatal_and_named(tmp_path: Path) -> None:
    book = open_book(tmp_path, metric="mine/score")
    book.next_trial("a")
    book.reported("a", report(10, 2.0))
    assert book.fatal is not None and "mine/score" in str(book.fatal) and "val_loss" in str(book.fatal)


def test_a_copy_of_weights_is_written_down_with_the_new_values(tmp_path: Path) -> None:
    book = open_book(tmp_path, limit=None, scheduler={"name": "pbt", "interval_steps": 10})
    values = book.next_trial("a")
    assert isinstance(values, dict) and set(values) == {"training.lr"}, "Tune sees what it may change"
    copied = {"donor": "001", "donor_step": 10, "checkpoint": "/c", "params": {"training.lr": 5e-3}}
    book.reported("a", report(20, 2.0, copied=copied))
    trial = book.state.trials["000"]
    assert trial.params == {"training.lr": 5e-3} and trial.proposed == values
    assert [copy["donor"] for copy in trial.lineage] == ["001"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_rank_in_a_reason_goes_by_the_mode(tmp_path: Path, mode: str) -> None:
    book = open_book(tmp_path, mode=mode, scheduler={"name": "asha", "grace_steps": 10})
    book.next_trial("a"), book.next_trial("b")
    book.reported("a", report(10, 2.0))
    book.reported("b", report(10, 3.0))
    book.decided("b", 10)
    assert book.state.trials["001"].why == f"asha at step 10: rank {2 if mode == 'min' else 1} of 2 so far, val_loss 3"
