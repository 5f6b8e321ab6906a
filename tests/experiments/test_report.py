"""The report: what it concludes, that it is the same everywhere, and that nothing of this machine gets into it."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from glowflow.config.errors import ConfigError, PreflightError, RunError
from glowflow.experiments.figures_html import panels_of
from glowflow.experiments.labels import command_line, decimals, fixed, plain, relative, short_keys, short_value, wrap
from glowflow.experiments.report import report_data, write_report
from glowflow.experiments.results import read_results
from tests.experiments.written_sweeps import LR, MIXED, WrittenSweep, loss_curve, lr_search, two_metrics, variants_table


class Page(HTMLParser):
    """What an HTML file would load, and its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[tuple[str, str]] = []
        self.scripts = 0
        self.rows = 0
        self.policy = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.loads += [(tag, name) for name in ("src", "href", "data", "srcset", "poster", "action") if name in named]
        self.scripts += tag == "script"
        self.rows += tag == "tr"
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""


def texts(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.suffix in (".md", ".csv", ".html")}


def table_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| ---")]


# -- variants over seeds ----------------------------------------------------------------------------------------------


def test_equal_variants_are_not_called_different_and_unequal_ones_are(tmp_path: Path) -> None:
    means = {"baseline": 1.62, "same": 1.62, "low_lr": 1.75}
    sweep = variants_table(tmp_path / "variants", means)
    text = write_report(sweep)[0].read_text(encoding="utf-8")
    rows = {row[0]: row for row in table_of(text)[1:]}
    assert rows["low_lr"][-1] == "different" and rows["low_lr"][-2] == r"\< 0.001"
    assert sorted([rows["baseline"][-1], rows["same"][-1]]) == ["best", "not different"]
    assert "![means over seeds with 95 % intervals](intervals.png)" in text
    assert "for 2 comparisons (Holm)" in text


def test_trials_that_are_alike_to_the_last_digit(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "twins", {"variants": {"a": {}, "b": {}}, "seeds": 3})
    for point, label in enumerate("ab"):
        for seed in range(3):
            sweep.trial(f"{label}-s{seed}", point, {}, loss_curve(2.3 + 0.01 * seed, 200), seed=seed, label=label)
    groups = report_data(sweep.end())["groups"]["val_loss"]
    assert [group["verdict"] for group in groups] == ["best", "not different"]
    assert groups[1]["difference"]["difference"] == 0 and groups[1]["p_value_adjusted"] == 1


def test_the_numbers_of_the_table_are_scipy_s(tmp_path: Path) -> None:
    data = report_data(variants_table(tmp_path / "v", {"a": 1.62, "b": 1.63, "c": 1.66}, seeds=4))
    groups = data["groups"]["val_loss"]
    best = groups[0]
    raw = []
    for group in groups[1:]:
        test = stats.ttest_ind(group["values"], best["values"], equal_var=False)
        raw.append(float(test.pvalue))
        interval = test.confidence_interval(0.95)
        assert group["difference"]["p_value"] == pytest.approx(test.pvalue, rel=1e-9)
        assert (group["difference"]["low"], group["difference"]["high"]) == pytest.approx(tuple(interval), rel=1e-9)
        assert group["n"] == 4 and group["missing"] == 0
    low, high = stats.t.interval(0.95, 3, sum(best["values"]) / 4, stats.sem(best["values"]))
    assert (best["interval"]["low"], best["interval"]["high"]) == pytest.approx((low, high), rel=1e-9)
    adjusted = [group["p_value_adjusted"] for group in groups[1:]]
    assert min(adjusted) == pytest.approx(min(1, 2 * min(raw)))
    assert max(adjusted) == pytest.approx(max(max(raw), 2 * min(raw)))


def test_lost_seeds_are_counted_and_named(tmp_path: Path) -> None:
    sweep = variants_table(tmp_path / "v", {"a": 1.62, "b": 1.7}, lost=("b-s0", "b-s1"))
    text = write_report(sweep, formats=["md"])[0].read_text(encoding="utf-8")
    rows = {row[0]: row for row in table_of(text)[1:]}
    assert rows["b"][1] == "1 (2 lost)" and rows["b"][-1] == "not tested"
    assert "Lost: b-s0 (failed at step 150: RuntimeError: the process was killed)." in text


