"""Chosen curves of a spool, how far it goes, and what curves come to in one tag."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowflow.tracking import curves as module
from glowflow.tracking.base import Point
from glowflow.tracking.curves import Curve, encode_summary, last_step, parse_summary, read_curves
from glowflow.tracking.spool import Spool, curves, decode_point

names = st.sampled_from(["train_loss", "val_loss", 'odd "name"', "val", "a.b/c", "é"])
points = st.lists(
    st.builds(Point, names, st.integers(0, 30), st.floats(allow_nan=False), st.integers(0, 10**6)), max_size=60
)


def whole_spool(tmp_path_factory, content: list[Point]) -> Path:
    path = tmp_path_factory.mktemp("spool") / "metrics.jsonl"
    Spool(path).append(content)
    return path


@given(points)
def test_chosen_curves_are_those_of_the_whole_spool(tmp_path_factory, content: list[Point]) -> None:
    path = whole_spool(tmp_path_factory, content)
    expected = curves(path)
    found = read_curves(path, ["val_loss", 'odd "name"', "é", "never"])
    assert set(found) == {"val_loss", 'odd "name"', "é", "never"}
    for name, curve in found.items():
        assert {p.step: p.value for p in curve.points} == expected.get(name, {})
        assert [p.step for p in curve.points] == sorted(p.step for p in curve.points)
    assert last_step(path) == max(expected.get("train_loss", {}), default=None)


@given(points)
def test_a_summary_has_last_least_and_greatest_of_every_metric(content: list[Point]) -> None:
    by_name: dict[str, list[Point]] = {}
    for point in {(p.metric, p.step): p for p in content if math.isfinite(p.value)}.values():
        by_name.setdefault(point.metric, []).append(point)
    summary = parse_summary(encode_summary([p for found in by_name.values() for p in found]))
    assert summary.keys() == by_name.keys()
    for name, found in by_name.items():
        curve = summary[name]
        assert not curve.whole and curve.last == max(found, key=lambda p: p.step)
        assert curve.best("min").value == min(p.value for p in found)
        assert curve.best("max").value == max(p.value for p in found)


def test_a_summary_fits_into_a_tag_and_leaves_the_machine_out() -> None:
    many = [Point(f"metric_{number:03d}", step, step / 7, 10**12) for number in range(200) for step in range(3)]
    text = encode_summary([*many, Point("system/cpu_percent", 1, 5.0, 1)])
    assert len(text) <= 8000 and "system" not in text and 10 < len(parse_summary(text)) < 200
    assert parse_summary(None) == parse_summary("[1]") == parse_summary('{"a": 1}') == {}
    assert json.loads(encode_summary([Point("loss", 1, math.nan, 1)])) == {}


def test_best_and_values_at_a_step_and_time() -> None:
    curve = Curve([Point("v", 10, 3.0, 1000), Point("v", 20, math.nan, 2000), Point("v", 30, 2.0, 3000)])
    assert curve.best("min").step == 30 and curve.best("max").step == 10
    assert [curve.at(step=step) and curve.at(step=step).step for step in (9, 10, 29, 99)] == [None, 10, 20, 30]
    assert curve.at(timestamp_ms=2999).step == 20 and curve.at(timestamp_ms=999) is None
    assert Curve([]).best("min") is None and Curve([]).last is None


def test_torn_lines_and_other_metrics_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    Spool(path).append([Point(name, step, 1.0, 1) for step in range(500) for name in ("a", "b", "val_loss", "c")])
    with open(path, "ab") as file:
        file.write(b'{"metric": "val_loss", "step": 5\n{"metric": "val_loss", "step": 500, "value"')
    decoded: list[bytes] = []
    monkeypatch.setattr(module, "decode_point", lambda line: decoded.append(line) or decode_point(line))
    assert len(read_curves(path, ["val_loss"])["val_loss"].points) == 500
    assert len(decoded) == 502
    assert read_curves(path, []) == {} and len(decoded) == 502
    assert last_step(path, "a") == 499 and last_step(tmp_path / "none") is None


def test_the_last_step_is_found_behind_a_long_tail_of_other_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Spool(path).append([Point("train_loss", 7, 1.0, 1), *(Point("system/x", step, 1.0, 1) for step in range(2000))])
    assert path.stat().st_size > module._TAIL_BYTES
    assert last_step(path) == 7
