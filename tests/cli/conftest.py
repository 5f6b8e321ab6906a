"""A built data set and a trained run, small and made once, for all tests of commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from glowflow.cli.main import run

TINY = [
    *("model.dim=16", "model.depth=1", "model.heads=2", "data.context=16", "training.batch_size=4"),
    *("training.max_steps=6", "training.warmup_steps=1", "training.val_batches=1", "training.log_interval=2"),
    *("training.checkpoint_interval=3", "training.threads=1", "resources.accelerator=cpu", "tracking.backend=jsonl"),
    "tracking.system_metrics=false",
]


@dataclass(frozen=True)
class Workshop:
    """Where things are."""

    root: Path
    config: Path
    text: Path
    built: Path
    storage: Path
    run: str


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Text, a build of it, a config file, and the run ``first``."""
    root = tmp_path_factory.mktemp("workshop")
    text = root / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox " * (5 + number))
    built, storage, config = root / "built", root / "runs", root / "tiny.yaml"
    assert run(["data", "build", str(text), str(built), "--tokenizer", "bytes", "--local"]) == 0
    config.write_text(f"data: {{dataset: {built}}}\ntracking: {{storage: {storage}}}\n")
    assert run(["train", str(config), "--local", "--run", "first", *TINY]) == 0
    return Workshop(root, config, text, built, storage, "first")
