"""``runs list``, ``runs compare`` and ``runs sync`` as a person types them, for runs, sweeps and MLflow."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glowflow.cli.main import run
from tests.experiments.written_runs import train, values
from tests.experiments.written_sweeps import WrittenSweep, variants_table


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of their own, a search of two trials, and a table of variants."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    train(folder, "first")
    train(folder, "second", lr=1e-2, status="FAILED", steps=40)
    config = {"tracking": {"experiment": "cmp"}}
    sweep = WrittenSweep(folder / "lr", {"space": {"training.lr": {"choice": [1e-3]}}, "trials": 2}, config=config)
    for name, lr in (("000", 1e-2), ("001", 1e-3)):
        sweep.trial(name, int(name), {"training.lr": lr}, values(lr, 0, 100), spool=False)
        train(folder, f"lr/{name}", lr=lr)
    sweep.end()
    variants_table(folder / "table", {"baseline": 1.9, "same": 1.9, "low_lr": 2.4})
    return folder


@pytest.fixture
def typed(storage: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a `runs` command; gives (exit code, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["runs", *args, "--storage", str(storage)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_list_shows_trials_with_their_sweep(typed: Any) -> None:
    rows = json.loads(typed("list", "--json")[1])
    assert {row["run"]: row["sweep"] for row in rows} == {
        "first": None, "second": None, "lr/000": "lr", "lr/001": "lr"
    }  # fmt: skip
    assert [line.split()[0] for line in typed("list", "--sweep", "lr")[1].splitlines()[2:]] == ["lr/000", "lr/001"]
    assert [row["run"] for row in json.loads(typed("list", "--status", "failed", "--json")[1])] == ["second"]
    assert len(json.loads(typed("list", "--limit", "3", "--json")[1])) == 3
    code, _, err = typed("list", "--sweep", "lrr")
    assert code == 2 and "did you mean 'lr'" in err
    assert typed("list", "--status", "LOST")[0] == 2


def test_compare_prints_runs_side_by_side_and_trials_in_rows(typed: Any) -> None:
    code, out, _ = typed("compare", "first", "second")
    assert code == 0 and out.splitlines()[0].split() == ["first", "second"] and "training.lr" in out
    code, out, _ = typed("compare", "first", "second", "lr", "table", "--by", "label")
    assert code == 0 and out.splitlines()[0].split()[:3] == ["run", "status", "label"]
    document = json.loads(typed("compare", "lr", "--json")[1])
    assert document["runs"] == ["lr/001", "lr/000"]  # best first
    assert {"config", "metrics", "best", "rows", "groups", "pairwise"} <= document.keys()


def test_a_table_of_variants_says_what_is_different(typed: Any) -> None:
    _, out, _ = typed("compare", "table")
    verdicts = {line.split()[0]: line for line in out.split("\n\n")[1].splitlines()[3:]}
    assert verdicts["low_lr"].endswith("  different")
    assert [verdicts[name].rsplit("  ", 1)[1] for name in verdicts][:2] == ["best", "not different"]


@pytest.mark.parametrize(
    ("name", "start"),
    [("t.md", "| run |"), ("t.csv", "run,status"), ("t.html", "<!doctype html>"), ("t.txt", "run ")],
)
def test_out_writes_a_file_in_the_format_of_its_ending(typed: Any, tmp_path: Path, name: str, start: str) -> None:
    path = tmp_path / name
    code, out, err = typed("compare", "table", "first", "--out", str(path), "--at-step", "50")
    assert (code, out) == (0, "") and "10 runs" in err
    assert path.read_text().startswith(start)
    if name == "t.csv":
        assert len(list(csv.DictReader(path.read_text().splitlines()))) == 10
    assert typed("compare", "table", "--format", "markdown")[1].startswith("| run |")
    assert typed("compare", "table", "--out", str(tmp_path / "no" / "where.md"))[0] == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing"], "run: is not known"),
        ([], "name runs or a sweep"),
        (["first", "--filter", "training.lr"], "filter: must be KEY"),
        (["first", "--filter", "training.l=1"], "did you mean 'training.lr'"),
        (["first", "--metric", "val_los"], "did you mean 'val_loss'"),
        (["first", "--by", "training.sed"], "did you mean 'training.seed'"),
        (["first", "--at-step", "5", "--at-time", "2m"], "only one of them"),
        (["first", "--at-time", "soon"], "must be a duration"),
        (["--experiment", "cmp"], "no MLflow store is there"),
    ],
)
def test_bad_input_is_one_clear_message(typed: Any, args: list[str], said: str) -> None:
    code, out, err = typed("compare", *args)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_filters_metrics_and_times(typed: Any) -> None:
    _, out, _ = typed(
        "compare", "first", "second", "lr", "--filter", "training.lr>5e-3", "--filter", "status=FINISHED", "--json"
    )
    assert json.loads(out)["runs"] == ["lr/000"]
    _, out, _ = typed("compare", "first", "second", "--metric", "train_loss", "--at-time", "4s", "--json")
    rows = json.loads(out)["rows"]
    assert [row["metrics"]["train_loss"]["at_step"] for row in rows] == [40, 40]


def test_sync_makes_one_family_of_a_sweep_and_compare_reads_it_from_mlflow(typed: Any) -> None:
    code, out, _ = typed("sync", "lr", "first")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["lr", "lr/000", "lr/001", "first"]
    reports = json.loads(typed("sync", "--json")[1])
    assert {"lr", "lr/000", "lr/001", "first", "second", "table"} <= reports.keys()
    assert reports["lr/000"]["sent"] == 0 and reports["second"]["sent"] > 0
    assert {row["source"] for row in json.loads(typed("list", "--json")[1])} == {"mlflow"}
    document = json.loads(typed("compare", "lr", "--experiment", "cmp", "--json")[1])
    assert document["runs"] == ["lr/001", "lr/000"]
    here = json.loads(typed("compare", "lr", "--json")[1])
    assert document["config"] == here["config"] and document["metrics"] == here["metrics"]
    assert typed("sync", "lrr")[0] == 2


def test_comparing_directories_imports_neither_mlflow_nor_torch(storage: Path) -> None:
    code = (
        "import sys\nfrom glowflow.cli.main import run\n"
        f"assert run(['runs', 'compare', 'table', 'first', '--storage', {str(storage)!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow.tracking', 'sqlalchemy', 'pandas', 'sklearn', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
