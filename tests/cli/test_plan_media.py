"""``glowflow plan`` on models of media: what is counted, what memory is estimated for, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glowflow.cli.main import run
from glowflow.config.loader import load_config, to_yaml
from tests.data.media_sets import MIXED, mixed_rows, write_media_set


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> Any:
    path = folder / "media.yaml"
    path.write_text(to_yaml(load_config(MIXED)), encoding="utf-8")
    status = run(["plan", str(path), *overrides, "--json"])
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err


def test_parts_samples_and_memory_of_a_built_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_media_set(tmp_path / "data", {"train": mixed_rows(10)})
    keys = (f"data.dataset={tmp_path / 'data'}", "training.batch_size=4", "training.max_steps=5")
    found = planned(tmp_path, capsys, *keys, "model.task=classification")
    assert sum(found["parameters_by_part"].values()) == found["parameters"]
    assert {"image_encoder", "audio_encoder", "blocks", "head"} <= found["parameters_by_part"].keys()
    assert found["config"]["model"]["num_classes"] == 5
    assert (found["tokens"], found["flops"]) == (None, None) and found["flops_per_token"] > 0
    assert found["epochs"] == 2.0 and "10 samples" in found["data"]
    assert found["media_sizes"] == {"image": [16, 16], "audio": [3000]}
    assert found["memory_per_worker"]["activations"] > 0

    assert run(["plan", str(tmp_path / "media.yaml"), *keys]) == 0
    shown = capsys.readouterr().out
    assert "5 of 4 samples (2.00 epochs)" in shown and "encoders of media not counted" in shown
    assert "with a picture of 16 x 16 pixels and a recording of 3000 frames in each sequence of 128 tokens" in shown

    refused = planned(tmp_path, capsys, *keys, "model.task=classification", "model.num_classes=3")
    assert "model.num_classes: must be the 5 labels of media" in refused


def test_what_is_not_built_is_assumed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, capsys, "data.dataset=python-stdlib", "model.task=classification")
    assert found["config"]["model"]["num_classes"] == 10 and "10 classes are assumed" in found["data"]