def test_only_trials_that_ran_to_the_end_are_compared(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "v", {"variants": {"a": {}, "b": {}}, "seeds": 2})
    for point, label in enumerate("ab"):
        for seed in range(2):
            stopped = label == "b" and seed == 1
            curve = loss_curve(2.3 + 0.1 * seed, 75 if stopped else 200)
            status = "STOPPED" if stopped else "FINISHED"
            sweep.trial(f"{label}-s{seed}", point, {}, curve, seed=seed, label=label, status=status)
    groups = {group["name"]: group for group in report_data(sweep.end())["groups"]["val_loss"]}
    assert len(groups["b"]["values"]) == 1 and groups["b"]["missing"] == 1


def test_a_point_whose_seeds_all_failed(tmp_path: Path) -> None:
    sweep = variants_table(tmp_path / "v", {"a": 1.62, "b": 1.7}, seeds=2, lost=("b-s0", "b-s1"))
    data = report_data(sweep)
    assert [group["verdict"] for group in data["groups"]["val_loss"]] == ["best", "no result"]
    assert write_report(sweep)


# -- searches ---------------------------------------------------------------------------------------------------------


def test_a_search_names_its_best_and_what_it_cost(tmp_path: Path) -> None:
    sweep = lr_search(tmp_path / "lr")
    text = write_report(sweep)[0].read_text(encoding="utf-8")
    assert text.startswith("# lr\n\nWhich training.lr gives the lowest val_loss?\n")
    assert "8 trials: 3 finished, 5 stopped early; 875 training steps, 55 % of the 1600" in text
    rows = table_of(text)
    assert rows[0] == ["rank", "lr", "val_loss (nats per target)", "step", "status", "trial"]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(1, 9)]
    assert rows[1][-2:] == ["finished", "000"]
    assert "No importance for val_loss: " in text
    for image in re.findall(r"\]\((.*?)\)", text):
        assert (sweep / "report" / image).is_file()


