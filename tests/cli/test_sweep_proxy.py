"""``glowflow sweep --proxy``: what it shows and refuses before anything starts, and what a finished one is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from glowflow.cli.main import run
from glowflow.config.errors import ConfigError, RunError
from glowflow.config.loader import apply_overrides, config_fingerprint, load_config, to_dict
from glowflow.config.spaces.proxy import make_proxy
from glowflow.experiments.journal import read_journal
from glowflow.experiments.report import report_data, write_report
from glowflow.experiments.winner import config_of, winner, write_full_width
from glowflow.orchestration.sweep.prepare import check_same, prepare_sweep
from tests.experiments.written_sweeps import WrittenSweep, loss_curve

WIDE: dict[str, Any] = {
    "model": {"mup": True, "base_dim": 32, "dim": 128, "heads": 8, "depth": 1, "ffn_dim": 344},
    "data": {"tokenizer": "bytes", "context": 16},
    "training": {"optimizer": {"name": "adamw", "betas": [0.9, 0.99]}, "max_steps": 50, "warmup_steps": 2},
    "tracking": {"backend": "jsonl"},
    "resources": {"accelerator": "cpu", "workers": 2},
}
RATES: dict[str, Any] = {
    "set": {"resources.workers": 1},
    "space": {
        "training.optimizer": {"grid": ["adamw", "lion"]},
        "training.lr": [
            {"grid": [1e-3, 4e-3], "when": {"training.optimizer": "adamw"}},
            {"grid": [2e-4], "when": {"training.optimizer": "lion"}},
        ],
    },
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    config, space = tmp_path / "wide.yaml", tmp_path / "rates.yaml"
    config.write_text(yaml.safe_dump({**WIDE, "tracking": {"backend": "jsonl", "storage": str(tmp_path / "runs")}}))
    space.write_text(yaml.safe_dump(RATES))
    return str(config), str(space)


def begun(folder: Path, *, given: bool = True) -> WrittenSweep:
    """A sweep at width 32 for width 128, as the driver's journal begins."""
    wide = load_config(WIDE)
    proxy, _ = make_proxy(wide, "width=32")
    assert proxy is not None
    narrow = apply_overrides(wide, proxy.changes)
    about: dict[str, Any] = {
        "config": to_dict(narrow),
        "config_fingerprint": config_fingerprint(narrow),
        "proxy": proxy.to_dict(),
    }
    if given:
        about["given"] = narrow.model_dump(mode="json", exclude_unset=True)
    return WrittenSweep(folder, RATES, max_steps=50, **about)


def finished(folder: Path, **options: Any) -> Path:
    sweep = begun(folder, **options)
    for number, (name, lr, loss) in enumerate([("adamw", 1e-3, 2.5), ("adamw", 4e-3, 2.4), ("lion", 2e-4, 2.3)]):
        params = {"training.optimizer": name, "training.lr": lr}
        sweep.trial(f"{number:03d}", number, params, loss_curve(loss, 50))
    return sweep.end()


