"""``runs show`` of a run that is under way, and of one whose process is gone."""

from __future__ import annotations

from pathlib import Path

from glowflow.tracking.base import Point
from glowflow.tracking.jsonl import JsonlTracker
from glowflow.tracking.queries import show_run
from glowflow.tracking.runrecord import RunRecord, this_process
from glowflow.tracking.tables import format_run


def begin(storage: Path, pid: int) -> Path:
    run_dir = storage / "one"
    run_dir.mkdir()
    RunRecord("one", process={**this_process(), "pid": pid, "started": None}).save(run_dir)
    tracker = JsonlTracker(run_dir, system_metrics=False)
    tracker.log_points([Point("train_loss", 10, 2.0, 1), Point("train_loss", 20, 1.5, 2)])
    tracker.close()
    return run_dir


def test_a_run_under_way_shows_how_far_it_is(tmp_path: Path) -> None:
    begin(tmp_path, this_process()["pid"])
    shown = show_run(tmp_path, "one")
    assert (shown["status"], shown["alive"], shown["steps"]) == ("RUNNING", True, 20)
    assert "DEAD" not in format_run(shown)


def test_a_run_whose_process_is_gone_says_so_and_what_to_type(tmp_path: Path) -> None:
    begin(tmp_path, 2**22 + 1)  # above the kernel's limit of process ids
    shown = show_run(tmp_path, "one")
    assert (shown["status"], shown["alive"]) == ("RUNNING", False)
    assert "DEAD: its process is gone; to go on: glowflow train --resume one" in format_run(shown)
