"""Comparison of variants, and the bare loop as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glowflow.benchmark.measure import Measurement, alternate, summarise


def test_ratios_are_paired_by_round_so_that_drift_cancels() -> None:
    # The machine gets twice as slow in round 2; the second variant is always 10 % faster.
    slow = [Measurement([100.0], 1000), Measurement([200.0], 1000)]
    fast = [Measurement([90.0], 1000), Measurement([180.0], 1000)]
    summary = summarise({"bare": slow, "other": fast}, baseline="bare")
    assert summary["other"]["speed_relative_to_bare"] == pytest.approx(1 / 0.9)
    assert summary["bare"]["speed_relative_to_bare"] == 1.0
    assert summary["bare"]["tokens_per_second"] == pytest.approx(1000 * 1000 / 150)


def test_variants_take_turns() -> None:
    order: list[str] = []

    def runner(name: str):
        def run() -> Measurement:
            order.append(name)
            return Measurement([1.0], 1)

        return run

    alternate({"a": runner("a"), "b": runner("b")}, rounds=2)
    assert order == ["a", "b", "a", "b"]


def test_bare_loop_command_prints_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glowflow.benchmark.train import main

    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {dim: 32, depth: 2, heads: 2, vocab_size: 64}\ndata: {context: 16}\ntraining: {batch_size: 4}\n"
    )
    overrides = ["resources.accelerator=cpu", "training.micro_batch_size=2", "training.threads=1"]
    assert main([str(config), *overrides, "--steps", "3", "--warmup", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bare"]["steps_measured"] == 3
    assert document["mfu"] is None and document["mfu_denominator"] is None
    assert 0 < document["share_of_measured_gemm_peak"] < 1


def test_bare_loop_without_a_vocabulary_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glowflow.benchmark.train import main

    config = tmp_path / "tiny.yaml"
    config.write_text("model: {dim: 32}\n")
    assert main([str(config), "resources.accelerator=cpu"]) == 2
    assert "model.vocab_size" in capsys.readouterr().err
