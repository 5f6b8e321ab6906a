"""The display: one live line on a terminal, few lines elsewhere, never an error."""

from __future__ import annotations

import io

import pytest

from glowflow.orchestration import progress
from glowflow.orchestration.progress import NoProgress, ProgressLine, describe, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_says_step_losses_speed_and_time_left() -> None:
    metrics = {"train_loss": 2.3456, "val_loss": 2.5, "perplexity": 12.18, "tokens_per_second": 12_345.0, "lr": 1.0}
    assert describe(120, 200, metrics, eta=92.0) == (
        "step 120/200 60% | loss 2.346 | val loss 2.5 | ppl 12.18 | 12.3k tok/s | ETA 1:32"
    )
    assert describe(200, 200, {}, eta=0.0) == "step 200/200 100%"
    assert describe(1, 10, {}, eta=3725.0).endswith("ETA 1:02:05")


def test_a_file_gets_a_line_each_tenth_or_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in range(1, 101):
        now[0] += 0.6
        line.update(step, 100, {"train_loss": 1.0})
    shown = [int(text.split("/")[0].removeprefix("step ")) for text in stream.getvalue().splitlines()]
    assert shown[-1] == 100
    assert 10 <= len(shown) <= 12
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    now[0] += 11
    line.update(100, 1000, {})
    assert stream.getvalue().splitlines()[-1].startswith("step 100/1,000")


def test_a_terminal_gets_one_line_that_is_rewritten_and_notes_stay_above_it() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line.phase("starting ...")
    line.update(1, 10, {"train_loss": 2.0})
    line.note("worker 1 failed")
    line.update(2, 10, {"train_loss": 1.0})
    line.close()
    text = stream.getvalue()
    assert text.count("\n") == 2  # the note's and the last one
    assert text.endswith("\n")
    assert text.index("worker 1 failed\n") < text.index("step 2/10")


def test_the_time_left_starts_anew_when_training_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = Terminal()
    line = ProgressLine(stream)
    for seconds, step in [(0.0, 50), (10.0, 60), (100.0, 20), (110.0, 30)]:
        now[0] = seconds
        line.update(step, 100, {})
    assert stream.getvalue().split("\r\x1b[K")[-1].endswith("ETA 1:10")  # 1 s a step, 70 to go


def test_a_closed_stream_is_no_reason_to_stop_training() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line.update(1, 2, {})
    stream.close()
    line.update(2, 2, {})
    line.close()


def test_monitored_metrics_are_shown() -> None:
    stream = Terminal()
    ProgressLine(stream, monitor=["grad_norm"]).update(1, 2, {"grad_norm": 0.5, "lr": 0.1})
    assert "grad norm 0.5" in stream.getvalue() and "lr" not in stream.getvalue()


def test_what_callers_may_ask_for() -> None:
    own = NoProgress()
    assert make_progress(own) is own
    assert isinstance(make_progress(False), NoProgress)
    assert isinstance(make_progress(None), ProgressLine)
