"""Clustered and paired intervals: known answers, coverage, and what pairing gains."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glowflow.metrics.clusters import (
    accuracy_interval,
    group_numbers,
    group_sums,
    perplexity_interval,
    perplexity_ratio,
)
from glowflow.metrics.intervals import bootstrap_interval


def test_groups_are_numbered_as_they_come() -> None:
    assert group_numbers(["b", "a", "b", None, 3, "a"]).tolist() == [0, 1, 0, 2, 3, 1]
    sums, counts, tables = group_sums([0, 1, 0, 2], [1.0, 2, 3, 4], np.ones(4), np.eye(4))
    assert sums.tolist() == [4, 2, 4] and counts.tolist() == [2, 1, 1]
    assert tables.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert len(group_sums([], [])[0]) == 0


def test_accuracy_is_the_share_of_right_answers() -> None:
    found = accuracy_interval([1, 0, 1, 1], [0, 1, 2, 3])
    assert found.estimate == 0.75 and 0 <= found.low < 0.75 < found.high <= 1
    assert accuracy_interval([True] * 9, range(9)).low == 1


def test_samples_that_belong_together_say_less() -> None:
    """Ten copies of each answer: intervals over samples would be too narrow by the root of ten."""
    answers = np.random.default_rng(0).random(200) < 0.6
    copies, groups = np.repeat(answers, 10), np.repeat(np.arange(200), 10)
    once, clustered = accuracy_interval(answers, range(200)), accuracy_interval(copies, groups)
    assert (clustered.low, clustered.high) == (once.low, once.high)
    naive = accuracy_interval(copies, range(2000))
    assert (once.high - once.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(10), rel=0.1)


def test_the_clustered_interval_covers_the_truth() -> None:
    """Speakers of different difficulty, ten recordings each: about 95 of 100 intervals hold the true rate."""
    generator, held = np.random.default_rng(3), 0
    groups = np.repeat(np.arange(40), 10)
    for seed in range(120):
        rates = generator.beta(2, 1, 40)  # mean 2/3
        correct = generator.random(400) < rates[groups]
        found = accuracy_interval(correct, groups, resamples=400, seed=seed)
        held += found.low <= 2 / 3 <= found.high
    assert 105 <= held <= 120


def test_perplexity_and_ratio_by_hand() -> None:
    nll, other, weights = [2.0, 4.0, 6.0], [3.0, 6.0, 9.0], [1.0, 2.0, 3.0]
    assert perplexity_interval(nll, weights, [0, 1, 2]).estimate == pytest.approx(math.exp(2))
    ratio = perplexity_ratio(nll, other, weights, [0, 0, 1])
    assert ratio.estimate == pytest.approx(math.exp(-1))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(-1),) * 2)  # the same difference in each sample
    assert perplexity_interval([1e6, 1e6], [1, 1], [0, 1]).estimate == math.inf
    with pytest.raises(ValueError, match="not all zero"):
        perplexity_interval([1.0], [0.0], [0])


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(5)
    weights = generator.integers(5, 15, 400).astype(float)
    right = weights * generator.gamma(4, 1, 400)
    wrong = right + weights * generator.normal(0.1, 0.1, 400)
    groups = np.repeat(np.arange(100), 4)
    found = perplexity_ratio(right, wrong, weights, groups)
    assert found.low < found.estimate < found.high < 1
    assert found.estimate == pytest.approx(math.exp((right - wrong).sum() / weights.sum()))
    alone = [perplexity_interval(one, weights, groups) for one in (right, wrong)]
    assert alone[0].high > alone[1].low  # side by side they overlap
    differences, sizes = group_sums(groups, right - wrong, weights)
    plain = bootstrap_interval(differences, sizes)
    assert (found.low, found.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)))
