"""The status of a sweep: columns that line up at any width, plain characters, and the right words."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from glowflow.experiments.journal import lock_sweep, read_journal
from glowflow.experiments.status import format_status, sweep_json
from glowflow.tracking.base import Point
from glowflow.tracking.spool import Spool
from tests.experiments.written_sweeps import LR, MIXED, WrittenSweep, loss_curve, lr_search, two_metrics, variants_table


def columns_of(text: str) -> tuple[list[str], list[str]]:
    """The lines of the table, and where its ruler has its columns."""
    lines = text.splitlines()
    ruler = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = lines[ruler + 1 : lines.index("", ruler)]
    return rows, lines[ruler].split("  ")


def cells(row: str, ruler: list[str]) -> list[str]:
    found, start = [], 0
    for column in ruler:
        found.append(row[start : start + len(column)].strip())
        start += len(column) + 2
    return found


def running(folder: Path) -> Path:
    """A search in the middle: one trial finished, one stopped, one failed, one runs, one waits."""
    sweep = WrittenSweep(folder, LR)
    sweep.trial("000", 0, {"training.lr": 4e-3}, loss_curve(2.3, 200))
    why = "asha at step 75: val_loss 2.936, rank 3 of 4 so far, which is a long reason to give in a narrow terminal"
    sweep.trial("001", 1, {"training.lr": 1e-3}, loss_curve(2.4, 75), status="STOPPED", why=why)
    error = "\x1b[31mRuntimeError\x1b[0m: out of\nmemory"
    sweep.trial("002", 2, {"training.lr": 3e-2}, [(25, float("nan"))], status="FAILED", why=error, error=error)
    sweep.trial("003", 3, {"training.lr": 2e-3}, loss_curve(2.2, 50), status=None)
    sweep.journal.append("claimed", trial="004", point=4, label=None, seed=0, params={"training.lr": 5e-4})
    sweep.journal.close()
    return folder


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_every_line_fits_and_columns_line_up(tmp_path: Path, width: int) -> None:
    makers = [running, lambda f: lr_search(f, 24, body=MIXED, failed=(3, 7)), two_metrics]
    makers.append(lambda f: variants_table(f, {"rotary-embeddings-with-a-long-name": 1.6, "b": 1.7}))
    for index, make in enumerate(makers):
        text = format_status(read_journal(make(tmp_path / str(index))), width=width)
        assert max(map(len, text.splitlines())) <= width
        assert all(c.isprintable() and ord(c) < 128 for c in text.replace("\n", ""))
        assert text == "\n".join(line.rstrip() for line in text.splitlines())
        rows, ruler = columns_of(text)
        edges = [sum(len(column) + 2 for column in ruler[: i + 1]) - 2 for i in range(len(ruler) - 1)]
        for row in rows:
            assert all(row[edge : edge + 2].strip() == "" for edge in edges), row


def test_what_the_table_says(tmp_path: Path) -> None:
    text = format_status(read_journal(running(tmp_path / "lr")), width=160)
    rows, ruler = columns_of(text)
    table = [cells(row, ruler) for row in rows]
    assert table[0][:6] == ["* 000", "finished", "200/200", "2/2", "2.3000", "2.3000"]
    assert table[1][:4] == ["001", "stopped", "75/200", "2/2"]
    assert table[2][1:6] == ["failed", "25/200", "1/2", "-", "-"] and table[2][-1] == "RuntimeError: out of memory"
    assert table[3][1:4] == ["running", "50/200", "1/2"] and table[3][-2] == "lr 0.002"
    assert table[4][1:6] == ["claimed", "0/200", "0/2", "-", "-"]
    assert "3 of 8 trials over: 1 finished, 1 stopped early, 1 failed, 1 running, 1 waiting, 3 to come" in text
    assert "best: 000, val_loss 2.3000 at step 200 (lr 0.004)" in text


def test_between_reports_the_curves_know_how_far_a_trial_is(tmp_path: Path) -> None:
    folder = running(tmp_path / "lr")
    rows, ruler = columns_of(format_status(read_journal(folder)))
    assert cells(rows[3], ruler)[2].startswith("50/")
    Spool(folder / "003" / "metrics.jsonl").append([Point("train_loss", 63, 2.0, 0), Point("system/cpu", 70, 1.0, 0)])
    Spool(folder / "000" / "metrics.jsonl").append([Point("train_loss", 999, 2.0, 0)])
    rows, ruler = columns_of(format_status(read_journal(folder)))
    assert cells(rows[3], ruler)[2].startswith("63/")
    assert cells(rows[0], ruler)[2].startswith("200/"), "it is over"


def test_the_reason_gives_way_in_a_narrow_terminal(tmp_path: Path) -> None:
    state = read_journal(running(tmp_path / "lr"))
    narrow, wide = format_status(state, width=80), format_status(state, width=160)
    assert "lr 0.002" in columns_of(wide)[0][3] and "lr 0.002" not in columns_of(narrow)[0][3]
    assert columns_of(narrow)[0][1].endswith("...")


def test_who_drives_it(tmp_path: Path) -> None:
    folder = running(tmp_path / "lr")
    dead = format_status(read_journal(folder))
    assert dead.startswith("sweep lr: DEAD; random, asha; val_loss (min)\n")
    assert "no process drives it; to go on: glowflow sweep --resume lr" in dead
    with lock_sweep(folder):
        assert format_status(read_journal(folder)).startswith("sweep lr: RUNNING; ")
    folder.rename(tmp_path / "elsewhere")
    assert "sweep lr: RUNNING; " in format_status(read_journal(tmp_path / "elsewhere"))


def test_the_time_runs_until_the_end(tmp_path: Path) -> None:
    state = read_journal(running(tmp_path / "lr"))
    assert state.started is not None
    began = datetime.fromisoformat(state.started)
    assert "in 2m 05s" in format_status(state, now=began + timedelta(seconds=125))
    assert "in 3h 04m" in format_status(state, now=began + timedelta(seconds=3 * 3600 + 245))
    ended = read_journal(lr_search(tmp_path / "over", 2))
    assert format_status(ended, now=began + timedelta(days=9)) == format_status(ended)


def test_an_end_has_its_reason(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "lr", LR)
    folder = sweep.end("FAILED", f"3 of 3 trials failed: {tmp_path}/lr/000 cannot be written")
    text = format_status(read_journal(folder))
    assert text.startswith("sweep lr: FAILED; ") and "why: 3 of 3 trials failed: lr/000 cannot be written" in text


def test_copies_of_population_based_training(tmp_path: Path) -> None:
    body = {
        "space": {"training.lr": {"loguniform": [1e-4, 1e-2]}},
        "scheduler": {"name": "pbt", "interval_steps": 25},
        "trials": 2,
    }
    sweep = WrittenSweep(tmp_path / "pbt", body)
    sweep.trial("000", 0, {"training.lr": 1e-3}, loss_curve(2.3, 50), status=None)
    sweep.trial("001", 1, {"training.lr": 1e-4}, loss_curve(2.9, 25), status=None)
    sweep.journal.append("exploited", trial="001", step=50, donor="000", donor_step=50, params={"training.lr": 1.2e-3})
    rows, ruler = columns_of(format_status(read_journal(sweep.folder), width=160))
    assert cells(rows[0], ruler)[3] == "0" and cells(rows[1], ruler)[3] == "1 (from 000)"
    assert "lr 0.0012" in rows[1]


def test_steps_that_differ_from_trial_to_trial(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "batch", {"space": {"training.max_steps": {"grid": [100, 400]}}}, max_steps=400)
    sweep.trial("000", 0, {"training.max_steps": 100}, loss_curve(2.3, 100, 100))
    assert " 100/100 " in format_status(read_journal(sweep.end()))


def test_as_json(tmp_path: Path) -> None:
    found = sweep_json(read_journal(running(tmp_path / "lr")))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["sweep"], found["status"], len(found["trials"])) == ("lr", "RUNNING", 5)
    assert found["best"] == found["trials"][0]
    assert found["trials"][0]["metrics"]["val_loss"] == pytest.approx(2.3)
    assert found["trials"][2]["metrics"]["val_loss"] is None and found["trials"][4]["status"] == "CLAIMED"
    assert {"params", "mlflow_run_id", "directory", "why", "label", "seed"} <= set(found["trials"][0])
    assert sweep_json(read_journal(WrittenSweep(tmp_path / "none", LR).end()))["best"] is None
