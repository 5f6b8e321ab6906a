"""Comparisons of runs, sweeps and MLflow experiments: what they say, against independent computations, and how."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from glowflow.config.errors import ConfigError, RunError
from glowflow.experiments.compare import compare, to_csv, to_html, to_markdown, to_text
from glowflow.experiments.filters import parse_conditions
from glowflow.tracking.client import connect, default_uri
from glowflow.tracking.curves import SUMMARY_TAG
from glowflow.tracking.family import sync_sweep
from glowflow.tracking.sync import sync
from tests.experiments.written_runs import train, values
from tests.experiments.written_sweeps import VARIANTS, WrittenSweep, variants_table


@pytest.fixture(autouse=True)
def _no_foreign_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty-store")
    connect(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def six(storage: Path) -> Path:
    """Two learning rates, three seeds each; one run more that broke off."""
    for seed in range(3):
        train(storage, f"high-{seed}", lr=1e-2, seed=seed)
        train(storage, f"low-{seed}", lr=1e-3, seed=seed)
    train(storage, "broken", lr=5e-3, steps=40, status="FAILED")
    return storage


SIX = ["high-0", "low-0", "high-1", "low-1", "high-2", "low-2"]


# -- what it says -----------------------------------------------------------------------------------------------------


def test_two_runs_show_what_differs_and_what_each_arrived_at(storage: Path) -> None:
    train(storage, "a", lr=1e-3)
    train(storage, "b", lr=3e-4, steps=120)
    shown = compare(storage, ["a", "b"])
    assert shown["runs"] == ["a", "b"] and shown["status"] == ["FINISHED"] * 2
    assert shown["config"] == {"training.lr": [0.001, 0.0003]}
    assert shown["metrics"]["train_loss"] == [5 / 100, 5 / 120] and shown["last_step"] == [100, 120]
    assert shown["best"]["step"] == [70, 70] and shown["tokens_per_second"] == [640.0, 640.0]
    first = shown["rows"][0]
    assert first["metrics"]["val_loss"] == {
        "last": pytest.approx(2.1), "last_step": 100, "best": pytest.approx(2.01), "best_step": 70
    }  # fmt: skip
    assert first["device_hours"] == pytest.approx(10 / 3600 * 2) and first["tokens"] == 6400
    text = to_text(shown)
    assert text.splitlines()[0].split() == ["a", "b"] and "training.lr" in text and "model.dim" not in text
    assert "final.val_loss" in text and "best.val_loss" in text
    json.dumps(shown)


def test_all_unknown_names_are_named_with_what_they_might_have_been(storage: Path) -> None:
    train(storage, "quickstart-1")
    WrittenSweep(storage / "lr-sweep", VARIANTS).end()
    with pytest.raises(RunError) as caught:
        compare(storage, ["quikstart-1", "quickstart-1", "lr-sweeep", "x"])
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 3 and "'quickstart-1'?" in texts[0] and "sweep 'lr-sweep'" in texts[1]
    with pytest.raises(ConfigError, match="name runs or a sweep"):
        compare(storage, [])


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ({"at_step": 40}, {"long": 40, "short": 40}),
        ({"at_step": 45}, {"long": 40, "short": None}),
        ({"at_step": 9}, {"long": None, "short": None}),
        ({"at_tokens": 64 * 60}, {"long": 60, "short": None}),
        ({"at_time": 4.0}, {"long": 40, "short": 40}),
        ({"at_time": 4.5}, {"long": 40, "short": None}),
        ({"at_time": 1000.0}, {"long": None, "short": None}),
    ],
)
def test_values_at_a_step_a_number_of_tokens_and_a_time(storage: Path, at: dict, expected: dict) -> None:
    train(storage, "long")
    train(storage, "short", steps=40)
    rows = {row["run"]: row["metrics"]["val_loss"] for row in compare(storage, ["long", "short"], **at)["rows"]}
    assert {name: row["at_step"] for name, row in rows.items()} == expected
    curve = dict(values(1e-3, 0, 100))
    for name, step in expected.items():
        assert rows[name]["at"] == (None if step is None else curve[step])


def test_only_one_common_point_may_be_asked_for(six: Path) -> None:
    with pytest.raises(ConfigError, match="--at-step, --at-time: only one"):
        compare(six, SIX, at_step=1, at_time=2.0)


def test_runs_that_differ_in_the_seed_alone_are_a_group_with_interval_and_test(six: Path) -> None:
    shown = compare(six, [*SIX, "broken"])
    low, high, broken = shown["groups"]
    assert [low["group"], high["group"], broken["group"]] == [
        "training.lr=0.001", "training.lr=0.01", "training.lr=0.005"
    ]  # fmt: skip
    for group, lr in ((low, 1e-3), (high, 1e-2)):
        expected = [values(lr, seed, 100)[-1][1] for seed in range(3)]
        assert group["values"] == pytest.approx(expected) and (group["n"], group["left_out"]) == (3, 0)
        interval = stats.t.interval(0.95, 2, np.mean(expected), stats.sem(expected))
        assert (group["low"], group["high"]) == pytest.approx(interval)
    assert (broken["n"], broken["left_out"], broken["mean"]) == (0, 1, None)
    (pair,) = shown["pairwise"]
    expected = stats.ttest_ind(high["values"], low["values"], equal_var=False)
    assert pair["p_value"] == pytest.approx(expected.pvalue) and pair["verdict"] == "different"
    assert pair["difference"] == pytest.approx(0.09) and pair["best"] == low["group"]
    text = to_text(shown)
    assert "different" in text and "no result" in text
    # Where a common point is asked for, the run that broke off later than that counts as well.
    assert [group["n"] for group in compare(six, [*SIX, "broken"], at_step=40)["groups"]] == [3, 1, 3]


def test_groups_by_a_key(six: Path) -> None:
    shown = compare(six, SIX, by="training.seed")
    assert [group["group"] for group in shown["groups"]] == [f"training.seed={seed}" for seed in range(3)]
    assert all(group["n"] == 2 for group in shown["groups"]) and len(shown["pairwise"]) == 2
    both = compare(six, SIX, by=["training.lr", "status"])
    assert both["groups"][0]["group"] == "training.lr=0.001, status=FINISHED"
    with pytest.raises(ConfigError, match=r"did you mean 'training.seed'"):
        compare(six, SIX, by="training.sed")


def test_identical_variants_are_not_called_different_and_different_ones_are(storage: Path) -> None:
    means = {"baseline": 1.9, "same": 1.9, "low_lr": 2.4}
    sweep_dir = variants_table(storage / "table", means, lost=["same-s2"])
    shown = compare(storage, ["table"])
    assert len(shown["rows"]) == 9 and shown["metric"] == ["val_loss"]
    assert [row["status"] for row in shown["rows"]] == ["FINISHED"] * 8 + ["FAILED"]
    lasts = [row["metrics"]["val_loss"]["last"] for row in shown["rows"][:8]]
    assert lasts == sorted(lasts)
    groups = {group["group"]: group for group in shown["groups"]}
    assert groups.keys() == means.keys() and (groups["same"]["n"], groups["same"]["left_out"]) == (2, 1)
    verdicts = {pair["group"]: pair["verdict"] for pair in shown["pairwise"]}
    assert verdicts == {
        ({"baseline", "same"} - {shown["pairwise"][0]["best"]}).pop(): "not different",
        "low_lr": "different",
    }
    p_values = sorted(pair["p_value"] for pair in shown["pairwise"])
    adjusted = sorted(pair["p_adjusted"] for pair in shown["pairwise"])
    assert adjusted == pytest.approx([min(2 * p_values[0], 1), max(2 * p_values[0], p_values[1])])
    assert compare(storage, [str(sweep_dir)])["runs"] == shown["runs"]  # by path


def test_a_trial_stopped_early_is_shown_as_its_journal_has_it(storage: Path) -> None:
    sweep = WrittenSweep(storage / "lr", {"space": {"training.lr": {"choice": [1e-3, 1e-2]}}, "trials": 3})
    for number, (lr, status) in enumerate([(1e-3, "FINISHED"), (1e-2, "STOPPED"), (5e-3, None)]):
        steps = 100 if status == "FINISHED" else 40
        name = f"{number:03d}"
        sweep.trial(name, number, {"training.lr": lr}, values(lr, 0, steps), status=status, spool=False)
        if status is not None:
            kept = "KILLED" if status == "STOPPED" else status
            train(storage, f"lr/{name}", lr=lr, steps=steps, status=kept)
    sweep.end("KILLED")
    shown = compare(storage, ["lr"])
    assert dict(zip(shown["runs"], shown["status"], strict=True)) == {
        "lr/000": "FINISHED", "lr/001": "STOPPED", "lr/002": "RUNNING"
    }  # fmt: skip
    assert shown["runs"][0] == "lr/000" and shown["config"]["training.lr"][:2] == [1e-3, 1e-2]
    assert [row["steps"] for row in shown["rows"]] == [100, 40, 40]
    assert compare(storage, ["lr/001"])["rows"][0]["trial"] == "001"
    assert compare(storage, ["lr/001", "lr"])["runs"].count("lr/001") == 1


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["training.lr>1e-3"], 3),
        (["training.lr >= 0.001"], 6),
        (["training.lr=1e-2", "training.seed!=0"], 2),
        (["val_loss<2.115"], 2),
        (["training.lr<5e-3", "val_loss>2.105"], 2),
        (["status=FINISHED"], 6),
        (["model.dim==8"], 6),
        (["training.seed<=1", "tracking.experiment=cmp"], 4),
    ],
)
def test_filters_choose_runs(six: Path, filters: list[str], expected: int) -> None:
    names = SIX if filters != ["status=FINISHED"] else [*SIX, "broken"]
    shown = compare(six, names, filters=filters)
    assert len(shown["rows"]) == expected


def test_a_filter_on_a_metric_that_no_record_holds_reads_the_curves(storage: Path) -> None:
    for name, kept in (("a", "FAILED"), ("b", "FAILED")):
        train(storage, name, lr=1e-3 if name == "a" else 1e-2, status=kept, final={})
    assert compare(storage, ["a", "b"], filters=["val_loss<2.15"])["runs"] == ["a"]


def test_filters_that_make_no_sense_are_all_named(six: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compare(six, SIX, filters=["training.lr", "training.lr>many", "=3"])
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"did you mean 'training.lr'"):
        compare(six, SIX, filters=["training.lrr=1"])
    with pytest.raises(ConfigError, match=r"no run of 6 meets training\.lr>1"):
        compare(six, SIX, filters=["training.lr>1"])


def test_conditions_compare_numbers_as_numbers_and_the_rest_as_text() -> None:
    (condition,) = parse_conditions(["model.qk_norm = true"])
    assert condition.holds({"model.qk_norm": True}) and not condition.holds({"model.qk_norm": False})
    (condition,) = parse_conditions(["training.grad_clip!=null"])
    assert condition.holds({"training.grad_clip": 1.0}) and not condition.holds({"training.grad_clip": None})
    (condition,) = parse_conditions(["loss<1"])
    assert not any(condition.holds({"loss": value}) for value in (None, math.nan, "x", True, 2))


def test_metrics_are_chosen_with_their_direction(six: Path) -> None:
    shown = compare(six, ["low-0", "low-1"], metrics=["train_loss", "val_loss:max"])
    assert shown["metric"] == ["train_loss", "val_loss"] and shown["mode"] == ["min", "max"]
    assert shown["rows"][0]["metrics"]["val_loss"]["best_step"] == 10
    with pytest.raises(ConfigError, match="did you mean 'val_loss'"):
        compare(six, ["low-0"], metrics=["val_los"])
    with pytest.raises(ConfigError, match="NAME:max"):
        compare(six, ["low-0"], metrics=["val_loss:best"])


# -- MLflow -----------------------------------------------------------------------------------------------------------


def untag(uri: str, key: str) -> None:
    client = connect(uri)
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        if key in run.data.tags:
            client.delete_tag(run.info.run_id, key)


@pytest.mark.parametrize("summaries", [True, False])
@pytest.mark.parametrize("at", [{}, {"at_step": 40}, {"at_time": 4.0}])
def test_mlflow_says_what_the_directories_say(six: Path, empty_store: Path, summaries: bool, at: dict) -> None:
    shutil.copy(empty_store, six / "mlflow.db")
    for name in (*SIX, "broken"):
        sync(six / name)
    if not summaries:
        untag(default_uri(six), SUMMARY_TAG)
    here = compare(six, [*SIX, "broken"], **at)
    there = compare(six, [], experiment="cmp", **at)
    assert sorted(there["runs"]) == sorted(here["runs"])
    assert there["groups"][0]["mean"] == here["groups"][0]["mean"]
    assert [pair["p_adjusted"] for pair in there["pairwise"]] == [pair["p_adjusted"] for pair in here["pairwise"]]
    rows = {row["run"]: row for row in here["rows"]}
    for row in there["rows"]:
        mine = rows[row["run"]]
        for key in ("status", "params", "metrics", "steps", "tokens", "seed"):
            assert row[key] == mine[key], key
        assert (row["source"], mine["source"]) == ("mlflow", "directory")
    named = compare(six, ["low-1", "high-0"], experiment="cmp")
    assert sorted(named["runs"]) == ["high-0", "low-1"]
    with pytest.raises(RunError, match="did you mean 'low-1'"):
        compare(six, ["low-11"], experiment="cmp")


def test_many_histories_are_read_from_a_copy_and_are_the_same(six: Path, empty_store: Path, monkeypatch) -> None:
    shutil.copy(empty_store, six / "mlflow.db")
    for name in SIX:
        sync(six / name)
    untag(default_uri(six), SUMMARY_TAG)
    before = compare(six, [], experiment="cmp", at_step=40)
    monkeypatch.setattr("glowflow.tracking.reading._MANY", 1)
    content = (six / "mlflow.db").read_bytes()
    assert compare(six, [], experiment="cmp", at_step=40) == before
    assert (six / "mlflow.db").read_bytes() == content  # the user's file is not touched
    assert b"sqlite_stat1" not in content


def test_a_sweep_in_mlflow_stands_for_its_children(storage: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, storage / "mlflow.db")
    config = {"tracking": {"experiment": "cmp"}}
    sweep = WrittenSweep(storage / "lr", {"space": {"training.lr": {"choice": [1e-3]}}, "trials": 2}, config=config)
    for name in ("000", "001"):
        sweep.trial(name, int(name), {"training.lr": 1e-3}, values(1e-3, 0, 100), spool=False)
        train(storage, f"lr/{name}", lr=10 ** -(3 - int(name)))
    sync_sweep(sweep.end())
    train(storage, "single")
    sync(storage / "single")
    assert compare(storage, ["lr"], experiment="cmp")["runs"] == ["lr/000", "lr/001"]
    assert set(compare(storage, [], experiment="cmp")["runs"]) == {"lr/000", "lr/001", "single"}


def test_a_store_that_is_not_there_is_an_error_and_is_not_made(storage: Path) -> None:
    train(storage, "a")
    with pytest.raises(RunError, match="no MLflow store is there"):
        compare(storage, [], experiment="cmp")
    assert not (storage / "mlflow.db").exists()
    with pytest.raises(RunError, match="does not answer"):
        compare(storage, [], uri="http://127.0.0.1:9")


# -- formats ----------------------------------------------------------------------------------------------------------


def test_csv_has_every_digit_and_reads_back(six: Path) -> None:
    shown = compare(six, [*SIX, "broken"], at_step=50)
    rows = list(csv.DictReader(io.StringIO(to_csv(shown))))
    assert [row["run"] for row in rows] == shown["runs"]
    for row, entry in zip(rows, shown["rows"], strict=True):
        assert float(row["val_loss"]) == entry["metrics"]["val_loss"]["last"]
        assert float(row["training.lr"]) == entry["params"]["training.lr"]
        assert (row["val_loss.at"] == "") == (entry["metrics"]["val_loss"]["at"] is None)
        assert Path(row["directory"]).name == row["run"]


def test_markdown_is_a_table_and_text_has_a_row_for_each_of_many_runs(six: Path) -> None:
    shown = compare(six, SIX)
    lines = to_markdown(shown).splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 8 and len({line.count("|") for line in table}) == 1
    assert table[0].startswith("| run | status | training.lr | training.seed | val_loss |")
    text = to_text(shown).splitlines()
    assert text[0].split()[:2] == ["run", "status"] and [line.split()[0] for line in text[2:8]] == SIX
    assert "model.dim" not in "\n".join(lines + text)


class Page(HTMLParser):
    """Tags, attributes and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def test_html_loads_nothing_and_escapes_what_users_wrote(storage: Path) -> None:
    evil = "<script>alert('x')</script>|"
    variants_table(storage / "table", {"baseline": 1.9, "odd": 2.4})
    journal = storage / "table" / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"label": "odd"', f'"label": {json.dumps(evil)}'))
    shown = compare(storage, ["table"])
    text = to_html(shown)
    page = Page(text)
    assert page.tags.count("script") == 1 and page.tags.count("table") == 2
    assert evil in page.cells and "table/baseline-s0" in page.cells
    assert not {"src", "href", "link"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(", text)
    columns = {line.replace("\\|", "").count("|") for line in to_markdown(shown).splitlines()[:8]}
    assert len(columns) == 1
