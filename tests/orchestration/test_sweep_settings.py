"""What a sweep runs: trials at a time from the resources, each trial's config, contradictions named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import PreflightError
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.space import load_space
from glowflow.orchestration.sweep.settings import SweepSettings, settle
from tests.journeys.support import TINY

SPACE: dict[str, Any] = {"space": {"training.lr": {"loguniform": [1e-4, 1e-2]}}, "trials": 4}


def settled(
    cpus: float = 2, gpus: int = 0, accelerator: str = "cpu", space: Any = None, **config: Any
) -> SweepSettings:
    base = apply_overrides(load_config(TINY), {key.replace("__", "."): value for key, value in config.items()})
    return settle(
        base, load_space({**SPACE, **(space or {})}), Path("/x/sweep"), cpus=cpus, gpus=gpus, accelerator=accelerator
    )


@pytest.mark.parametrize(
    ("cpus", "workers", "asked", "concurrency"),
    [(2, 1, None, 2), (8, 1, None, 8), (8, 1, 2, 2), (2, 2, None, 1), (8, 2, None, 4), (1, 1, None, 1)],
)
def test_concurrency_follows_from_the_resources(cpus: int, workers: int, asked: int | None, concurrency: int) -> None:
    slots = settled(cpus, space={"concurrency": asked}, resources__workers=workers, training__threads=None).slots
    assert slots.concurrency == concurrency
    assert slots.in_process == (workers == 1)
    resources = slots.tune_resources()
    if slots.in_process:
        assert resources["CPU"] * concurrency <= cpus, "all trials at a time fit"
        assert slots.threads == max(1, cpus // concurrency)
    else:
        assert "CPU" not in resources, "the workers must find the CPUs free"
        assert workers * (slots.cpus + 0.25) * concurrency <= cpus + 1e-9, "workers and their data maps fit"


def test_gpus_are_shared_out_by_trials() -> None:
    slots = settled(16, 4, "gpu", resources__workers=2, resources__accelerator="gpu").slots
    assert (slots.concurrency, slots.gpu, slots.threads) == (2, True, 1)
    assert settled(16, 4, "gpu", resources__accelerator="gpu").slots.tune_resources()["GPU"] == 1.0


@pytest.mark.parametrize(
    ("space", "config", "key"),
    [
        ({"concurrency": 3}, {}, "concurrency"),
        ({"concurrency": 2}, {"resources__workers": 2}, "concurrency"),
        ({}, {"resources__workers": 8}, "resources.workers"),
        ({"concurrency": 2}, {"resources__cpus_per_worker": 2}, "concurrency"),
    ],
)
def test_resources_that_contradict_each_other_are_named(
    space: dict[str, Any], config: dict[str, Any], key: str
) -> None:
    with pytest.raises(PreflightError) as caught:
        settled(2, space=space, **config)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert caught.value.exit_code == 2


def test_a_trial_has_its_values_its_seed_its_place_and_nothing_else_changed() -> None:
    settings = settled(space={"set": {"training.max_steps": 40}, "scheduler": {"name": "asha", "grace_steps": 10}})
    config = settings.trial_config({"training.lr": 5e-3}, seed=7, trial="003")
    training = config.training
    assert (training.lr, training.seed, training.max_steps, training.val_interval) == (5e-3, 7, 40, 10)
    assert (config.tracking.storage, config.tracking.run) == ("/x/sweep", "003")
    assert training.checkpoint_interval == TINY["training"]["checkpoint_interval"], "the user's own interval stays"
    assert config.model == settings.config.model and config.data == settings.config.data


def test_schedulers_that_pause_trials_get_a_checkpoint_at_every_report_and_keep_them() -> None:
    settings = settled(space={"scheduler": {"name": "pbt", "interval_steps": 15}})
    training = settings.trial_config({"training.lr": 5e-3}, seed=0, trial="000").training
    assert (training.checkpoint_interval, training.val_interval) == (15, 15)
    assert training.keep_checkpoints >= 60 // 15, "a donor's checkpoint is there until it is copied"


def test_rungs_are_the_steps_at_which_trials_are_compared() -> None:
    space = load_space({**SPACE, "scheduler": {"name": "asha", "grace_steps": 25, "reduction_factor": 3}})
    assert space.scheduler.rungs(25, 200) == [25, 75]
    assert load_space(SPACE).scheduler.rungs(25, 200) == []
