"""``glowflow bench attention``: the grid, what is found from the times, memory, and a real run of tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glowflow.benchmark import attention as benchmark
from glowflow.benchmark.attention import bench_attention
from glowflow.benchmark.attention_grid import read_grid
from glowflow.benchmark.attention_options import KINDS, PASSES
from glowflow.benchmark.attention_passes import Case, Shape, prepare, timed
from glowflow.benchmark.attention_results import dense_up_to, growth, left_out, relative_to_dense, table_rows
from glowflow.benchmark.memory import Apart, DoesNotFit, available_memory, out_of_memory, peak_memory
from glowflow.config.errors import ConfigError
from glowflow.core.attention.flops import run_flops

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, heads=2, kv_heads=1, head_dim=8, window=8, dtype="float32", device="cpu")
TINY = {"lengths": "16,32", "positions": "8,24", "heads": "2", "head-dim": "8", "window": "8", "device": "cpu"}


# --- the grid ------------------------------------------------------------------------------------------------------


def test_defaults_of_the_grid() -> None:
    grid = read_grid({"device": "cpu"})
    assert grid.kinds == ("dense", "windowed", "sparse", "linear") and grid.passes == PASSES
    assert grid.lengths == tuple(1024 * 2**n for n in range(7)) and grid.positions[-1] == 32768
    assert grid.shape == Shape(1, 4, 4, 64, 256, "float32", "cpu")
    assert read_grid({"device": "cpu", "memory-limit": "0.5"}).memory_limit == 2**29


def test_everything_that_is_wrong_is_told_at_once() -> None:
    wrong = {"kinds": "dense,round", "lengths": "1k", "dtype": "int8", "batch": "0", "passes": "", "device": "tpu"}
    with pytest.raises(ConfigError) as caught:
        read_grid({**wrong, "most-seconds": "-1", "backends": "sdpa,flash_attn_3", "passes": "sideways"})
    keys = [problem.key for problem in caught.value.problems]
    assert sorted(keys) == sorted(
        ["--kinds", "--lengths", "--dtype", "--batch", "--device", "--most-seconds", "--backends", "--passes"]
    )


def test_sizes_that_no_model_may_have_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match=r"must divide model\.heads"):
        read_grid({**TINY, "kv-heads": "3"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_prepared_and_run(kind: str) -> None:
    backend = "chunk" if kind.startswith("linear") else "sdpa"
    output = prepare(SHAPE, Case(kind, backend, "forward"), 40, 1).run()
    assert isinstance(output, torch.Tensor) and output.shape == (1, 2, 40, 8) and bool(output.isfinite().all())
    gradients = prepare(SHAPE, Case(kind, backend, "backward"), 40, 1).run()
    assert isinstance(gradients, tuple) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    decode = prepare(SHAPE, Case(kind, backend, "decode"), 40, 3)
    for _ in range(3):
        step = decode.run()
    assert isinstance(step, torch.Tensor) and step.shape == (1, 1, 16)


def test_a_cache_has_room_for_the_steps_that_were_asked_for_and_no_more() -> None:
    decode = prepare(SHAPE, Case("dense", "sdpa", "decode"), 5, 2)
    assert len(timed(decode.run, CPU, 2)) == 2
    with pytest.raises(ConfigError, match="the cache holds 8 positions"):
        decode.run()


def test_decoding_is_timed_at_its_position() -> None:
    """What a step attends to: all positions before it; of a window the ring; of a recurrence its state."""
    held = {
        (kind, position): prepare(SHAPE, Case(kind, backend, "decode"), position, 1).cache_bytes
        for kind, backend in (("dense", "sdpa"), ("windowed", "sdpa"), ("linear", "chunk"))
        for position in (32, 64)
    }
    assert held["dense", 32] == 2 * 4 * 8 * (32 + 2) and held["dense", 64] == 2 * 4 * 8 * (64 + 2)
    assert held["windowed", 32] == held["windowed", 64] == 2 * 4 * 8 * 8
    assert held["linear", 32] == held["linear", 64]


# --- what the times say --------------------------------------------------------------------------------------------


def row(kind: str, length: int, rounds: list[float], which: str = "backward", **more: Any) -> dict[str, Any]:
    ms = sorted(rounds)[len(rounds) // 2] if rounds else None
    base = {"kind": kind, "backend": "sdpa", "chosen": True, "pass": which, "length": length, "reason": None}
    return {**base, "ms": ms, "rounds": rounds, "tflops": 0.5, "peak_bytes": 2**20, "cache_bytes": None, **more}


def test_ratios_are_paired_by_round_so_that_drift_cancels() -> None:
    # The machine gets twice as slow after the first round; the window is always four times as fast.
    rows = [row("dense", 64, [8.0, 16.0, 16.0]), row("windowed", 64, [2.0, 4.0, 4.0]), row("windowed", 128, [5.0] * 3)]
    assert relative_to_dense(rows) == [1.0, 4.0, None]


def test_growth_is_the_exponent_of_the_length() -> None:
    rows = [row("dense", length, [length**2 / 7]) for length in (64, 128, 512)]
    (found,) = growth([*rows, row("windowed", 64, [1.0])])
    assert found["exponent"] == pytest.approx(2) and found["steps"] == pytest.approx([2, 2])
    assert (found["from"], found["to"]) == (64, 512)
    steady = growth([row("linear", p, [ms], "decode") for p, ms in ((1, 1.0), (2, 1.1), (4, 0.95))])
    assert steady[0]["spread"] == pytest.approx(0.1)


def test_dense_pays_until_the_window_is_faster_by_a_tenth() -> None:
    gains = {32: 0.8, 64: 1.09, 128: 1.3, 256: 1.0}
    rows = [row("windowed", length, [1.0], speed_relative_to_dense=gain) for length, gain in gains.items()]
    assert dense_up_to(rows, window=16) == 64
    assert dense_up_to(rows, window=128) == 256  # a sequence inside the window is dense anyhow
    assert dense_up_to(rows, window=300) == 300
    assert dense_up_to([{**r, "speed_relative_to_dense": None} for r in rows], window=16) is None
    assert dense_up_to([{**r, "pass": "forward"} for r in rows], window=16) is None


def test_the_table_holds_what_was_measured_and_the_reasons_stand_below() -> None:
    rows = [
        row("dense", 64, [2.0]),
        *(row("dense", n, [], reason="is not installed", backend="flex") for n in (64, 128)),
    ]
    for one in rows:
        one["speed_relative_to_dense"] = 1.0 if one["ms"] else None
    headers, cells = table_rows(rows)
    assert headers[5] == "GFLOP/s" and cells == [["backward", 64, "dense", "sdpa", 2.0, 500.0, 1.0, 1.0]]
    assert left_out(rows) == ["dense, flex (backward 64 to 128): is not installed"]


def test_a_length_is_foreseen_from_the_shorter_ones() -> None:
    def entry(length: int, seconds: float | None, reason: str | None = None) -> benchmark._Entry:
        tried = None if seconds is None else benchmark._Tried(seconds, 0, None)
        return benchmark._Entry(Case("dense", "sdpa", "forward"), length, True, "", reason, tried)

    assert benchmark._foreseen([], 64, 1.0) is None
    assert benchmark._foreseen([entry(64, 0.2)], 128, 1.0) is None
    assert benchmark._foreseen([entry(64, 0.3)], 128, 1.0) == "left out: about 1 s a pass, with --most-seconds 1"
    assert benchmark._foreseen([entry(32, 0.15), entry(64, 0.3)], 128, 1.0) is None  # it grew linearly
    late = benchmark._foreseen([entry(64, None, "does not fit")], 128, 1.0)
    assert late == "as at 64 positions: does not fit"
    assert benchmark._foreseen([entry(128, None, late)], 256, 1.0) == late


# --- memory --------------------------------------------------------------------------------------------------------


def _hold(megabytes: int) -> int:
    with out_of_memory(CPU):
        return torch.ones(megabytes, 2**18).nbytes


def _die() -> None:
    os._exit(9)


def _measured() -> int:
    kept = torch.ones(2**18)

    def call() -> torch.Tensor:
        first = kept + 1  # 1 MiB
        second = first * 2  # 2 MiB held
        del first
        return second + 1  # 2 MiB held again

    return peak_memory(call, CPU)


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    child = Apart(memory_limit=2**29)
    yield child
    child.close()


def test_peak_memory_is_the_most_that_is_held_at_a_time(apart: Apart) -> None:
    # In a child, where the profiler's notes go nowhere; the numbers 1 and 2 are a few bytes themselves.
    assert apart(_measured) == pytest.approx(2 * 2**20, abs=256)


def test_a_child_that_needs_too_much_or_dies_says_so_and_the_next_call_runs(apart: Apart) -> None:
    assert apart(_hold, 16) == 16 * 2**20
    if sys.platform == "linux":
        with pytest.raises(DoesNotFit, match="does not fit in memory"):
            apart(_hold, 4096)
    with pytest.raises(DoesNotFit, match="the system ended the process"):
        apart(_die)
    assert apart(_hold, 1) == 2**20


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), out_of_memory(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_available_memory_is_at_most_what_the_machine_has() -> None:
    available = available_memory()
    assert available is not None and 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    kinds = {"kinds": "dense,windowed,linear", "backends": "auto,sdpa,fla", "repeat": "2", "memory-limit": "1"}
    return bench_attention(read_grid({**TINY, **kinds}))


def test_every_case_is_a_row_with_a_time_or_a_reason(document: dict[str, Any]) -> None:
    rows = document["rows"]
    assert all((row["ms"] is None) == (row["reason"] is not None) for row in rows)
    measured = {(row["kind"], row["backend"], row["pass"], row["length"]) for row in rows if row["ms"]}
    for kind, backend in (("dense", "sdpa"), ("windowed", "sdpa"), ("linear", "chunk")):
        expected = {(kind, backend, which, n) for which in ("forward", "backward") for n in (16, 32)}
        assert expected | {(kind, backend, "decode", n) for n in (8, 24)} <= measured
    refused = {(row["kind"], row["backend"]): row["reason"] for row in rows if row["reason"]}
    assert refused["linear", "sdpa"] == "no kernel of this name computes kind linear"
    assert "CUDA" in refused["linear", "fla"]
    json.dumps(document, allow_nan=False)


def test_speeds_come_from_the_flops_of_the_spec(document: dict[str, Any]) -> None:
    found = next(r for r in document["rows"] if (r["kind"], r["pass"], r["length"]) == ("windowed", "backward", 32))
    spec = Shape(1, 2, 2, 8, 8, "float32", "cpu").spec("windowed")
    assert found["tflops"] * 1e12 * found["ms"] / 1000 == pytest.approx(run_flops(spec, 32, 32, backward=True))
    assert len(found["rounds"]) == 2 and found["peak_bytes"] > 0
    dense = [r for r in document["rows"] if r["kind"] == "dense" and r["backend"] == "sdpa"]
    assert all(r["chosen"] and r["speed_relative_to_dense"] == 1.0 for r in dense)


def test_the_document_says_what_by_length_asks(document: dict[str, Any]) -> None:
    assert document["dense_up_to"]["cpu"] in (8, 16, 32)
    assert {"torch", "device", "threads"} <= set(document["environment"])
    assert {one["pass"] for one in document["growth"]} == set(PASSES)


def test_rounds_visit_every_case_before_they_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[tuple[int, str]] = []
    tried = benchmark._Tried(0.1, 1, None)
    monkeypatch.setattr(benchmark, "_try", lambda shape, entry, apart: setattr(entry, "tried", tried))

    def visit(shape: Shape, entry: benchmark._Entry) -> float:
        visited.append((entry.length, entry.case.kind))
        return 1.0

    monkeypatch.setattr(benchmark, "_visit", visit)
    bench_attention(read_grid({**TINY, "kinds": "dense,linear", "passes": "forward", "repeat": "2"}))
    assert visited == [(16, "dense"), (16, "linear"), (32, "dense"), (32, "linear")] * 2


def test_a_kernel_that_fails_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such instruction\nat 0x0")

    monkeypatch.setattr(benchmark, "_run_once", fails)
    monkeypatch.setattr(Apart, "__call__", lambda self, function, *args: function(*args))
    found = bench_attention(read_grid({**TINY, "kinds": "dense", "passes": "forward"}))["rows"]
    assert [r["reason"] for r in found] == [
        "failed: RuntimeError: no such instruction",
        "as at 16 positions: failed: RuntimeError: no such instruction",
    ]


def test_the_module_is_a_command_that_prints_one_document() -> None:
    command = [sys.executable, "-m", "glowflow.benchmark.attention", "--kinds", "dense", "--passes", "forward"]
    sizes = ["--lengths", "16", "--heads", "2", "--head-dim", "8", "--repeat", "1", "--device", "cpu"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["ms"] > 0


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--heads", "none"]) == 2
    assert "--heads: must be a whole number" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    found = bench_attention(read_grid({**TINY, "device": "cuda", "head-dim": "16", "repeat": "2"}))["rows"]
    measured = [row for row in found if row["ms"] is not None]
    assert {row["kind"] for row in measured} == {"dense", "windowed", "sparse", "linear"}
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in measured)
