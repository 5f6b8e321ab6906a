"""Is the difference between two settings more than the seeds? Student-t intervals, Welch's test, Holm's correction.

One value per seed goes in. The t distribution comes from the regularised incomplete beta function by its continued
fraction, so that a machine without scipy gets the same numbers. What too few or odd values give is part of the
interface: one value has no bounds and no test, values that never vary have an interval of width zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from glowflow.metrics.intervals import Interval

__all__ = ["Difference", "holm", "mean_interval", "student_t_p_value", "student_t_quantile", "welch"]

# From here on Hill's expansion has every digit, and the continued fraction would lose them to 1 - x.
_MANY_DEGREES = 1e4
_TINY = 1e-300


@dataclass(frozen=True)
class Difference:
    """Mean of one sample minus the mean of another, its interval, and the test of whether it is zero."""

    difference: float
    low: float
    high: float
    statistic: float
    degrees: float
    p_value: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student-t interval of the mean of independent values, such as the final losses of several seeds.

    One value gives infinite bounds. Equal values give bounds that are the mean. A value that is not finite (or so
    large that its square is not) gives the estimate NaN with infinite bounds: a diverged run has no mean.

    Args:
        values: at least one.
        level: confidence, between 0 and 1.

    Returns:
        The interval, with the method ``t``.

    Raises:
        ValueError: no values, or a level that is none.
    """
    _check(level, values)
    moments = _moments(values)
    if moments is None:
        return Interval(math.nan, -math.inf, math.inf, level, "t")
    mean, variance = moments
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf, level, "t")
    # math.sqrt of the parts: the variance of subnormal values divided by n would vanish.
    half = student_t_quantile(level, len(values) - 1) * math.sqrt(variance) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, level, "t")


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Difference:
    """Welch's t-test of the means of two independent samples whose variances may differ.

    B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
    Biometrika 34 (1947); degrees of freedom after F. E. Satterthwaite, Biometrics Bulletin 2 (1946).

    Where nothing can be tested the p value, statistic and degrees are NaN and the bounds infinite: a sample of one
    value, or one with a value that is not finite (then the difference is NaN too). If no sample varies, equal means
    give p = 1 and other means p = 0, with bounds equal to the difference and n_a + n_b - 2 degrees.

    Args:
        a: values of one setting, at least one.
        b: values of the other.
        level: confidence of the interval of the difference, between 0 and 1.

    Returns:
        mean(a) - mean(b), its interval, and the two-sided test.

    Raises:
        ValueError: an empty sample, or a level that is none.
    """
    _check(level, a, b)
    first, second = _moments(a), _moments(b)
    if first is None or second is None:
        return Difference(math.nan, -math.inf, math.inf, math.nan, math.nan, math.nan)
    difference = first[0] - second[0]
    if len(a) < 2 or len(b) < 2:
        return Difference(difference, -math.inf, math.inf, math.nan, math.nan, math.nan)
    error = math.hypot(math.sqrt(first[1]) / math.sqrt(len(a)), math.sqrt(second[1]) / math.sqrt(len(b)))
    if error == 0:
        statistic = math.copysign(math.inf, difference) if difference else 0.0
        p_value = 0.0 if difference else 1.0
        return Difference(difference, difference, difference, statistic, float(len(a) + len(b) - 2), p_value)
    degrees = _satterthwaite(first[1] / len(a), len(a), second[1] / len(b), len(b))
    half = student_t_quantile(level, degrees) * error
    statistic = difference / error
    p_value = student_t_p_value(statistic, degrees)
    return Difference(difference, difference - half, difference + half, statistic, degrees, p_value)


