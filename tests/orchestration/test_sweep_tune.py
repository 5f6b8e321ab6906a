"""Between Tune and the book: a scheduler keeps what earlier drivers saw, mutated values stay in their ranges."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray.tune")

from glowflow.config.space import load_space
from glowflow.orchestration.sweep.trainable import OBJECTIVE, PAYLOAD, STEP
from glowflow.orchestration.sweep.tune import (
    BookCallback,
    BookSearch,
    FullBrackets,
    StopWhen,
    WatchedScheduler,
    _Ranges,
    make_scheduler,
)
from tests.orchestration.test_sweep_book import end, open_book, report

ASHA = {"name": "asha", "grace_steps": 10, "reduction_factor": 2, "interval_steps": 10}
MEDIAN = {"name": "median", "grace_steps": 10, "min_samples": 2, "interval_steps": 10}


class TuneTrial:
    """What schedulers look at."""

    status, is_saving = "RUNNING", False

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class NobodyElse:
    """Tune's controller when no other trial waits."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


def watched(book: Any) -> WatchedScheduler:
    scheduler = WatchedScheduler(make_scheduler(book.settings, 60, book.num_trials), book)
    scheduler.set_search_properties(OBJECTIVE, "min")
    return scheduler


def result(step: int, loss: float) -> dict[str, Any]:
    return {STEP: step, OBJECTIVE: loss, PAYLOAD: json.dumps(report(step, loss))}


@pytest.mark.parametrize("scheduler", [ASHA, MEDIAN])
def test_a_resumed_sweep_stops_what_the_first_driver_would_have_stopped(
    tmp_path: Path, scheduler: dict[str, Any]
) -> None:
    for knows in (True, False):
        folder = tmp_path / str(knows)
        folder.mkdir()
        first = open_book(folder, limit=None, scheduler=scheduler)
        for n, loss in enumerate((2.0, 2.1, 2.2)):
            first.next_trial(str(n))
            first.reported(str(n), report(10, loss))
            first.ended(str(n), end(60, loss - 0.5))
        book = open_book(folder, limit=None, scheduler=scheduler)
        if not knows:
            book.past = []
        watcher = watched(book)
        book.next_trial("late")
        trial = TuneTrial("late")
        watcher.on_trial_add(None, trial)
        decision = watcher.on_trial_result(NobodyElse(), trial, result(10, 5.0))
        assert decision == ("STOP" if knows else "CONTINUE")
        assert bool(book.state.trials["003"].decisions) == knows


def test_a_trial_that_is_taken_up_again_is_not_judged_twice_at_a_rung(tmp_path: Path) -> None:
    first = open_book(tmp_path, limit=None, scheduler=ASHA)
    for n, loss in enumerate((3.0, 2.0, 1.9)):
        first.next_trial(str(n))
        first.reported(str(n), report(10, loss))
    # The first was the only one at its time and went on; then the driver died.
    book = open_book(tmp_path, limit=None, scheduler=ASHA)
    watcher = watched(book)
    for n in range(3):
        book.next_trial(f"again{n}")
        watcher.on_trial_add(None, TuneTrial(f"again{n}"))
    again = TuneTrial("again0")
    assert watcher.on_trial_result(None, again, result(15, 2.9)) == "CONTINUE"


def test_nothing_of_ours_is_pickled_or_copied_by_tune(tmp_path: Path) -> None:
    book = open_book(tmp_path)
    for one in (BookSearch(book), BookCallback(book), StopWhen(lambda: False), watched(book)):
        assert copy.deepcopy(one) is one
        assert b"journal" not in pickle.dumps(one)


@given(factor=st.sampled_from([0.01, 0.8, 1.2, 100.0]), start=st.floats(0.5, 2.0))
def test_mutated_values_stay_in_their_ranges_and_on_their_grid(factor: float, start: float) -> None:
    space = load_space(
        {
            "space": {
                "training.lr": {"loguniform": [1e-4, 1e-2]},
                "training.grad_clip": {"uniform": [0.5, 2.0], "step": 0.5},
                "training.optimizer.weight_decay": {"choice": [0.0, 0.1]},
            },
            "trials": 4,
        }
    )
    ranges = _Ranges()
    space.draw(ranges)
    assert ranges.choices == {"training.optimizer.weight_decay": [0.0, 0.1]}
    mutated = {"training.lr": 1e-3 * factor, "training.grad_clip": start * factor, "other": 1}
    clipped = ranges.clip(mutated)
    assert 1e-4 <= clipped["training.lr"] <= 1e-2
    assert clipped["training.grad_clip"] in (0.5, 1.0, 1.5, 2.0)
    assert clipped["other"] == 1


