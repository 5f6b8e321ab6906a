"""Confidence intervals for a ratio of sums (nats per token, bits per byte), resampling whole documents or blocks.

Tokens of one document are not independent, so the document is the unit. Both methods are deterministic: the bootstrap
is seeded, the normal interval closed.

Legend: U units (documents or blocks), R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "bootstrap_interval", "normal_interval"]

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds."""

    estimate: float
    low: float
    high: float
    level: float
    method: str

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


def bootstrap_interval(
    numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of sum(numerators) / sum(denominators) (Efron & Tibshirani 1993, chapter 13).

    Args:
        numerators: (U,) one value per unit, such as the summed loss of a document.
        denominators: (U,) positive sizes, such as its number of targets.
        level: confidence, between 0 and 1.
        resamples: R; each draws U units with replacement.
        seed: of the draws.

    Raises:
        ValueError: no units, shapes differ, or nothing to divide by.
    """
    top, bottom = _checked(numerators, denominators, level)
    units = len(top)
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    step = max(1, _CHUNK_ELEMENTS // units)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        draws = generator.integers(0, units, size=(stop - start, units))
        sums = bottom[draws].sum(axis=1)
        # A resample may hold only units without a target; it says nothing.
        ratios[start:stop] = np.divide(top[draws].sum(axis=1), sums, out=np.full(len(sums), np.nan), where=sums > 0)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high), level, "bootstrap")


def normal_interval(numerators: ArrayLike, denominators: ArrayLike, *, level: float = 0.95) -> Interval:
    """Normal interval of sum(numerators) / sum(denominators), linearised (Cochran 1977, section 6.3).

    Arguments and errors as for ``bootstrap_interval``; a single unit gives an infinite interval.
    """
    top, bottom = _checked(numerators, denominators, level)
    units, ratio = len(top), float(top.sum() / bottom.sum())
    if units < 2:
        return Interval(ratio, -np.inf, np.inf, level, "normal")
    residuals = top - ratio * bottom
    error = float(np.sqrt(units / (units - 1) * np.square(residuals).sum()) / bottom.sum())
    width = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(ratio, ratio - width, ratio + width, level, "normal")


def _checked(
    numerators: ArrayLike | Sequence[float], denominators: ArrayLike | Sequence[float], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or not len(top):
        raise ValueError(f"each unit needs a numerator and a denominator, not shapes {top.shape} and {bottom.shape}")
    if (bottom < 0).any() or not bottom.sum() > 0:
        raise ValueError("denominators must not be negative, and not all zero")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, it is {level}")
    return top, bottom
