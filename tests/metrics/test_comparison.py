"""Comparisons of seeds: against scipy over wide ranges, against printed examples, and by what the tests promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from glowflow.metrics.comparison import holm, mean_interval, student_t_p_value, student_t_quantile, welch

DEGREES = [1, 1.01, 1.3, 2, 2.5, 3, 5, 9.7, 29.9, 30, 31, 100, 1e3, 9999, 10001, 1e6, 1e9, math.inf]
STATISTICS = [1e-3, 0.1, 0.5, 1, 1.5, 1.7, 1.73, 1.8, 2, 3, 5, 10, 37, 1e3, 1e8]
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@pytest.mark.parametrize("degrees", DEGREES)
def test_p_values_agree_with_scipy(degrees: float) -> None:
    for statistic in STATISTICS:
        expected = 2 * float(stats.t.sf(statistic, degrees))
        assert student_t_p_value(statistic, degrees) == pytest.approx(expected, rel=1e-10, abs=1e-290), statistic
        assert student_t_p_value(-statistic, degrees) == student_t_p_value(statistic, degrees)


@pytest.mark.parametrize("degrees", DEGREES)
def test_quantiles_agree_with_scipy(degrees: float) -> None:
    for level in (0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999):
        expected = float(stats.t.ppf((1 + level) / 2, degrees))
        assert student_t_quantile(level, degrees) == pytest.approx(expected, rel=1e-10), level


def test_closed_forms_of_one_and_two_degrees() -> None:
    """Where scipy itself loses digits: t close to 0, and tails beyond its tables (Cauchy and its neighbour)."""
    for t in (1e-200, 1e-12, 1e-8, 0.3, 1.0, 40.0, 1e9, 1e200):
        tail = 1 - 2 / math.pi * math.atan(t) if t < 1 else 2 / math.pi * math.atan(1 / t)
        assert student_t_p_value(t, 1) == pytest.approx(tail, rel=1e-13)
        root = math.hypot(math.sqrt(2), t)
        assert student_t_p_value(t, 2) == pytest.approx(2 / root / (root + t), rel=1e-13)


def test_edges_of_the_t_distribution() -> None:
    assert student_t_p_value(0.0, 3) == 1.0
    assert student_t_p_value(math.inf, 3) == student_t_p_value(-math.inf, 1e7) == 0.0
    assert math.isnan(student_t_p_value(math.nan, 3))
    for degrees in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            student_t_p_value(1.0, degrees)


@given(VALUES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_intervals_agree_with_scipy(values: list[float], level: float) -> None:
    interval = mean_interval(values, level)
    error = float(stats.sem(values))
    low, high = stats.t.interval(level, len(values) - 1, np.mean(values), error) if error else (np.mean(values),) * 2
    assert interval.method == "t" and interval.level == level
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert interval.low <= interval.estimate <= interval.high


@given(VALUES, VALUES, st.sampled_from([0.9, 0.95]))
def test_welch_agrees_with_scipy(a: list[float], b: list[float], level: float) -> None:
    if min(np.std(a), np.std(b)) < 1e-6:
        return  # scipy warns of what is rounding there
    ours, theirs = welch(a, b, level), stats.ttest_ind(a, b, equal_var=False)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-8, abs=1e-10)
    assert ours.degrees == pytest.approx(theirs.df, rel=1e-8)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-7, abs=1e-12)
    bounds = theirs.confidence_interval(level)
    assert (ours.low, ours.high) == pytest.approx((bounds.low, bounds.high), rel=1e-7, abs=1e-7)


def test_welch_by_hand() -> None:
    """Variances 1 and 4 of 4 and 2 values: error^2 = 1/4 + 2, degrees = 2.25^2 / (0.0625 / 3 + 4)."""
    half = math.sqrt(1.5) / math.sqrt(2)
    a = [5 - half, 5 - half, 5 + half, 5 + half]
    b = [2 - math.sqrt(2), 2 + math.sqrt(2)]
    found = welch(a, b)
    assert found.difference == pytest.approx(3.0)
    assert found.statistic == pytest.approx(3 / 1.5)
    assert found.degrees == pytest.approx(2.25**2 / (0.25**2 / 3 + 2**2))


def test_swapped_samples_change_only_the_sign() -> None:
    a, b = [1.0, 1.2, 0.9], [1.5, 1.9, 1.4, 1.6]
    there, back = welch(a, b), welch(b, a)
    assert (there.difference, there.low, there.high) == (-back.difference, -back.high, -back.low)
    assert there.p_value == back.p_value


def test_one_value_has_no_bounds_and_no_test() -> None:
    alone = mean_interval([2.5])
    assert (alone.estimate, alone.low, alone.high) == (2.5, -math.inf, math.inf)
    for a, b in (([2.5], [2.0, 2.1]), ([2.0, 2.1], [2.5]), ([2.5], [2.5])):
        found = welch(a, b)
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert math.isnan(found.p_value) and math.isnan(found.statistic) and math.isnan(found.degrees)
        assert math.isfinite(found.difference)


def test_values_that_never_vary() -> None:
    same = [1.1, 1.1, 1.1]  # whose sum in float64 is not three times 1.1
    interval = mean_interval(same)
    assert (interval.low, interval.estimate, interval.high) == (1.1, 1.1, 1.1)
    equal = welch(same, [1.1, 1.1])
    assert (equal.difference, equal.low, equal.high, equal.p_value, equal.statistic) == (0, 0, 0, 1, 0)
    other = welch(same, [1.5, 1.5])
    assert (other.p_value, other.degrees, other.statistic) == (0.0, 3.0, -math.inf)
    assert other.low == other.high == other.difference == pytest.approx(-0.4)
    one_varies = welch(same, [1.0, 1.2, 1.4, 1.6])
    assert one_varies.degrees == pytest.approx(3.0) and 0 < one_varies.p_value < 1


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300])
def test_a_diverged_run_has_no_mean(odd: float) -> None:
    interval = mean_interval([2.0, 2.1, odd, -odd])
    assert math.isnan(interval.estimate) and (interval.low, interval.high) == (-math.inf, math.inf)
    for found in (welch([2.0, odd, 2.0], [1.0, 2.0]), welch([1.0, 2.0], [2.0, odd, 2.0])):
        assert math.isnan(found.difference) and math.isnan(found.p_value)
        assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e-20, 1e20, 1e100, 1e150])
def test_units_do_not_matter(scale: float) -> None:
    a, b = [1.0, 1.25, 0.75], [1.5, 2.0, 1.75, 1.25]
    plain, scaled = welch(a, b), welch([x * scale for x in a], [x * scale for x in b])
    assert scaled.p_value == pytest.approx(plain.p_value, rel=1e-12)
    assert scaled.low == pytest.approx(plain.low * scale, rel=1e-12)


def test_what_makes_no_sense_is_refused() -> None:
    for call in (lambda: mean_interval([]), lambda: welch([], [1.0, 2.0]), lambda: welch([1.0, 2.0], [])):
        with pytest.raises(ValueError, match="at least one value"):
            call()
    for level in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="level"):
            mean_interval([1.0, 2.0], level)
        with pytest.raises(ValueError, match="level"):
            welch([1.0, 2.0], [1.0, 2.0], level)


def test_about_95_percent_of_the_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = difference_held = 0
    for _ in range(1000):
        a, b = generator.normal(2.0, 0.1, 3).tolist(), generator.normal(1.0, 0.5, 5).tolist()
        interval, difference = mean_interval(a), welch(a, b)
        held += interval.low <= 2.0 <= interval.high
        difference_held += difference.low <= 1.0 <= difference.high
    assert 930 <= held <= 970
    assert 925 <= difference_held <= 970


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own step-down
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_passes_over_what_was_not_tested() -> None:
    first, middle, last = holm([0.02, math.nan, 0.03])
    assert (first, last) == pytest.approx((0.04, 0.04))
    assert math.isnan(middle)
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, 1.5])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    bonferroni = [min(1.0, len(p_values) * p) for p in p_values]
    assert all(p <= a <= b for p, a, b in zip(p_values, adjusted, bonferroni, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_keeps_the_error_of_a_whole_table_at_5_percent() -> None:
    """Nine settings that are all the same: a table in which any is called different is an error."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        samples = generator.normal(2.0, 0.1, (9, 4)).tolist()
        adjusted = holm([welch(samples[0], other).p_value for other in samples[1:]])
        wrong += min(adjusted) < 0.05
    assert wrong / 400 <= 0.075
