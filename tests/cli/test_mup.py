"""``glowflow mup check`` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glowflow.cli.main import run

QUICK = ["--widths", "128,256,512", "--steps", "2", "--seeds", "1", "--lr", "3e-4"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {dim: 64, heads: 4, depth: 1}\n")
    return str(path)


def test_the_group_imports_no_torch() -> None:
    code = (
        "import sys\nfrom glowflow.cli.main import run\nassert run(['mup', 'check', '--help']) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\nassert not heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--widths" in done.stdout


def test_slopes_verdict_and_figure(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "new" / "coordinates.png"
    assert run(["mup", "check", config, *QUICK, "--out", str(figure)]) == 0
    shown = capsys.readouterr()
    places = ["embedding", "block 1 attention", "block 1 feed-forward", "block 1 residual", "logits"]
    rows = {name: line for name in places for line in shown.out.splitlines() if line.startswith(name)}
    assert list(rows) == places and "standard, t = 2" in shown.out
    *_, ours, standard = rows["block 1 feed-forward"].split()
    assert abs(float(ours)) <= 0.1 < 0.3 < float(standard)
    assert "ok: no slope under model.mup is farther from 0 than 0.1" in shown.out
    assert f"drawn in {figure}" in shown.out and figure.read_bytes().startswith(b"\x89PNG")
    assert "maximal-update parametrisation, width 512" in shown.err


def test_a_rate_that_breaks_everything_is_exit_code_1(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["mup", "check", config, "--widths", "64,128", "--steps", "2", "--seeds", "1", "--lr", "1e30"]
    assert run([*command, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"] and "logits" in document["failures"]
    assert document["widths"] == [64, 128] and document["lr"] == 1e30 and document["figure"] is None
    assert [len(row["slopes"]) for row in document["mup"]] == [2] * 5
    assert run(command) == 1
    shown = capsys.readouterr().out
    assert "not ok: " in shown and "<- depends on the width" in shown and "not finite" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "64"], "widths: must be two different ones at least"),
        (["--widths", "64,100"], "widths: must be a multiple of the width of a head, 16"),
        (["--widths", "64;128"], "is no list of whole numbers"),
        (["--out", "figure.pdf"], "--out: must end in .png"),
        (["model.base_dim=32"], "model.base_dim: has no effect without model.mup"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_line(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["mup", "check", config, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_architecture_of_ones_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from glowflow.core.architectures.base import BaseArchitecture\nclass Model(BaseArchitecture): pass\n"
    (tmp_path / "own_for_mup.py").write_text(source)
    (tmp_path / "own.yaml").write_text("model: {arch: 'own_for_mup:Model'}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(["mup", "check", str(tmp_path / "own.yaml")]) == 2
    assert "is an architecture that does not know maximal-update parametrisation" in capsys.readouterr().err
