"""YAML 1.2 scalars, duplicate keys, and the way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError
from glowflow.config.yaml12 import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("4_194_304", 4194304),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("null", None),
        ("2026-11-22", "2026-11-22"),
        ("12:30:00", "12:30:00"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("[0.9, 1e-2]", [0.9, 0.01]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("http://localhost:5000", "http://localhost:5000"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


def test_infinity_is_a_float() -> None:
    assert parse_yaml("-.inf", "x") == float("-inf")


def test_anchors_and_merge_keys_work() -> None:
    text = "base: &b {lr: 1e-3, steps: 5}\nother: {<<: *b, steps: 6}\n"
    assert parse_yaml(text, "x")["other"] == {"lr": 1e-3, "steps": 6}


def test_every_duplicate_key_is_named_with_its_lines() -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml("model:\n  depth: 3\n  depth: 4\ndata: {context: 5, context: 5}\n", "f.yaml")
    first, second = error.value.problems
    assert first.key == second.key == "f.yaml"
    assert "'depth'" in first.rule and "line 2" in first.rule and "line 3" in first.rule
    assert "'context'" in second.rule and "line 4" in second.rule


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1\nb: 2", "line 2, column 2"),
        ("a: b: c", "line 1, column 5"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a: 1\n---\nb: 2", "line 2, column 1"),
        ("a: !!python/object/apply:os.getcwd []", "line 1, column 4"),
    ],
)
def test_syntax_errors_have_line_and_column(text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        parse_yaml(text, "f.yaml")


@pytest.mark.parametrize(("text", "rule"), [("a: &x {b: *x}", "contains itself"), ("[" * 5000, "too deeply")])
def test_structures_without_end_are_refused(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse_yaml(text, "f.yaml")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
_TRICKY = st.sampled_from(
    ["1e3", "0x1f", "0o7", "no", "~", "", "2026-01-01", "12:30", "1_000", ".5", "<<", "a: b", "#"]
)


@given(
    st.recursive(
        _SCALARS | _TRICKY,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TRICKY | st.text(max_size=6), inner, max_size=3),
        max_leaves=12,
    )
)
def test_what_is_written_is_read_back_equal(value: object) -> None:
    assert parse_yaml(dump_yaml(value), "x") == value
