"""Spaces against a config: nothing may be refused in the middle of a sweep, and everything wrong comes out at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.loader import apply_overrides
from glowflow.config.space import METRICS, SCHEDULERS, RandomDraw, Scheduler, Space, check_space, load_space
from tests.config.test_space import CONFIG, LR, by_key, of


def refused(raw: Any) -> dict[str, Problem]:
    """The problems of a space that is good in itself but not for the config."""
    space = load_space(raw)
    with pytest.raises(ConfigError) as error:
        check_space(space, CONFIG)
    return by_key(error.value)


@pytest.mark.parametrize(
    ("raw", "key", "text"),
    [
        (of({"training.learning_rate": LR["training.lr"]}), "space.training.learning_rate", "'training.lr'"),
        (of({"model": {"choice": [{"dept": 1}]}}), "space.model", "model.dept is not a known key; did you mean"),
        (of({"model.depth": {"choice": [1, 0]}}), "space.model.depth", "refuses model.depth=0: must be at least 1"),
        (of({"model.heads": {"randint": [4, 8]}}), "space.model.heads", "model.heads=5: must divide model.dim: 64 % 5"),
        (of({"model.dim": {"choice": [64, 66]}}), "space.model.dim", "model.dim=66: model.heads (4) must divide"),
        (
            of({"training.lr": {"uniform": [1e-6, 1]}}),
            "space.training.lr",
            "training.min_lr (1e-05) must not be greater",
        ),
        (
            of({"training.batch_size": {"choice": [16, 9]}}, set={"resources.workers": 2}),
            "space.training.batch_size",
            "refuses training.batch_size=9 with resources.workers=2: must be a multiple",
        ),
        (of(LR, set={"training.lrr": 1}), "set.training.lrr", "did you mean 'training.lr'"),
        (of(LR, set={"resources.workers": 3}), "set.resources.workers", "training.batch_size (16) must be a multiple"),
        ({"variants": {"a": {"model.dept": 1}}}, "variants.a.model.dept", "did you mean 'model.depth'"),
        (
            {"variants": {"a": {}, "b": {"training.lr": -1}}},
            "variants.b.training.lr",
            "training.lr=-1: must be greater",
        ),
        (of({"tracking.run": {"choice": ["a", "b"]}}), "space.tracking.run", "the same for the whole sweep"),
        (of({"resources.accelerator": {"choice": ["cpu"]}}), "space.resources.accelerator", "whole sweep"),
        (of(LR, set={"tracking.storage": "x"}), "set.tracking.storage", "whole sweep"),
        (of({"training.seed": {"choice": [1, 2]}}), "space.training.seed", "use `seeds`"),
        (of(LR, set={"training.seed": 3}, seeds=[1]), "set.training.seed", "use `seeds`"),
        ({"variants": {"a": {"training.val_interval": 3}}}, "variants.a.training.val_interval", "interval_steps"),
        ({"space": LR}, "trials", "is missing: random search"),
        ({"space": LR, "searcher": "optuna"}, "trials", "is missing: optuna search"),
        ({"space": LR, "searcher": "grid"}, "searcher", "these are continuous: training.lr"),
        ({"searcher": "grid", "space": {"training.max_steps": {"randint": [1, 10**6]}}}, "searcher", "1000000 points"),
        ({"variants": {"a": {}, "b": {}}, "trials": 3}, "trials", "there are 2"),
        (of(LR, metric=["val_loss", "perplexity"], scheduler="asha"), "scheduler", "asha compares one metric, not 2"),
        (of({"model.depth": {"choice": [1]}, **LR}, scheduler="pbt"), "scheduler", "do not take: model.depth"),
        (of({"training.optimizer": {"choice": ["adamw"]}}, scheduler="pbt"), "scheduler", "take: training.optimizer"),
        ({"variants": {"a": {}}, "scheduler": "pbt"}, "scheduler", "not named variants"),
        (of({"training.lr": {"choice": [1, 2]}}, scheduler="pb2"), "scheduler", "needs continuous dimensions"),
        (of(LR, scheduler="pbt", searcher="optuna"), "searcher", "changes the points"),
        (of(LR, scheduler="pbt", seeds=2), "seeds", "use 1"),
        (of(LR, scheduler={"name": "fifo", "interval_steps": 300}), "scheduler.interval_steps", "max_steps (200)"),
        (of(LR, scheduler={"name": "asha", "grace_steps": 200}), "scheduler.grace_steps", "no trial would ever"),
        (
            of(LR, scheduler={"name": "asha", "grace_steps": 20}, set={"training.val_interval": 10}),
            "set.training.val_interval",
            "report every 20 steps",
        ),
        (of(LR, metric="loss_scale"), "metric", "precision=fp16 only"),
    ],
)
def test_what_a_config_refuses(raw: Any, key: str, text: str) -> None:
    ((found, problem),) = refused(raw).items()
    assert found == key
    assert text in str(problem)


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ({"variants": {"a": {"training.optimizer.name": "lion"}}}, "variants.a.training.optimizer.name"),
        ({"space": {"training.optimizer.name": {"grid": ["adamw", "lion"]}}}, "space.training.optimizer.name"),
        (of(LR, set={"training.optimizer.name": "lion"}), "set.training.optimizer.name"),
    ],
)
def test_another_optimizers_name_over_keys_that_the_config_sets(raw: Any, place: str) -> None:
    tuned = apply_overrides(CONFIG, {"training.optimizer.betas": [0.8, 0.9]})
    with pytest.raises(ConfigError) as error:
        check_space(load_space(raw), tuned)
    ((key, problem),) = by_key(error.value).items()
    assert key == place and "training.optimizer=lion" in problem.hint
    assert "training.optimizer.name=lion: would give lion what is set for adamw: betas ([0.8, 0.9])" in problem.rule
    assert check_space(load_space(raw), CONFIG) == [], "where nothing is set there is nothing to inherit"


def test_only_the_product_shows_that_two_ranges_do_not_fit() -> None:
    found = refused(of({"training.lr": {"loguniform": [1e-4, 1e-2]}, "training.min_lr": {"choice": [0, 1e-3]}}))
    text = str(found["space.training.min_lr"])
    assert "the config refuses training.min_lr=0.001 with training.lr=0.0001: must not be greater" in text
    assert re.search(r"and at \d+ more of \d+ points tried", text)


def test_set_is_judged_together_with_the_points() -> None:
    """Three workers do not fit the config's batch of 16, but every point brings a batch of its own."""
    raw = {"set": {"resources.workers": 3}, "space": {"training.batch_size": {"grid": [9, 12]}}}
    assert check_space(load_space(raw), CONFIG) == []


