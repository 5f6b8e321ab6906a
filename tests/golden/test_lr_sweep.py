"""ASHA on the shipped learning rate space: what eight full runs of the quickstart measured, replayed at any speed.

``lr_sweep.json`` holds every validation of eight points that each ran to the full budget. Here two slots run them, in
the order of the sweep and at speeds of their own; the real scheduler decides at the real rungs, and a stopped trial
frees its slot. In another order it may use more steps: asynchronous halving lets the first trials pass.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.tune")

from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.space import RandomDraw, load_space
from glowflow.experiments.journal import read_journal
from glowflow.orchestration.sweep.settings import settle
from glowflow.orchestration.sweep.trainable import OBJECTIVE, STEP
from glowflow.orchestration.sweep.tune import make_scheduler
from tests.journeys.support import glowflow
from tests.orchestration.test_sweep_tune import NobodyElse, TuneTrial

GOLDEN = json.loads((Path(__file__).parent / "lr_sweep.json").read_text())
TRIALS = GOLDEN["trials"]
BEST = min(trial["val_loss"][str(GOLDEN["max_steps"])] for trial in TRIALS)


def scheduler(repository: Path) -> Any:
    config = load_config(repository / "configs" / "quickstart.yaml")
    space = load_space(repository / "tune_spaces" / "lr.yaml")
    base = apply_overrides(config, space.fixed)
    settings = settle(base, space, Path("/x"), cpus=2, gpus=0, accelerator="cpu")
    made = make_scheduler(settings, base.training.max_steps, 8)
    made.set_search_properties(OBJECTIVE, "min")
    return made


def test_the_points_are_those_that_the_space_draws(repository: Path) -> None:
    space = load_space(repository / "tune_spaces" / "lr.yaml")
    drawn = [space.draw(RandomDraw(space.searcher.seed, n))["training.lr"] for n in range(len(TRIALS))]
    assert drawn == pytest.approx([trial["training.lr"] for trial in TRIALS])


@pytest.mark.parametrize("seed", range(25))
def test_it_finds_a_rate_as_good_as_the_best_for_half_of_the_steps(repository: Path, seed: int) -> None:
    generator, asha = random.Random(seed), scheduler(repository)
    waiting, steps, finished = list(TRIALS), 0, []
    running: list[tuple[float, Any, TuneTrial, list[int], float]] = []

    def begin(now: float) -> None:
        if waiting:
            trial, speed = waiting.pop(0), generator.uniform(0.8, 1.25)
            tune = TuneTrial(trial["trial"])
            asha.on_trial_add(NobodyElse(), tune)
            due = [int(step) for step in trial["val_loss"]]
            running.append((now + due[0] * speed, trial, tune, due, speed))

    begin(0.0), begin(0.0)
    while running:
        running.sort(key=lambda one: one[0])
        now, trial, tune, due, speed = running.pop(0)
        step, rest = due[0], due[1:]
        result = {STEP: step, OBJECTIVE: trial["val_loss"][str(step)]}
        over = not rest
        if over:
            asha.on_trial_complete(NobodyElse(), tune, result)
            finished.append(result[OBJECTIVE])
        else:
            over = asha.on_trial_result(NobodyElse(), tune, result) == "STOP"
        if over:
            steps += step
            begin(now)
        else:
            running.append((now + (rest[0] - step) * speed, trial, tune, rest, speed))
    assert min(finished) <= 1.01 * BEST
    assert steps <= 0.55 * GOLDEN["max_steps"] * len(TRIALS), f"{steps} steps"


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.timeout(1800)
def test_the_command_itself_does(repository: Path, tmp_path: Path) -> None:
    """The sweep of the README, for real: minutes on two idle cores."""
    command = ("sweep", "configs/quickstart.yaml", "tune_spaces/lr.yaml", "--trials", "8", "--name", "lr")
    done = glowflow(*command, f"tracking.storage={tmp_path}", cwd=repository, timeout=1700)
    assert done.returncode == 0, done.stderr
    state = read_journal(tmp_path / "lr")
    best = min(trial.value("val_loss") or 1e9 for trial in state.trials.values() if trial.status == "FINISHED")
    assert best <= 1.01 * BEST, "the corpus is this Python's own library: another version has other losses"
    assert sum(trial.step for trial in state.trials.values()) <= 0.55 * 200 * 8
