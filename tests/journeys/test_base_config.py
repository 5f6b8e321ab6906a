"""configs/base.yaml, the first example of the project: planned, described on the meta device, and trained on a CPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.loader import load_config
from glowflow.core.model import GlowFlowModel, build_module
from glowflow.orchestration.pipeline import TrainingPipeline
from tests.journeys.support import ROOT, glowflow, write_corpus

GIB = 2**30
BASE = ROOT / "configs" / "base.yaml"
SMALL = ("training.batch_size=2", "data.tokenizer=bytes", "data.context=128")


def test_it_is_planned_and_described_without_memory(tmp_path: Path) -> None:
    planned = glowflow("plan", BASE, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    document: dict[str, Any] = json.loads(planned.stdout)
    assert document["config"]["model"]["memory"] == 512 and document["memory_per_worker"]["carry"] > 6 * GIB
    module = build_module(GlowFlowModel(load_config(BASE, SMALL), {"vocab_size": 257}).config, "meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    # Embedding, 24 x (q, k, v, position and out projections, SwiGLU, two norms), u and v, last norm.
    blocks = 24 * (5 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024)
    assert module.num_parameters() == 257 * 1024 + blocks + 3 * 1024


@pytest.mark.slow
@pytest.mark.journey
def test_it_trains_two_steps_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own, whose peak memory the kernel tells."""
    options = (
        f"data.dataset={write_corpus(tmp_path / 'corpus')}", f"data.cache_dir={tmp_path / 'cache'}",
        "training.max_steps=2", "training.checkpoint_interval=2", "training.val_interval=2",
        "training.val_batches=1", "training.warmup_steps=1", "training.log_interval=1",
        "tracking.backend=jsonl", f"tracking.storage={tmp_path / 'runs'}", "resources.accelerator=cpu",
    )  # fmt: skip
    trained = glowflow("train", BASE, *SMALL, *options, "--local", "--json", cwd=tmp_path, timeout=800)
    assert trained.returncode == 0, trained.stderr
    record = json.loads(trained.stdout)
    assert record["status"] == "FINISHED" and record["steps"] == 2
    assert 3 < record["final"]["train_loss"] < 8 and 3 < record["final"]["val_loss"] < 8
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak memory {peak / GIB:.1f} GiB")
    assert 4 * GIB < peak < 12 * GIB
    model = torch.load(next(tmp_path.glob("runs/*/checkpoints/model-2.pt")), map_location="meta", weights_only=True)
    assert model["config"]["model"]["arch"] == "transformer-xl"


FIRST_EXAMPLE = """\
from glowflow import GlowFlowModel, TrainingPipeline
model = GlowFlowModel.from_config("configs/base.yaml")
trainer = TrainingPipeline(model=model, dataset="wikitext-103", accelerator="gpu", precision="bf16")
trainer.fit(max_steps=100000, checkpoint_interval=1000, monitor_metrics=["perplexity", "grad_norm"])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the first example trains for hours")
def test_the_first_example_runs_verbatim_up_to_the_missing_gpu(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(BASE.parent)
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_EXAMPLE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "PreflightError" in ended.stderr and "resources.accelerator" in ended.stderr, ended.stderr
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_the_first_example_runs_in_small_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(BASE.parent)
    small = ["model.dim=32", "model.depth=2", "model.heads=2", "model.memory=32", "data.context=32", *SMALL[:2]]
    options: dict[str, Any] = {
        "data.cache_dir": str(tmp_path / "cache"),
        "tracking.backend": "jsonl",
        "training.batch_size": 4,
    }
    model = GlowFlowModel.from_config("configs/base.yaml", small)
    corpus = str(write_corpus(tmp_path / "corpus"))
    trainer = TrainingPipeline(model=model, dataset=corpus, accelerator="cpu", precision="fp32", **options)
    record = trainer.fit(
        max_steps=20, checkpoint_interval=10, monitor_metrics=["perplexity", "grad_norm"], local=True, progress=False
    )
    assert record.status == "FINISHED" and record.steps == 20
    assert record.config["training"]["optimizer"]["name"] == "lion"
    assert {"perplexity", "grad_norm"} <= record.final.keys()
    written = sorted(path.name for path in (tmp_path / "runs" / record.run / "checkpoints").glob("model-*.pt"))
    assert written == ["model-20.pt"] and trainer.model.step == 20
