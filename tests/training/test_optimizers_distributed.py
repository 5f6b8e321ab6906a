"""Every optimiser under FSDP2, two ranks: the losses of one process, and a resume that is exact to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glowflow.config.registry import OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_run import small_config, train, train_sharded

STEPS = 6
NAMES = OPTIMIZERS.names()


def config_of(name: str, **more: Any) -> GlowFlowConfig:
    """Width 20: matrices of 33 and 31 rows, which two ranks cannot share evenly."""
    return small_config(
        model__dim=20, model__ffn_dim=33, training__optimizer=name, training__max_steps=STEPS, training__log_interval=1,
        training__checkpoint_interval=4, training__val_interval=100, training__lr=1e-3, training__warmup_steps=1,
        **more,
    )  # fmt: skip


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    found = {}
    for name in NAMES:
        config, folder = config_of(name, training__strategy="fsdp", resources__workers=2), run_dir / name
        whole = train_sharded(config, folder / "whole", None)
        resumed = train_sharded(config, folder / "resumed", checkpoint_path(folder / "whole", 4))
        found[name] = (whole["train_loss"], resumed["train_loss"])
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(2, run_on_rank, tmp_path_factory.mktemp("two"), timeout=400)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process_and_resume_to_the_bit(two: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    alone = train(config_of(name), tmp_path / "one")[1].curve["train_loss"]
    assert alone[STEPS] < alone[1] - 0.01, "it learns"
    for whole, resumed in (found[name] for found in two):
        assert whole == pytest.approx(alone, abs=2e-6)
        assert resumed == {step: whole[step] for step in (5, 6)}
