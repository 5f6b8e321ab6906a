"""How problems are worded."""

from __future__ import annotations

import pytest

from glowflow.config.errors import ConfigError, DataError, GlowFlowError, Problem, RuleError


def test_a_problem_names_key_rule_value_and_hint() -> None:
    problem = Problem("model.depth", "must be at least 1", 0, "try 4")
    assert str(problem) == "model.depth: must be at least 1 (got 0); try 4"
    assert str(Problem("model", "is required")) == "model: is required"


def test_long_values_are_cut() -> None:
    assert len(str(Problem("k", "r", "x" * 1000))) < 150


def test_one_and_several_problems() -> None:
    one, two = Problem("a", "r"), Problem("b", "r")
    assert str(ConfigError(one, "f.yaml")) == "f.yaml: a: r"
    assert str(ConfigError([one, two], "f.yaml")) == "f.yaml: 2 problems\n  - a: r\n  - b: r"
    assert str(ConfigError([one, two])) == "a: r\nb: r"
    assert str(DataError("plain text")) == "plain text"
    assert issubclass(DataError, GlowFlowError)


def test_rule_errors_are_value_errors_for_pydantic() -> None:
    error = RuleError([Problem("a", "r"), Problem("b", "s")])
    assert str(error) == "a: r; b: s"
    with pytest.raises(ValueError):
        raise error
