"""A trial's run in a thread: it waits at every report, stops there without a step more, and can be taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glowflow.config.loader import apply_overrides, load_config
from glowflow.orchestration.sweep.trial_run import Ended, Reported, TrialRun, train_trial
from glowflow.training.markers import verify
from tests.journeys.support import loss_curve, record, write_config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    write_config(folder, training__max_steps=30, training__val_interval=10, training__checkpoint_interval=10)
    return folder


def begin(home: Path, name: str, **changes: Any) -> TrialRun:
    config = apply_overrides(load_config(home / "tiny.yaml"), {"tracking.run": name, **changes})

    def train(report: Any, signal: Any) -> Any:
        return train_trial(config, accelerator="cpu", resume_from=None, report=report, signal=signal)

    return TrialRun(train, home / "stop")


def to_the_end(run: TrialRun) -> tuple[list[Reported], Ended]:
    reports = []
    while isinstance(event := run.next(), Reported):
        reports.append(event)
        assert event.checkpoint is not None and verify(event.checkpoint) == [], "complete when it is reported"
        run.go_on()
    return reports, event


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    reports, ended = to_the_end(begin(home, "whole"))
    assert [report.step for report in reports] == [10, 20], "the last step is the end, not a report"
    assert ended.error is None and ended.record.status == "FINISHED" and ended.record.steps == 30
    assert all({"val_loss", "train_loss"} <= set(report.metrics) for report in reports)
    return home / "runs" / "whole"


def test_reports_come_after_each_validation_with_a_complete_checkpoint(whole: Path) -> None:
    assert max(loss_curve(whole)) == 30


def test_stopped_at_a_report_it_has_done_no_step_more_and_taken_up_again_it_ends_as_if_nothing_had_been(
    home: Path, whole: Path
) -> None:
    run = begin(home, "cut")
    first = run.next()
    assert isinstance(first, Reported) and first.step == 10
    run.stop()
    assert record(home / "runs" / "cut")["status"] == "KILLED"
    assert max(loss_curve(home / "runs" / "cut")) == 10
    reports, ended = to_the_end(begin(home, "cut"))
    assert [report.step for report in reports] == [20] and ended.record.status == "FINISHED"
    assert loss_curve(home / "runs" / "cut") == loss_curve(whole)


def test_a_run_that_had_ended_already_is_not_trained_again(home: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").stat().st_mtime_ns
    reports, ended = to_the_end(begin(home, "whole"))
    assert not reports and ended.record.final == pytest.approx(record(whole)["final"])
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_driver_can_stop_it_between_reports_by_a_file(home: Path) -> None:
    run = begin(home, "filed")
    assert isinstance(run.next(), Reported)
    (home / "stop").touch()
    try:
        run.go_on()
        event = run.next()
    finally:
        (home / "stop").unlink()
    assert isinstance(event, Ended) and event.record.status == "KILLED" and event.record.steps == 10


def test_a_failure_is_an_end_with_its_error(home: Path) -> None:
    changes = {"training.lr": 1e30, "training.grad_clip": 1e30, "training.max_nonfinite_steps": 0}
    _, ended = to_the_end(begin(home, "broken", **changes))
    assert ended.error is not None and "finite" in str(ended.error)
    assert record(home / "runs" / "broken")["status"] == "FAILED"


def test_stopping_a_run_that_has_ended_changes_nothing(home: Path) -> None:
    run = begin(home, "short", **{"training.max_steps": 5})
    assert isinstance(run.next(), Ended)
    run.stop()
    assert record(home / "runs" / "short")["status"] == "FINISHED"