def test_a_dry_run_shows_what_the_proxy_changes(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", *files, "--proxy", "width=32", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "proxy         model.dim 32 (full: 128), model.heads 2 (full: 8), model.ffn_dim 86 (full: 344)" in shown
    assert run(["sweep", *files, "--proxy", "width=32", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["proxy"]["width"], plan["proxy"]["full_width"], plan["trials"]) == (32, 128, 3)
    assert run(["sweep", *files, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proxy"] is None


def test_everything_that_is_wrong_comes_out_at_once(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    keys = ("model.depth", "training.optimizer.weight_decay", "training.lrr")
    space = {"space": {key: {"choice": [1]} for key in keys}, "trials": 2, "set": {"model.dim": 64}}
    bad.write_text(yaml.safe_dump(space))
    standard = ("model.mup=false", "model.base_dim=128")
    assert run(["sweep", files[0], str(bad), *standard, "--proxy", "width=7,steps=3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    for words in (
        "--proxy width: must be a multiple of the width of a head, 16",
        "--proxy steps: makes a shorter training",
        "model.mup: must be true",
        "space.model.depth: model.depth does not transfer over the width",
        "space.training.optimizer.weight_decay: training.optimizer.weight_decay does not transfer",
        "set.model.dim: model.dim is a size",
        "space.training.lrr: is not a known key; did you mean 'training.lr'?",
    ):
        assert words in printed.err, printed.err
    assert ": 7 problems\n" in printed.err, "and none of them twice"
    assert not (tmp_path / "runs").exists()


def test_the_trials_are_narrow_and_the_space_is_held_against_them(files: tuple[str, str]) -> None:
    prepared = prepare_sweep(files[0], files[1], ["training.batch_size=4"], proxy="width=32")
    model = prepared.settings.trial_config({"training.lr": 1e-3}, 0, "000").model.model_dump()
    assert (model["dim"], model["heads"], model["ffn_dim"], model["base_dim"]) == (32, 2, 86, 32)
    with pytest.raises(ConfigError, match=r"resources\.workers"):
        prepare_sweep(files[0], {**RATES, "set": {"resources.workers": 3}}, proxy="width=32")


def test_the_winner_is_a_config_at_the_full_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "narrow")
    path = write_full_width(folder)
    assert path == folder / "best_full.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# narrow/002, the best trial of the sweep narrow, found at width 32, for width 128\n")
    # What was searched is the winner's, everything else the user's own: AdamW's betas are none of Lion's.
    wanted = {"training.optimizer": "lion", "training.lr": 2e-4, "training.seed": 0}
    assert load_config(path) == apply_overrides(load_config(WIDE), wanted)
    out = tmp_path / "winner.yaml"
    assert run(["runs", "best", "narrow", "--storage", str(tmp_path), "--export", str(out)]) == 0
    printed = capsys.readouterr()
    assert "found at width 32, for width 128" in printed.out and "at its full width, 128" in printed.err
    assert out.read_text(encoding="utf-8") == text
    assert run(["runs", "best", "narrow", "--storage", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proxy"]["changes"]["model.heads"] == 2


def test_status_and_report_say_where_the_results_were_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "narrow")
    assert run(["sweep", "status", "narrow", "--storage", str(tmp_path)]) == 0
    assert "proxy: found at width 32, for width 128" in capsys.readouterr().out
    assert run(["sweep", "status", "narrow", "--storage", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proxy"]["full"]["model.dim"] == 128
    write_report(folder, formats=["md", "html"])
    for name in ("report.md", "report.html"):
        assert "found at width 32, for width 128" in (folder / "report" / name).read_text(encoding="utf-8")
    assert report_data(folder)["proxy"]["width"] == 32


def test_a_sweep_without_a_result_or_a_proxy_has_no_full_width(tmp_path: Path) -> None:
    open_one = begun(tmp_path / "narrow").end("KILLED")
    assert write_full_width(open_one) is None
    with pytest.raises(RunError, match="no trial of the sweep has a result yet"):
        winner(open_one)
    plain = WrittenSweep(tmp_path / "plain", RATES, config=to_dict(load_config(WIDE)))
    plain.trial("000", 0, {"training.optimizer": "adamw", "training.lr": 1e-3}, loss_curve(2.5, 50))
    assert write_full_width(plain.end()) is None and winner(tmp_path / "plain").proxy is None


def test_a_sweep_goes_on_with_the_proxy_it_was_begun_with(files: tuple[str, str], tmp_path: Path) -> None:
    state = read_journal(begun(tmp_path / "narrow").end("KILLED"))
    check_same(state, None, None, ())
    check_same(state, files[0], files[1], (), "width=32")
    for text in ("width=64", "width=16,depth=1"):
        with pytest.raises(RunError, match="differs from that of the sweep, which has width=32"):
            check_same(state, None, None, (), text)
    with pytest.raises(RunError, match="differs from the config"):
        check_same(state, files[0], None, ["training.max_steps=30"])
    without = read_journal(WrittenSweep(tmp_path / "plain", RATES).end("KILLED"))
    with pytest.raises(RunError, match="which has none"):
        check_same(without, None, None, (), "width=32")


def test_a_resumed_sweep_may_still_choose_another_optimizer(tmp_path: Path) -> None:
    """The journal keeps what was given, not only what it came to: a name that is changed must not meet defaults."""
    plain = load_config({"model": {"depth": 1}})
    begun = WrittenSweep(
        tmp_path / "plain",
        {"space": {"training.optimizer.name": {"grid": ["adamw", "lion"]}}},
        config=to_dict(plain),
        given=plain.model_dump(mode="json", exclude_unset=True),
    )
    begun.trial("000", 0, {"training.optimizer.name": "lion"}, loss_curve(2.5, 200))
    state = read_journal(begun.end())
    assert config_of(state) == plain and config_of(state).model_fields_set == plain.model_fields_set
    assert winner(tmp_path / "plain").config.training.optimizer.name == "lion"
    # Defaults that are no longer those of the sweep: what it came to counts.
    state.about["config"]["training"]["lr"] = 0.5
    assert config_of(state).training.lr == 0.5
