"""``glowflow sweep status --follow`` into a log file: one table for every piece of news, none for the clock's."""

from __future__ import annotations

from pathlib import Path

import pytest

from glowflow.cli import sweep as command
from glowflow.cli.main import run
from glowflow.experiments.journal import lock_sweep
from tests.experiments.written_sweeps import LR, WrittenSweep, loss_curve


def test_follow_prints_when_something_happened_and_ends_with_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = WrittenSweep(tmp_path / "lr", LR)
    sweep.trial("000", 0, {"training.lr": 4e-3}, loss_curve(2.3, 50), status=None)
    waits = iter(["nothing", "trial", "nothing", "end"])

    def wait(seconds: float) -> None:
        match next(waits):
            case "trial":
                sweep.trial("001", 1, {"training.lr": 1e-3}, loss_curve(2.4, 75), status="STOPPED", why="asha")
            case "end":
                sweep.journal.append("ended", status="FINISHED", why=None)

    monkeypatch.setattr(command.time, "sleep", wait)
    with lock_sweep(tmp_path / "lr"):
        assert run(["sweep", "status", "lr", "--storage", str(tmp_path), "--follow"]) == 0
    shown = capsys.readouterr().out.split("sweep lr: ")[1:]
    assert [text.split(";")[0] for text in shown] == ["RUNNING", "RUNNING", "FINISHED"]
    assert ["001" in text for text in shown] == [False, True, True]
