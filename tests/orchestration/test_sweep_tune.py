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

    status = "RUNNING"

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class NobodyElse:
    """Tune's controller when no other trial waits."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


def watched(book: Any) -> WatchedScheduler:
    scheduler = WatchedScheduler(make_scheduler(book.settings, 60), book)
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
