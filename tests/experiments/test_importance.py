"""Importance of parameters: known functions are found out, noise and too little data are refused with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glowflow.experiments.importance import MIN_ROWS, explain, importance

Row = dict[str, Any]


def points(count: int, seed: int = 0) -> list[Row]:
    """Points of a mixed space: a logarithmic number, an idle one, a category, a mapping, a conditional key."""
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(count):
        row: Row = {
            "lr": float(10 ** generator.uniform(-4, -1)),
            "idle": float(generator.uniform(0, 1)),
            "schedule": str(generator.choice(["cosine", "wsd", "constant"])),
            "model": {"dim": 128, "depth": int(generator.choice([2, 4]))},
        }
        if row["schedule"] == "wsd":
            row["decay"] = float(generator.uniform(0.1, 0.5))
        rows.append(row)
    return rows


def bowl(row: Row) -> float:
    return (math.log10(row["lr"]) + 2.5) ** 2


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (bowl, "lr"),
        (lambda row: 1.0 if row["schedule"] == "cosine" else 0.0, "schedule"),
        (lambda row: 0.1 * row["model"]["depth"], "model"),
    ],
)
def test_what_decides_comes_first(function: Callable[[Row], float], wanted: str) -> None:
    rows = points(60)
    noise = np.random.default_rng(1).normal(0, 0.02, len(rows))
    found = importance(rows, [function(row) + float(n) for row, n in zip(rows, noise, strict=True)])
    assert found[0].key == wanted
    assert found[0].mean > 0.5 and found[0].mean > 3 * found[0].std
    others = {one.key: one for one in found[1:]}
    # `decay` is there with the schedule `wsd` alone, so it can stand in for it.
    assert all(abs(one.mean) < 0.15 for key, one in others.items() if key != "decay")


def test_a_conditional_parameter_counts_where_it_is_set() -> None:
    rows = points(120)
    found = importance(rows, [row.get("decay", 0.3) ** 2 for row in rows])
    assert found[0].key == "decay" and found[0].mean > 0.3


def test_the_answer_is_the_same_each_time_and_depends_on_the_seed() -> None:
    rows = points(24)
    values = [bowl(row) for row in rows]
    assert importance(rows, values) == importance(rows, values)
    assert importance(rows, values) != importance(rows, values, seed=1)


def test_the_scale_of_the_metric_does_not_matter_nor_one_diverged_trial() -> None:
    rows = points(40)
    values = [bowl(row) for row in rows]
    plain = importance(rows, values)
    assert plain
    assert importance(rows, [math.exp(value) for value in values]) == plain
    worst = max(range(len(values)), key=values.__getitem__)
    assert importance(rows, [1e9 if i == worst else value for i, value in enumerate(values)]) == plain


def test_points_without_a_finite_value_are_left_out() -> None:
    rows = points(26)
    values = [bowl(row) for row in rows]
    kept = explain(rows[:24], values[:24])
    assert explain(rows, [*values[:24], math.nan, math.inf]) == kept
    assert kept.num_rows == 24


@pytest.mark.parametrize(
    ("rows", "values", "says"),
    [
        (points(MIN_ROWS - 1), [bowl(row) for row in points(MIN_ROWS - 1)], "at least 8 points .* there are 7"),
        ([], [], "there are 0"),
        (points(9), [1.0] * 7 + [math.nan] * 2, "there are 7"),
        ([{"lr": 1e-3}] * 10, list(range(10)), "a parameter that varies"),
        (points(10), [2.0] * 10, "a metric that varies"),
        (points(30), np.random.default_rng(3).normal(size=30).tolist(), "hardly predict the metric of unseen points"),
    ],
)
def test_it_refuses_with_the_reason(rows: list[Row], values: list[float], says: str) -> None:
    found = explain(rows, values)
    assert found.importances == [] == importance(rows, values)
    assert found.reason is not None and re.search(says, found.reason)
    assert found.to_dict()["reason"] == found.reason


def test_each_point_needs_a_value() -> None:
    with pytest.raises(ValueError, match="each point needs one value"):
        importance(points(9), [1.0])
