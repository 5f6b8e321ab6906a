"""Intervals: against closed forms, and whether 95 % of them hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glowflow.metrics.intervals import bootstrap_interval, normal_interval


def documents(generator: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of uneven length whose loss per token varies; the true ratio is 2."""
    sizes = generator.integers(20, 400, units).astype(float)
    return sizes * generator.normal(2.0, 0.5, units), sizes


def test_equal_sizes_give_the_textbook_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    interval = normal_interval(values, np.ones(400))
    width = 1.959963984540054 * values.std(ddof=1) / math.sqrt(400)
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - width, values.mean() + width))


def test_bootstrap_and_normal_agree_on_many_units() -> None:
    top, bottom = documents(np.random.default_rng(1), 2000)
    a, b = bootstrap_interval(top, bottom, resamples=4000), normal_interval(top, bottom)
    assert a.estimate == b.estimate == top.sum() / bottom.sum()
    assert (a.high - a.low) == pytest.approx(b.high - b.low, rel=0.06)


@pytest.mark.parametrize("method", [normal_interval, bootstrap_interval])
def test_about_95_percent_of_the_intervals_hold_the_truth(method) -> None:
    generator = np.random.default_rng(2)
    options = {"resamples": 300} if method is bootstrap_interval else {}
    held = 0
    for _ in range(300):
        interval = method(*documents(generator, 80), **options)
        held += interval.low <= 2.0 <= interval.high
    assert 0.90 <= held / 300 <= 0.985


def test_seed_decides_and_chunks_do_not(monkeypatch) -> None:
    top, bottom = documents(np.random.default_rng(3), 50)
    first = bootstrap_interval(top, bottom, resamples=100, seed=7)
    assert bootstrap_interval(top, bottom, resamples=100, seed=7) == first
    assert bootstrap_interval(top, bottom, resamples=100, seed=8) != first
    monkeypatch.setattr("glowflow.metrics.intervals._CHUNK_ELEMENTS", 500)
    assert bootstrap_interval(top, bottom, resamples=100, seed=7) == first


def test_a_higher_level_is_wider() -> None:
    top, bottom = documents(np.random.default_rng(4), 60)
    for method in (normal_interval, bootstrap_interval):
        narrow, wide = method(top, bottom, level=0.5), method(top, bottom, level=0.99)
        assert wide.low < narrow.low < narrow.high < wide.high


def test_few_units() -> None:
    assert normal_interval([4.0], [2.0]).high == math.inf
    only = bootstrap_interval([4.0], [2.0])
    assert (only.low, only.estimate, only.high) == (2.0, 2.0, 2.0)
    assert bootstrap_interval([4.0, 0.0], [2.0, 0.0]).estimate == 2.0  # a document without a target


@pytest.mark.parametrize(
    ("top", "bottom", "level"),
    [([], [], 0.9), ([1.0], [1.0, 2.0], 0.9), ([1.0], [0.0], 0.9), ([1.0, 1.0], [2.0, -1.0], 0.9), ([1.0], [1.0], 1.0)],
)
def test_what_makes_no_sense_is_refused(top, bottom, level) -> None:
    for method in (normal_interval, bootstrap_interval):
        with pytest.raises(ValueError, match=r"unit|denominators|level"):
            method(top, bottom, level=level)