@pytest.mark.parametrize(("planned", "stopped"), [(8, {"3", "5", "7"}), (6, {"5"})])
def test_hyperband_waits_until_a_bracket_is_full_or_nobody_comes(planned: int, stopped: set[str]) -> None:
    """6 reports, factor 3: a bracket of 3 trials to the end, one of 5 that keeps 2 after 2 reports; one slot."""
    scheduler = FullBrackets(
        planned, time_attr="training_iteration", max_t=6, reduction_factor=3, stop_last_trials=False
    )
    scheduler.set_search_properties("loss", "min")
    ended: set[str] = set()

    class Controller:
        def stop_trial(self, trial: TuneTrial) -> None:
            ended.add(trial.trial_id)

    losses = [3.0, 3.0, 3.0, 2.5, 1.0, 2.8, 1.1, 2.9]
    trials = [TuneTrial(str(n)) for n in range(planned)]
    answers: dict[str, str] = {}
    for trial, loss in zip(trials, losses, strict=False):
        scheduler.on_trial_add(Controller(), trial)
        for iteration in range(1, 7):
            told = {"training_iteration": iteration, "loss": loss}
            answers[trial.trial_id] = scheduler.on_trial_result(Controller(), trial, told)
            if answers[trial.trial_id] != "CONTINUE":
                trial.status = "PAUSED"
                break
    assert ended | {name for name, answer in answers.items() if answer == "STOP"} == stopped
    assert [answers[name] for name in "012"] == ["CONTINUE"] * 3


def test_rungs_of_hyperband_are_those_of_all_its_brackets() -> None:
    def rungs(interval: int, steps: int, factor: float) -> list[int]:
        body = {"space": {"training.lr": {"uniform": [0.1, 1]}}, "trials": 2}
        return load_space({**body, "scheduler": {"name": "hyperband", "reduction_factor": factor}}).scheduler.rungs(
            interval, steps
        )

    assert rungs(10, 60, 3) == [20]
    assert rungs(1, 81, 3) == [1, 3, 9, 27]
    assert rungs(5, 80, 2) == [5, 10, 20, 40]


def test_a_paused_trial_that_others_outdo_counts_as_stopped_not_as_cut_off(tmp_path: Path) -> None:
    scheduler = {"name": "hyperband", "interval_steps": 10, "reduction_factor": 3}
    book = open_book(tmp_path, limit=None, trials=8, scheduler=scheduler)
    watcher = watched(book)

    class Controller:
        def stop_trial(self, trial: TuneTrial) -> None:
            watcher.on_trial_remove(self, trial)
            book.ended(trial.trial_id, None)

    trials = [TuneTrial(str(n)) for n in range(8)]
    for n, trial in enumerate(trials):
        book.next_trial(trial.trial_id)
        watcher.on_trial_add(Controller(), trial)
        for iteration in range(1, 3):
            told = {**result(10 * iteration, float(n)), "training_iteration": iteration}
            if watcher.on_trial_result(Controller(), trial, told) == "PAUSE":
                trial.status = "PAUSED"
    states = {name: trial.status for name, trial in book.state.trials.items()}
    # 0 to 2 are the bracket without a comparison; of 3 to 7 the last is told by the answer to its own report.
    assert states == {f"{n:03d}": "STOPPED" if n in (5, 6) else "RUNNING" for n in range(8)}
    assert "hyperband at step 20: rank 6 of 8" in str(book.state.trials["005"].why)
    assert book.state.trials["007"].decisions
    watcher.on_trial_remove(Controller(), trials[3])  # the sweep ends: nobody has decided about this one
    assert not book.state.trials["003"].decisions
