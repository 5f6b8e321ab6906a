"""``glowflow attention explain`` and ``check`` as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.cli.main import run
from glowflow.core.attention import check
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.check_cases import CASES
from glowflow.core.attention.dispatch import SOFTMAX_BACKENDS

MIXED = ["model.depth=5", "model.attention.kind=adaptive", "model.attention.adaptive.pattern=LLWS"]
MIXED += ["model.attention.window=8", "training.precision=bf16"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {dim: 128, heads: 2}\nresources: {accelerator: cpu}\n")
    return str(path)


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert run([*args, "--json"]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest case alone: the command is what is tested."""
    monkeypatch.setattr(check.check_attention, "__kwdefaults__", {**_DEFAULTS, "cases": CASES[:1]})


_DEFAULTS: dict[str, Any] = dict(check.check_attention.__kwdefaults__ or {})


def test_the_group_imports_no_torch() -> None:
    code = (
        "import sys\nfrom glowflow.cli.main import run\nassert run(['attention', '--help']) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "explain" in done.stdout and "check" in done.stdout


def test_explain_has_every_kernel_of_every_kind(document: Any, config: str) -> None:
    shown = document("attention", "explain", config, *MIXED)
    assert (shown["device"], shown["dtype"], shown["backend"]) == ("cpu", "bfloat16", "auto")
    kinds = {kind["kind"]: kind for kind in shown["kinds"]}
    assert {name: kind["layers"] for name, kind in kinds.items()} == {
        "linear": [0, 1, 4],
        "windowed": [2],
        "sparse": [3],
    }
    for name in ("windowed", "sparse"):
        assert {row["name"] for row in kinds[name]["backends"]} == set(SOFTMAX_BACKENDS)
    assert {row["name"] for row in kinds["linear"]["backends"]} == {"chunk", "fla", "reference"}
    for kind in shown["kinds"]:
        assert [row["name"] for row in kind["backends"] if row["chosen"]] == [kind["chosen"]]
        assert all(row["reasons"] or row["advice"] for row in kind["backends"])
    assert kinds["windowed"]["chosen_to_generate"] == "sdpa"
    flash = next(row for row in kinds["windowed"]["backends"] if row["name"] == "flash_attn_2")
    assert "runs on CUDA alone, not on cpu" in flash["reasons"]


def test_explain_for_another_device_and_a_named_kernel(document: Any, config: str) -> None:
    shown = document("attention", "explain", config, "--device", "cuda", "training.precision=bf16")
    (kind,) = shown["kinds"]
    assert shown["device"] == "cuda" and kind["chosen"] == "sdpa" and kind["backends"][0]["name"] == "sdpa"
    shown = document("attention", "explain", config, "model.attention.backend=flash_attn_2")
    assert shown["kinds"][0]["chosen"] is None and shown["backend"] == "flash_attn_2"


def test_explain_prints_for_people(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attention", "explain", config, *MIXED]) == 0
    printed = capsys.readouterr().out
    for text in ("linear (layers 0-1, 4)", "windowed (layer 2)", "chosen", "cannot", "CUDA alone", "to generate"):
        assert text in printed


def test_explain_knows_the_kernels_of_relative_positions(document: Any, config: str) -> None:
    shown = document("attention", "explain", config, "model.arch=transformer-xl")
    (kind,) = shown["kinds"]
    assert {row["name"] for row in kind["backends"]} == {"sdpa", "reference"}
    assert "relative positions" in kind["backends"][0]["advice"]


def test_check_passes_and_says_what_was_not_there(
    one_case: None, document: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = document("attention", "check", "--backend", "sdpa", "--backend", "flash_attn_2", "--dtype", "float64")
    assert shown["ok"] and shown["device"] == "cpu" and shown["torch"] == torch.__version__
    status = {(row["backend"], row["dtype"]): row["status"] for row in shown["rows"]}
    assert status == {("sdpa", "float64"): "ok", ("flash_attn_2", "float64"): "cannot"}
    assert run(["attention", "check", "--backend", "sdpa", "--backend", "flash_attn_2", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "not checked here\n  flash_attn_2 " in printed and "CUDA alone" in printed and "bfloat16" in printed


def test_check_fails_with_code_1_and_says_how_far_off(
    one_case: None, monkeypatch: pytest.MonkeyPatch, document: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(ReferenceBackend):
        def run(self, *args: Any, **more: Any) -> torch.Tensor:
            return super().run(*args, **more) * 1.1

    monkeypatch.setitem(check.SOFTMAX_BACKENDS, "sdpa", Wrong())
    shown = document("attention", "check", "--backend", "sdpa", "--dtype", "fp32", code=1)
    (row,) = shown["rows"]
    assert not shown["ok"] and row["status"] == "failed" and row["errors"]["out"] == pytest.approx(0.1, rel=1e-3)
    assert run(["attention", "check", "--backend", "sdpa", "--dtype", "fp32"]) == 1
    printed = capsys.readouterr()
    assert "1 failed" in printed.out and "<- too far off" in printed.out and "failed: sdpa float32" in printed.err


def test_check_of_what_is_not_there_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attention", "check", "--backend", "warp"]) == 2
    assert "must be one of sdpa" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(["attention", "check", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