def _satterthwaite(error_a: float, num_a: int, error_b: float, num_b: int) -> float:
    """Degrees of freedom of a sum of two squared standard errors; from their shares, so that nothing underflows."""
    largest = max(error_a, error_b)
    share_a, share_b = error_a / largest, error_b / largest
    return (share_a + share_b) ** 2 / (share_a**2 / (num_a - 1) + share_b**2 / (num_b - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing all of them at once, by Holm's step-down procedure.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979). To
    call those below 0.05 different is wrong about any of them in at most 5 % of such tables.

    Args:
        p_values: between 0 and 1. NaN (no test was possible) stays NaN and does not count as a test.

    Returns:
        The adjusted values, in the order given, at most 1.

    Raises:
        ValueError: a value outside 0 to 1.
    """
    if wrong := [p for p in p_values if not (math.isnan(p) or 0 <= p <= 1)]:
        raise ValueError(f"p values lie between 0 and 1, not {wrong[0]}")
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, running = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        running = max(running, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = running
    return adjusted


def student_t_p_value(statistic: float, degrees: float) -> float:
    """P(|T| >= |statistic|) for Student's t: the two-sided p value.

    NIST DLMF 8.17: I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + statistic squared).

    Args:
        statistic: any number; NaN gives NaN.
        degrees: of freedom, positive; infinite ones mean the normal distribution.

    Raises:
        ValueError: degrees that are not positive.
    """
    if not degrees > 0:
        raise ValueError(f"degrees of freedom must be positive, not {degrees}")
    if math.isnan(statistic) or statistic == 0:
        return math.nan if math.isnan(statistic) else 1.0
    if degrees >= _MANY_DEGREES:
        return math.erfc(_normal_deviate(abs(statistic), degrees) / math.sqrt(2))
    return _beta_tail(degrees, abs(statistic))


@lru_cache(maxsize=4096)
def student_t_quantile(level: float, degrees: float) -> float:
    """The t for which P(|T| < t) = level.

    Newton's method from the left on the tail, which is convex, so that every step falls short of the answer.

    Args:
        level: between 0 and 1.
        degrees: of freedom, positive.

    Raises:
        ValueError: either is out of its range.
    """
    _check(level)
    t, outside = 0.0, 1 - level
    while True:
        step = (student_t_p_value(t, degrees) - outside) / (2 * _density(t, degrees))
        t += step
        if not step > 4e-16 * t:
            return t


def _density(t: float, degrees: float) -> float:
    """Student's density; of infinite degrees to all digits."""
    a = min(degrees, 1e17) / 2
    return math.exp(_log_gamma_ratio(a) - (a + 0.5) * _log1p_square(t / math.sqrt(2 * a))) / math.sqrt(2 * a * math.pi)


def _normal_deviate(t: float, degrees: float) -> float:
    """The normal deviate of the same tail (G. W. Hill, "Algorithm 395: Student's t-distribution", CACM 13, 1970)."""
    if math.isinf(t) or math.isinf(degrees):
        return t
    a = degrees - 0.5
    b, z = 48 * a * a, a * _log1p_square(t / math.sqrt(degrees))
    series = (((-0.4 * z - 3.3) * z - 24) * z - 85.5) / (0.8 * z * z + 100 + b)
    return math.sqrt(z) * (1 + (z + 3 + series) / b)


def _log1p_square(value: float) -> float:
    """log(1 + value^2), of any size."""
    return math.log1p(value * value) if value < 1 else 2 * math.log(value) + math.log1p(1 / value / value)


def _beta_tail(degrees: float, t: float) -> float:
    """I_x(a, 1/2) with a = degrees / 2 and x = degrees / (degrees + t^2); the sizes of x and 1 - x are kept apart."""
    a, ratio = degrees / 2, t / math.sqrt(degrees)
    if ratio < 1e-20:
        return 1.0
    log_x, log_rest = -_log1p_square(ratio), -_log1p_square(1 / ratio)
    x, rest = math.exp(log_x), math.exp(log_rest)
    # x^a (1 - x)^(1/2) / B(a, 1/2), from logarithms that keep the digits of an x close to 1.
    front = math.exp(a * log_x + 0.5 * log_rest + _log_gamma_ratio(a) - 0.5 * math.log(math.pi))
    if x < (a + 1) / (a + 2.5):
        return min(1.0, front * _continued_fraction(a, 0.5, x) / a)
    return max(0.0, 1 - front * _continued_fraction(0.5, a, rest) / 0.5)


def _log_gamma_ratio(a: float) -> float:
    """log(gamma(a + 1/2) / gamma(a)); by its asymptotic series where the two logarithms would cancel."""
    if a < 15:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    square = a * a
    series = -1 / 8 + (1 / 192 + (-1 / 640 + (17 / 14336 - 31 / 18432 / square) / square) / square) / square
    return 0.5 * math.log(a) + series / a


def _continued_fraction(a: float, b: float, x: float) -> float:
    """The fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method (Thompson & Barnett 1986)."""
    value, c = 1.0, 1.0
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    m = 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            value *= d * c
        if abs(d * c - 1) < 2e-16:
            return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _moments(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and sample variance from exact sums, so that equal values vary by exactly nothing; None: not finite."""
    if not all(math.isfinite(value) for value in values):
        return None
    try:
        exact = [float(value) for value in values]
        mean, variance = statistics.mean(exact), statistics.variance(exact) if len(exact) > 1 else 0.0
    except OverflowError:
        return None
    return (mean, variance) if math.isfinite(variance) else None


def _check(level: float, *samples: Sequence[float]) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, it is {level}")
    if any(not len(sample) for sample in samples):
        raise ValueError("a sample needs at least one value")
