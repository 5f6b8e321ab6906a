"""The commands as a person types them: what they print, and that ``--json`` is one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.cli.main import run

from .conftest import TINY, Workshop


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command with --json and parse what it printed on stdout."""

    def call(*args: str) -> Any:
        capsys.readouterr()
        assert run([*args, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def test_help_lists_the_commands_and_imports_none_of_the_big_libraries() -> None:
    code = (
        "import sys\nfrom glowflow.cli.main import run\nrun(['--help'])\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("train", "plan", "data", "eval", "generate", "export", "runs", "ui", "bench"):
        assert f"\n  {name} " in done.stdout


CONFIGS = ["quickstart", "shakespeare_char", "shakespeare_muon", "wikitext2", "lm_124m", "lm_350m", "lm_1b3", "lm_3b8"]
CONFIGS += ["multimodal_digits", "av_digits", "flickr8k_caption"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_passes_plan(document: Any, repository: Path, tmp_path: Path, name: str) -> None:
    shown = document("plan", str(repository / f"configs/{name}.yaml"), f"data.cache_dir={tmp_path}")
    assert shown["parameters"] > 0 and shown["memory_per_worker"]["total"] > 0
    nominal = {"lm_124m": 124e6, "lm_350m": 350e6, "lm_1b3": 1.3e9, "lm_3b8": 3.8e9}
    if name in nominal:
        assert shown["parameters"] == pytest.approx(nominal[name], rel=0.06)
    assert sum(row["chosen"] for row in shown["attention"]) == 1


def test_plan_answers_the_memory_question(document: Any, repository: Path) -> None:
    shown = document("plan", str(repository / "configs/lm_124m.yaml"), "--vram", "24")
    assert shown["vram"]["largest_micro_batch_size"] >= 1
    shown = document("plan", str(repository / "configs/lm_3b8.yaml"), "--vram", "24", "resources.workers=1")
    assert shown["vram"] == {"gib": 24.0, "fits": False, "largest_micro_batch_size": None}


def test_plan_prints_for_people(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(workshop.config), *TINY, "training.warmup_steps=100"]) == 0
    printed = capsys.readouterr().out
    for text in ("parameters", "memory per worker", "sdpa", "warning: training.warmup_steps"):
        assert text in printed


def test_train_json_is_run_json(document: Any, workshop: Workshop) -> None:
    shown = document("train", str(workshop.config), "--local", "--run", "second", *TINY)
    on_disk = json.loads((workshop.storage / "second" / "run.json").read_text())
    assert shown == on_disk
    assert shown["status"] == "FINISHED" and shown["steps"] == 6 and shown["tokens"] == 6 * 4 * 16
    assert set(shown["fingerprints"]) >= {"config", "data", "code"}
    assert {"train_loss", "val_loss", "perplexity", "grad_norm"} <= set(shown["final"])
    again = document("runs", "show", "second", "--storage", str(workshop.storage))
    assert {key: again[key] for key in ("run", "status", "final", "checkpoints")} == {
        key: shown[key] for key in ("run", "status", "final", "checkpoints")
    }
    listed = document("runs", "list", "--storage", str(workshop.storage))
    assert {"first", "second"} <= {row["run"] for row in listed}
    compared = document("runs", "compare", "first", "second", "--storage", str(workshop.storage))
    assert compared["metrics"]["val_loss"][0] == compared["metrics"]["val_loss"][1]


def test_eval_of_run_checkpoint_and_file_agree(document: Any, workshop: Workshop, tmp_path: Path) -> None:
    storage = ("--storage", str(workshop.storage))
    of_run = document("eval", workshop.run, *storage)
    low, high = of_run["confidence"]["bits_per_byte"]
    assert low <= of_run["bits_per_byte"] <= high
    checkpoint = str(workshop.storage / workshop.run / "checkpoints" / "step-6")
    assert run(["export", workshop.run, str(tmp_path / "model.safetensors"), *storage]) == 0
    exported = str(workshop.storage / workshop.run / "checkpoints/model-6.pt")
    for target in (checkpoint, exported, str(tmp_path / "model.safetensors")):
        assert document("eval", target)["loss"] == pytest.approx(of_run["loss"], abs=1e-9)


def test_export_is_plain_tensors_with_config_and_tokenizer(workshop: Workshop) -> None:
    path = workshop.storage / workshop.run / "checkpoints" / "model-6.pt"
    content = torch.load(path, weights_only=True)
    assert content["config"]["model"]["dim"] == 16 and content["tokenizer"]["kind"] == "bytes"
    assert all(isinstance(tensor, torch.Tensor) for tensor in content["state_dict"].values())


def test_generate_is_seeded(document: Any, workshop: Workshop) -> None:
    args = ("generate", workshop.run, "--storage", str(workshop.storage), "--prompt", "the ", "--max-tokens", "20")
    assert document(*args, "--seed", "1") == document(*args, "--seed", "1")
    texts = {document(*args, "--seed", str(seed))["results"][0]["text"] for seed in range(4)}
    assert len(texts) > 1


def test_data_commands(document: Any, workshop: Workshop) -> None:
    shown = document("data", "inspect", str(workshop.built))
    assert shown["splits"]["train"]["documents"] + shown["splits"]["validation"]["documents"] <= 12
    assert document("data", "verify", str(workshop.built))["ok"] is True
    listed = {row["name"]: row for row in document("data", "list")}
    assert listed["python-stdlib"]["available"]
    assert {"wikitext-2", "wikitext-103", "tinyshakespeare"} <= set(listed)


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)
