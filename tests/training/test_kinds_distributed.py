"""Every kind of attention under FSDP2, two ranks: recomputed blocks, bf16, documents; a resume is exact to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch
from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_run import make_rows, small_config, train_sharded

STEPS = 3
WINDOW = {"attention__kind": "windowed", "attention__window": 4, "attention__sinks": 1}
SPARSE = {"attention__kind": "sparse", "attention__sparse__local": 2, "attention__sparse__stride": 3}
LINEAR = {"attention__kind": "linear", "attention__linear__chunk": 4}
MIXED = {"attention__kind": "adaptive", "attention__window": 3}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-alibi": {"position": "alibi", "norm_placement": "post", "ffn": "gelu"},
    "windowed": WINDOW,
    "strided": SPARSE,
    "fixed": {**SPARSE, "attention__sparse__pattern": "fixed"},
    "local_global": {**SPARSE, "attention__sparse__pattern": "local_global"},
    "gated": LINEAR,
    "feature_map": {**LINEAR, "attention__linear__variant": "feature_map"},
    "retention": {**LINEAR, "attention__linear__variant": "retention"},
    "gated_delta": {**LINEAR, "attention__linear__variant": "gated_delta"},
    "pattern": {**MIXED, "attention__adaptive__pattern": "LW"},
    "by_length": {**MIXED, "attention__adaptive__policy": "by_length", "attention__adaptive__dense_up_to": 8},
    "mixture": {**MIXED, "attention__adaptive__policy": "gated", "parallel_block": True},
    "transformer-xl": {"arch": "transformer-xl", "memory": 6},
}


def config_of(kind: str) -> GlowFlowConfig:
    return small_config(
        training__strategy="fsdp", resources__workers=2, training__max_steps=STEPS, training__log_interval=1,
        training__checkpoint_interval=2, training__val_interval=100, training__activation_checkpointing=True,
        training__precision="bf16", **{f"model__{key}": value for key, value in KINDS[kind].items()},
    )  # fmt: skip


def rows_of(step: int, config: GlowFlowConfig) -> Batch:
    """Two documents in a row, of which the first came from the row before."""
    batch = make_rows(step, config)
    batch.document_ids = (batch.positions >= 5).long() + step
    batch.single_document = False
    return batch


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        config, folder = config_of(kind), run_dir / kind
        whole = train_sharded(config, folder / "whole", None, rows=rows_of)
        resumed = train_sharded(config, folder / "resumed", checkpoint_path(folder / "whole", 2), rows=rows_of)
        found[kind] = (whole["train_loss"], resumed["train_loss"])
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(2, run_on_rank, tmp_path_factory.mktemp("two"), timeout=400)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_resumes_to_the_bit(two: list[dict[str, Any]], kind: str) -> None:
    for found in two:
        whole, resumed = found[kind]
        assert all(torch.isfinite(torch.tensor(list(whole.values()))))
        assert len(set(whole.values())) == STEPS
        assert resumed == {step: whole[step] for step in (STEPS,)}
    assert two[0][kind] == two[1][kind], "ranks agree"


@pytest.mark.parametrize("kind", ["windowed", "sparse", "linear", "adaptive"])
def test_what_transformer_xl_cannot_be_is_refused_with_the_reason(kind: str) -> None:
    window = {} if kind in ("sparse", "linear") else {"model__attention__window": 4}
    if kind == "adaptive":
        window["model__attention__adaptive__pattern"] = "DW"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="relative positions with memory are defined for it alone"):
        small_config(model__arch="transformer-xl", model__attention__kind=kind, **window)
