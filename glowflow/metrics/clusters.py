"""Samples that belong together (captions of one picture, recordings of one speaker) counted as one in intervals.

Such samples are not independent, so intervals resample whole groups. Two models, or one model with and without
something, are compared on the same samples: the interval is that of the difference of each group, which is far
narrower than two intervals side by side.

Legend: N samples, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glowflow.metrics.intervals import Interval, bootstrap_interval

__all__ = ["accuracy_interval", "group_numbers", "group_sums", "perplexity_interval", "perplexity_ratio"]


def group_numbers(names: Sequence[Hashable]) -> NDArray[np.int64]:
    """(N,) the group of each sample, numbered 0 to G - 1 in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def group_sums(groups_n: ArrayLike, *values: ArrayLike) -> list[NDArray[np.float64]]:
    """The sum over each group of each of the values, (G,) each; (N, K) values give (G, K).

    Args:
        groups_n: (N,) numbers from 0; one that no sample has gives a sum of 0.
        values: one number, or K, per sample.
    """
    groups = np.asarray(groups_n, np.int64)
    sums = []
    for value in values:
        given = np.asarray(value, np.float64)
        total = np.zeros((int(groups.max()) + 1 if len(groups) else 0, *given.shape[1:]))
        np.add.at(total, groups, given)
        sums.append(total)
    return sums


def accuracy_interval(correct_n: ArrayLike, groups_n: ArrayLike, **options: Any) -> Interval:
    """The share of right answers; ``options`` (level, resamples, seed) are those of ``bootstrap_interval``.

    Args:
        correct_n: (N,) 1 or True where the answer is right.
        groups_n: (N,) the group of each sample.

    Raises:
        ValueError: there is no sample.
    """
    correct = np.asarray(correct_n, np.float64)
    right, size = group_sums(groups_n, correct, np.ones(len(correct)))
    return bootstrap_interval(right, size, **options)


def perplexity_interval(nll_n: ArrayLike, weights_n: ArrayLike, groups_n: ArrayLike, **options: Any) -> Interval:
    """exp of the loss per target over all samples, resampling groups.

    Args:
        nll_n: (N,) weighted sum of the negative log-likelihoods of each sample, in nats.
        weights_n: (N,) sum of its weights.
        groups_n, options: as above.

    Raises:
        ValueError: there is no target.
    """
    nll, weights = group_sums(groups_n, nll_n, weights_n)
    return _exponential(bootstrap_interval(nll, weights, **options))


def perplexity_ratio(
    nll_n: ArrayLike, other_n: ArrayLike, weights_n: ArrayLike, groups_n: ArrayLike, **options: Any
) -> Interval:
    """Perplexity over another perplexity on the same targets, with its paired interval.

    The ratio is exp of the mean difference of the losses; groups are resampled with both of their losses.

    Args:
        nll_n: (N,) weighted sums of negative log-likelihoods in nats.
        other_n: (N,) those to compare with.
        weights_n, groups_n, options: as above.

    Returns:
        Below 1 where the first is better: 0.8 is a perplexity lower by 20 %.
    """
    difference = np.asarray(nll_n, np.float64) - np.asarray(other_n, np.float64)
    sums, weights = group_sums(groups_n, difference, weights_n)
    return _exponential(bootstrap_interval(sums, weights, **options))


def _exponential(interval: Interval) -> Interval:
    """Quantiles stay quantiles, since exp does not change their order."""
    estimate, low, high = (_exp(value) for value in (interval.estimate, interval.low, interval.high))
    return replace(interval, estimate=estimate, low=low, high=high)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else value if math.isnan(value) else math.inf