def test_all_that_a_config_refuses_comes_out_together() -> None:
    found = refused(
        {
            "set": {"model.dept": 1, "tracking.run": "x"},
            "space": {
                "training.lrr": {"choice": [1]},
                "model.depth": {"choice": [0, 2]},
                "model.heads": {"choice": [3]},
            },
            "scheduler": {"name": "asha", "grace_steps": 500},
        }
    )
    assert set(found) == {
        "set.model.dept", "set.tracking.run", "space.training.lrr", "space.model.depth", "space.model.heads",
        "scheduler.grace_steps", "trials",
    }  # fmt: skip


def test_conditions_keep_a_corner_out() -> None:
    heads = {"model.dim": {"choice": [60, 64]}, "model.heads": {"choice": [8, 16], "when": {"model.dim": 64}}}
    # Heads of width 15 cannot be rotated: with 60 the config's own 4 heads are wrong, with 64 nothing is.
    assert set(refused(of(heads))) == {"space.model.dim"}
    heads["model.dim"] = {"choice": [40, 64]}
    assert check_space(load_space(of(heads, trials=3)), CONFIG) == []


def test_doubts() -> None:
    def said(raw: Any) -> str:
        (text,) = check_space(load_space(raw), CONFIG)
        return text

    assert "some of them twice" in said(of({"model.depth": {"choice": [1, 2]}}))
    assert "first compared at step 30" in said(
        of(LR, scheduler={"name": "asha", "grace_steps": 25, "interval_steps": 15})
    )
    assert "write `mode: max`" in said(of(LR, metric="goodput"))
    assert "equal steps" in said(of({**LR, "training.max_steps": {"choice": [150, 200]}}, scheduler="asha"))
    assert said(of({**LR, "training.warmup_steps": {"choice": [0, 300]}})).startswith("at some points, training.warmup")


def test_an_accepted_space_is_never_refused_in_mid_sweep() -> None:
    """Ranges that may or may not fit together: whatever is accepted gives good configs only."""
    accepted = 0
    ranges = {
        "training.lr": st.sampled_from([{"loguniform": [1e-4, 1e-1]}, {"loguniform": [1e-6, 1]}]),
        "training.min_lr": st.sampled_from([{"uniform": [0, 1e-4]}, {"uniform": [0, 0.05], "step": 0.01}]),
        "training.batch_size": st.builds(
            lambda low, count, step: {"randint": [low, low + step * count], "step": step},
            st.integers(1, 12), st.integers(1, 30), st.sampled_from([1, 2, 4, 12]),
        ),
        "training.micro_batch_size": st.sampled_from([{"choice": [1]}, {"choice": [1, 2]}, {"choice": [None, 4]}]),
        "resources.workers": st.sampled_from([{"choice": [1, 2]}, {"randint": [1, 4]}]),
        "model.heads": st.sampled_from([{"choice": [2, 4, 8]}, {"randint": [1, 5]}]),
        "model": st.sampled_from([{"choice": [{"dim": 32, "depth": 2}, {"dim": 96}]}, {"grid": [{"dim": 100}]}]),
        "training.optimizer.betas": st.just({"choice": [[0.9, 0.95], [0.9, 0.99]]}),
    }  # fmt: skip
    keys = st.lists(st.sampled_from(sorted(ranges)), min_size=1, max_size=4, unique=True)

    @settings(max_examples=80)
    @given(keys.flatmap(lambda chosen: st.fixed_dictionaries({key: ranges[key] for key in chosen})))
    def check(body: dict[str, Any]) -> None:
        nonlocal accepted
        space = load_space(of(body))
        try:
            check_space(space, CONFIG)
        except ConfigError:
            return
        accepted += 1
        for index in range(200):
            apply_overrides(CONFIG, {**space.fixed, **space.draw(RandomDraw(99, index))})

    check()
    assert accepted >= 15


def test_metrics_are_what_the_loop_reports(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.training.small_run import small_config, train

    result, _, _ = train(small_config(training__max_steps=10, training__val_interval=5), tmp_path)
    # A loss scale needs fp16, the MFU a GPU whose peak is known, the last two another task.
    assert set(result.final) == set(METRICS) - {"loss_scale", "mfu", "val_accuracy", "val_recall_at_1"}


def test_every_scheduler_is_accepted_somewhere() -> None:
    for name in SCHEDULERS:
        space = load_space(of(LR, scheduler=name))
        assert check_space(space, CONFIG) == []
        assert Space.from_dict(space.to_dict()).scheduler == Scheduler(name)
