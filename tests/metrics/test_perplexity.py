"""The arithmetic of loss, perplexity and bits per byte."""

from __future__ import annotations

import math

import pytest

from glowflow.metrics.perplexity import bits_per_byte, mean_nll, perplexity


def test_a_uniform_guess_over_v_tokens_has_perplexity_v() -> None:
    assert perplexity(10 * math.log(65), 10) == pytest.approx(65)
    assert mean_nll(10 * math.log(65), 10) == pytest.approx(math.log(65))


def test_a_uniform_guess_over_bytes_needs_eight_bits() -> None:
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_bits_per_byte_do_not_depend_on_how_the_text_is_cut_into_tokens() -> None:
    # Two bytes at 3 bits each, as two tokens or as one.
    assert bits_per_byte(2 * 3 * math.log(2), 2) == bits_per_byte(6 * math.log(2), 2) == pytest.approx(3)


def test_extremes() -> None:
    assert perplexity(1e6, 1) == math.inf and perplexity(math.inf, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 1))
    assert perplexity(0.0, 5) == 1.0
    with pytest.raises(ValueError, match="at least one target"):
        mean_nll(1.0, 0)
    with pytest.raises(ValueError, match="bytes"):
        bits_per_byte(1.0, 0)