def test_the_leaderboard_as_csv_has_every_digit(tmp_path: Path) -> None:
    sweep = lr_search(tmp_path / "mixed", 24, body=MIXED, failed=(3, 7))
    write_report(sweep, formats=["csv"])
    with open(sweep / "report" / "leaderboard.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = {outcome.trial: outcome for outcome in read_results(sweep).outcomes}
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"] and len(rows) == 24
    for row in rows:
        outcome = outcomes[row["trial"]]
        assert float(row["training.lr"]) == outcome.params["training.lr"]
        assert row["val_loss"] == ("" if not outcome.values else repr(outcome.values["val_loss"]))
        assert json.loads(row["training.grad_clip"]) == outcome.params["training.grad_clip"]
        assert (row["training.decay_fraction"] == "") == ("training.decay_fraction" not in outcome.params)
    assert rows[-1]["why"] == "RuntimeError: out of memory in shard.parquet"


def test_long_tables_are_cut_in_markdown_alone(tmp_path: Path) -> None:
    sweep = lr_search(tmp_path / "lr", 60)
    text = write_report(sweep, formats=["md", "html"])[0].read_text(encoding="utf-8")
    assert len(table_of(text)) == 31 and "30 more rows are in leaderboard.csv." in text
    assert "](" not in text, "no figures without png"
    assert Page(sweep / "report" / "report.html").rows == 61


def test_two_metrics(tmp_path: Path) -> None:
    sweep = two_metrics(tmp_path / "p")
    text = write_report(sweep)[0].read_text(encoding="utf-8")
    assert "the lowest val_loss and the highest tokens_per_second?" in text
    assert "![Pareto front](pareto.png)" in text
    assert "![importance of the parameters" in text


def test_nothing_has_been_reported_yet(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "fresh", LR)
    paths = write_report(sweep.folder)
    assert [path.name for path in paths] == ["report.md", "report.html", "leaderboard.csv"]
    assert "The sweep is running. No trial has a result." in paths[0].read_text(encoding="utf-8")
    sweep.trial("000", 0, {"training.lr": 1e-3}, [], status=None)
    sweep.trial("001", 1, {"training.lr": 2e-3}, [(25, math.nan)], status="FAILED", why="loss is not finite")
    assert "Lost: 001 (failed at step 25: loss is not finite)." in write_report(sweep.folder)[0].read_text("utf-8")


def test_copies_of_weights_are_told(tmp_path: Path) -> None:
    body = {"space": LR["space"], "scheduler": {"name": "pbt", "interval_steps": 25}, "trials": 9}
    sweep = WrittenSweep(tmp_path / "pbt", body)
    for point in range(9):
        sweep.trial(f"{point:03d}", point, {"training.lr": 1e-3 * (point + 1)}, loss_curve(2.3 + point / 9, 200))
    sweep.journal.append("exploited", trial="008", step=50, donor="000", donor_step=50, params={"training.lr": 2e-3})
    text = write_report(sweep.end(), formats=["md"])[0].read_text(encoding="utf-8")
    assert "Weights were copied: 008 from 000 at step 50; parameters are those at the end." in text
    assert "No importance for val_loss: trials copied weights and changed parameters on the way." in text


# -- the same everywhere ----------------------------------------------------------------------------------------------


def test_the_same_journal_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    first = lr_search(tmp_path / "one" / "mixed", 24, body=MIXED, failed=(3,))
    moved = tmp_path / "another place" / "mixed"
    moved.parent.mkdir()
    paths = write_report(first)
    first.rename(moved)
    again = write_report(moved, tmp_path / "elsewhere")
    assert [path.name for path in paths] == [path.name for path in again]
    for old, new in zip(paths, again, strict=True):
        assert (moved / "report" / old.name).read_bytes() == new.read_bytes(), new.name


def test_no_path_of_this_machine_gets_in(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    command = ["/opt/env/bin/glowflow", "sweep", str(tmp_path / "my config.yaml"), "lr", f"tracking.storage={storage}"]
    command += ["--warm-start", str(storage / "earlier"), f"tracking.uri=sqlite:///{storage}/mlflow.db"]
    sweep = WrittenSweep(storage / "lr", LR, command=command, device="AMD EPYC")
    why = f"OSError: [Errno 28] no space left: '{storage}/lr/000/checkpoints/step-5' and /home/me/x.bin"
    sweep.trial("000", 0, {"training.lr": 1e-3}, [(25, 3.0)], status="FAILED", why=why, error=f"{why}\n  File /a/b.py")
    sweep.trial("001", 1, {"training.lr": 2e-3}, loss_curve(2.3, 200))
    folder = sweep.end(status="STOPPED", why=f"the budget of {storage}/lr is used up")
    write_report(folder, tmp_path / "out")
    for name, text in texts(tmp_path / "out").items():
        for secret in (str(tmp_path), "/home/me", "/opt/env"):
            assert secret not in text, name
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "`glowflow sweep 'my config.yaml' lr tracking.storage=runs --warm-start earlier" in text
    assert "'lr/000/checkpoints/step-5' and x.bin" in text


def test_the_command_that_began_the_sweep_stands_below(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "lr", LR)
    sweep.trial("000", 0, {"training.lr": 1e-3}, loss_curve(2.3, 200))
    sweep.journal.append("sweep", **(sweep.about | {"command": ["glowflow", "sweep", "--resume", "lr"], "resumed": 1}))
    line = write_report(sweep.end(), formats=["md"])[0].read_text(encoding="utf-8").splitlines()[-1]
    assert line.startswith(
        "Command: `glowflow sweep configs/quickstart.yaml tune_spaces/lr.yaml`; versions: python 3.11.7"
    )
    assert "git 0123456789ab;" in line and "device: AMD EPYC, 2 cores; date: 20" in line


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    sweep = lr_search(tmp_path / "lr")
    write_report(sweep, formats=["html"])
    page = Page(sweep / "report" / "report.html")
    assert page.loads == []
    assert page.policy.startswith("default-src 'none'") and "http" not in page.policy
    assert "unsafe-eval" not in page.policy
    text = (sweep / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1 and page.scripts == 3
    assert "showSendToCloud: false" in text


@pytest.mark.parametrize("make", [lr_search, two_metrics])
def test_the_figures_of_the_page_are_valid_plotly(tmp_path: Path, make) -> None:
    import plotly.graph_objects as go

    for sweep in (make(tmp_path / "a"), variants_table(tmp_path / "b", {"x": 1.0, "y": 2.0})):
        panels = [panel for panel in panels_of(read_results(sweep)) if panel.data]
        assert panels
        for panel in panels:
            go.Figure(data=panel.data, layout=panel.layout)  # raises on a property that plotly does not know


def test_long_curves_are_thinned_for_the_page(tmp_path: Path) -> None:
    sweep = WrittenSweep(tmp_path / "lr", LR, max_steps=5000)
    curve = [(step, 5 / math.sqrt(step)) for step in range(1, 5001)]
    sweep.trial("000", 0, {"training.lr": 1e-3}, curve[-1:], spool=False)
    sweep._spool("000", curve)
    results = read_results(sweep.end())
    assert len(results.outcomes[0].curves["val_loss"]) == 5000
    drawn = next(p for p in panels_of(results) if "over the steps" in p.title).data[0]
    assert len(drawn["x"]) <= 201 and drawn["x"][-1] == 5000


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>|`_x_"
    body = {"space": {"model.arch": {"choice": [hostile, "plain"]}}, "trials": 2, "searcher": "random"}
    sweep = WrittenSweep(tmp_path / "lr", body, device=hostile)
    for point, value in enumerate((hostile, "plain")):
        why = f"ValueError: {hostile}"
        sweep.trial(f"00{point}", point, {"model.arch": value}, loss_curve(2.3, 200), status="FAILED", why=why)
    folder = sweep.end()
    write_report(folder)
    found = texts(folder / "report")
    assert "<script>alert" not in found["report.html"] and Page(folder / "report" / "report.html").scripts == 3
    assert "<script>alert" not in found["report.md"].replace(r"\<script\>", "")
    assert {len(row) for row in table_of(found["report.md"])} == {6}


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_what_cannot_be_reported_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no sweep"):
        write_report(tmp_path)
    sweep = lr_search(tmp_path / "lr", 2)
    with pytest.raises(ConfigError, match=r"formats: is none of md, png, html, csv \(got 'pdf'\)"):
        write_report(sweep, formats=["md", "pdf"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PreflightError, match="--out: cannot be written"):
        write_report(sweep, tmp_path / "file")


def test_the_data_is_plain_json(tmp_path: Path) -> None:
    data = report_data(lr_search(tmp_path / "mixed", 12, body=MIXED, failed=(3, 7)))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["best"] == data["trials"][0]["trial"] and data["counts"]["FAILED"] == 2
    assert set(data["provenance"]) == {"command", "versions", "device", "date", "config"}


# -- how things are written -------------------------------------------------------------------------------------------


def test_keys_are_as_short_as_they_can_be() -> None:
    keys = ["training.lr", "a.lr", "model.dim", "training.optimizer.weight_decay"]
    assert short_keys(keys) == {keys[0]: "training.lr", "a.lr": "a.lr", "model.dim": "dim", keys[3]: "weight_decay"}


def test_values_are_short() -> None:
    assert [short_value(v) for v in (1e-4, 0.00123456, True, None, 3, "wsd", [1, 2.5])] == [
        *("0.0001", "0.00123", "true", "none", "3", "wsd", "[1, 2.5]")
    ]
    assert short_value({"model.dim": 128, "model.depth": 6}) == "dim 128, depth 6"
    assert len(short_value("x" * 100)) == 24


def test_numbers_line_up() -> None:
    assert [decimals([2.3, 2.5, 1e10]), decimals([123.4]), decimals([0.0]), decimals([1e-9])] == [4, 2, 4, 12]
    assert [fixed(v, 4) for v in (2.34567, 1e-7, None, math.nan, math.inf)] == ["2.3457", "1.0e-07", "-", "-", "inf"]
    assert fixed(0.02, 4, sign=True) == "+0.0200"


def test_texts_are_wrapped_behind_separators() -> None:
    assert wrap("weight_decay", 13) == "weight_decay"
    assert wrap("a-long-variant-name-with-parts", 14) == "a-long-\nvariant-..." or "\n" in wrap(
        "a-long-variant-name", 14
    )
    assert all(len(line) <= 17 for line in wrap("word " * 40, 14, lines=3).splitlines())


def test_paths_and_control_characters_go() -> None:
    assert plain("\x1b[31mred\x1b[0m\n line\t2\x07") == "red line 2"
    assert relative("rank 1/3 of a/b at http://host/x/y") == "rank 1/3 of a/b at http://host/x/y"
    assert relative("in /data/runs/lr/000 and /home/me/x.bin:3", "/data/runs") == "in lr/000 and x.bin:3"
    assert relative("sqlite:////data/mlflow.db http://me:secret@host/") == "sqlite:mlflow.db http://host/"
    assert command_line(["/x/glowflow/__main__.py", "sweep", "a b"]) == "python -m glowflow sweep 'a b'"
    assert command_line(["/x/pytest/__main__.py", "-q"]) == "python -m pytest -q"
