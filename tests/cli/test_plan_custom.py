"""``glowflow plan`` on custom architectures: one that counts no operations, and one that cannot be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from glowflow.cli.main import run
from glowflow.config.loader import to_yaml
from tests.core.custom_models import EverythingAtOnce, OnlyTrained, config


def planned(target: type, folder: Path) -> int:
    path = folder / "custom.yaml"
    path.write_text(to_yaml(config(target)), encoding="utf-8")
    return run(["plan", str(path), "training.batch_size=2", "data.context=8"])


def test_what_is_not_counted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(OnlyTrained, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "not counted" in shown and "warning: OnlyTrained has no flops_per_token" in shown


def test_a_model_that_cannot_be_trained_cannot_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(EverythingAtOnce, tmp_path) == 2
    assert "6 problems" in capsys.readouterr().err
