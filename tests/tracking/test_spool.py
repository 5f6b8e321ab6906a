"""The spool: exact values, first one wins, torn lines, readers behind the writer."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.tracking.base import Point
from glowflow.tracking.spool import CheckpointLog, Spool, SpoolTail, curves, read_checkpoints, read_points


def same(a: float, b: float) -> bool:
    return struct.pack("<d", a) == struct.pack("<d", b)


@given(st.lists(st.floats(width=32) | st.floats(width=64), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_values_round_trip_bit_for_bit(tmp_path_factory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("spool") / "metrics.jsonl"
    Spool(path).append([Point("loss", step, value, 7) for step, value in enumerate(values)])
    read = [point.value for point in read_points(path)]
    assert len(read) == len(values)
    assert all((math.isnan(a) and math.isnan(b)) or same(a, b) for a, b in zip(read, values, strict=True))


def test_numpy_float32_is_kept_exactly(tmp_path: Path) -> None:
    value = np.float32(0.1)
    Spool(tmp_path / "m").append([Point("loss", 1, value, 7)])
    assert np.float32(read_points(tmp_path / "m")[0].value) == value
    assert read_points(tmp_path / "m")[0].value == float(value)


def test_first_value_and_timestamp_win_in_one_process_and_after_a_restart(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "m")
    first = [Point("loss", 1, 3.0, 100), Point("loss", 2, 2.0, 200)]
    assert spool.append([*first, Point("loss", 1, 9.0, 150)]) == first
    spool.close()
    again = Spool(tmp_path / "m")
    new = Point("loss", 3, 1.0, 900)
    assert again.append([Point("loss", 2, 2.5, 800), new]) == [new]
    assert read_points(tmp_path / "m") == [*first, new]
    assert curves(tmp_path / "m") == {"loss": {1: 3.0, 2: 2.0, 3: 1.0}}


def test_same_step_of_another_metric_is_another_point(tmp_path: Path) -> None:
    Spool(tmp_path / "m").append([Point("a", 1, 1.0, 1), Point("b", 1, 2.0, 1)])
    assert curves(tmp_path / "m") == {"a": {1: 1.0}, "b": {1: 2.0}}


def test_every_cut_of_the_file_loses_at_most_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m"
    points = [Point("loss", step, 1 / (step + 1), step) for step in range(4)]
    Spool(path).append(points)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert read_points(path) == points[:complete]
        Spool(path).append(points)  # the restarted process replays all of them
        assert read_points(path) == points, cut


def test_garbage_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m"
    Spool(path).append([Point("loss", 1, 1.0, 1)])
    with open(path, "ab") as file:
        file.write(b'\x00\x00\x00\n[1, 2]\n{"metric": "loss", "step": 2}\n\n')
    Spool(path).append([Point("loss", 2, 2.0, 2)])
    assert [point.step for point in read_points(path)] == [1, 2]


def test_two_writers_of_one_spool_give_each_point_once(tmp_path: Path) -> None:
    old, new = Spool(tmp_path / "m"), Spool(tmp_path / "m")  # a worker that was given up and its successor
    old.append([Point("loss", 1, 1.0, 1)])
    new.append([Point("loss", 1, 1.0, 5), Point("loss", 2, 2.0, 6)])
    assert read_points(tmp_path / "m") == [Point("loss", 1, 1.0, 1), Point("loss", 2, 2.0, 6)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_a_tail_gives_every_point_once_whatever_it_reads_at_a_time(tmp_path_factory, sizes, max_bytes) -> None:
    path = tmp_path_factory.mktemp("spool") / "metrics.jsonl"
    tail, spool, written, got = SpoolTail(path), Spool(path), [], []
    for size in sizes:
        batch = [Point("loss", len(written) + i, 0.5, 1) for i in range(size)]
        written += spool.append(batch)
        got += tail.read(max_bytes)
    while more := tail.read(max_bytes):
        got += more
    assert got == written


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "m"
    Spool(path).append([Point("loss", 1, 1.0, 1), Point("loss", 2, 2.0, 2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    tail = SpoolTail(path)
    assert [point.step for point in tail.read()] == [1]
    assert tail.read() == []
    path.write_bytes(whole)
    assert [point.step for point in tail.read()] == [2]


def test_a_tail_goes_on_from_an_offset_and_still_knows_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "m"
    Spool(path).append([Point("loss", step, 1.0, 1) for step in range(50)])
    first = SpoolTail(path)
    read = first.read(1000)
    assert 0 < len(read) < 50
    rest = SpoolTail(path, first.offset)
    with open(path, "ab") as file:  # another writer repeats an old point
        file.write(path.read_bytes().splitlines(keepends=True)[0])
    assert [p.step for p in rest.read()] == list(range(len(read), 50))
    assert len(SpoolTail(path, offset=10**9).read()) == 50  # a hint from another file


def _write_for_ever(path: str) -> None:
    spool, step = Spool(Path(path)), 0
    while True:
        spool.append([Point(name, step, step / 3, step) for name in ("a", "b", "c")])
        step += 1


def test_sigkill_in_the_middle_leaves_whole_points(tmp_path: Path) -> None:
    path = tmp_path / "m"
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(str(path),), daemon=True)
    process.start()
    deadline = time.monotonic() + 10
    while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    table = curves(path)
    steps = len(table["a"])
    assert steps > 50
    assert table["a"] == {step: step / 3 for step in range(steps)}
    Spool(path).append([Point(n, s, s / 3, -1) for s in range(steps + 1) for n in ("a", "b", "c")])
    assert all(list(values) == list(range(steps + 1)) for values in curves(path).values())


def test_checkpoint_log_keeps_each_step_once(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "c")
    assert log.append(10, "/x/step-10", {"val_loss": float("nan")}, "ab")
    assert not log.append(10, "/x/step-10", {}, "ab")
    log.close()
    with open(tmp_path / "c", "ab") as file:
        file.write(b'{"step": 20, "pa')
    assert not CheckpointLog(tmp_path / "c").append(10, "/x/step-10", {}, None)
    assert CheckpointLog(tmp_path / "c").append(20, "/x/step-20", {"val_loss": 1.5}, None)
    events = read_checkpoints(tmp_path / "c")
    kept = [(event.step, event.path, event.sha256) for event in events]
    assert kept == [(10, "/x/step-10", "ab"), (20, "/x/step-20", None)]
    assert math.isnan(events[0].metrics["val_loss"]) and events[1].metrics == {"val_loss": 1.5}
