"""A mixture of experts through the loop: two ranks (FSDP2, DDP) equal one process, resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_run import make_loop, small_config, train, train_sharded, weights

STEPS = 6
MOE = {"experts": 5, "active": 2, "shared": 1, "ffn_dim": 16, "every": 2, "balance": 0.1}


def config_of(strategy: str, workers: int, **more: Any) -> Any:
    sizes: dict[str, Any] = {f"model__moe__{name}": value for name, value in MOE.items()}
    return small_config(
        training__strategy=strategy, resources__workers=workers, training__max_steps=STEPS, training__log_interval=2,
        training__checkpoint_interval=3, training__val_interval=6, model__norm_placement="sandwich",
        **{**sizes, **more},
    )  # fmt: skip


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        _, recorder, loop = train(config_of(strategy, 2), run_dir / strategy)
        found[strategy] = (recorder.curve, {name: value.numpy() for name, value in weights(loop).items()})

    # As sharded as it gets: a group per block, gathered anew for each pass, recomputed blocks, half precision.
    config = config_of("fsdp", 2, training__activation_checkpointing=True, training__precision="bf16")
    whole = train_sharded(config, run_dir / "whole", None)
    resumed = train_sharded(config, run_dir / "resumed", checkpoint_path(run_dir / "whole", 3))
    found["resume"] = (whole, resumed)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_workers(2, run_on_rank, tmp_path_factory.mktemp("two"), timeout=240)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    _, recorder, loop = train(config_of("single", 1), tmp_path_factory.mktemp("one"))
    return recorder.curve, weights(loop)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one(two: Any, one: Any, strategy: str) -> None:
    alone, alone_weights = one
    curve, state = two[0][strategy]
    for step in range(1, STEPS + 1):
        for name, rel in (("train_loss", 1e-5), ("aux_loss", 1e-5), ("grad_norm", 1e-4)):
            assert curve[name][step] == pytest.approx(alone[name][step], rel=rel)
    for name, value in alone_weights.items():
        torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-3, atol=1e-4)
    assert two[1][strategy][0] == curve, "ranks agree"


def test_resume_is_exact_when_sharded_recomputed_and_in_bf16(two: Any) -> None:
    for found in two:
        whole, resumed = found["resume"]
        for name in ("train_loss", "aux_loss", "grad_norm"):
            assert resumed[name] == {step: whole[name][step] for step in (4, 5, 6)}


def test_the_balance_loss_is_trained_on_and_not_reported_as_loss(tmp_path: Path) -> None:
    """Its weight changes the gradients of the first step and not its loss."""
    torch.set_num_threads(1)
    curves = []
    for balance in (0.0, 0.1, 0.2):
        loop, recorder = make_loop(config_of("single", 1, model__moe__balance=balance), tmp_path / str(balance))
        loop.run()
        curves.append(recorder.curve)
    assert curves[0]["train_loss"][1] == curves[1]["train_loss"][1] == curves[2]["train_loss"][1]
    assert curves[0]["grad_norm"][1] != curves[1]["grad_norm"][1] != curves[2]["grad_norm"][1]
    assert "aux_loss" not in curves[0]
    assert curves[2]["aux_loss"][1] == pytest.approx(2 * curves[1]["aux_loss"][1], rel=1e-6)
    # One mixture among the two layers, which starts nearly balanced: its weight times about 1.
    assert curves[1]["aux_loss"][1] == pytest.approx(0.1, rel=0.3)


def test_memory_is_estimated_without_looking_at_the_routing() -> None:
    from glowflow.training.memory import estimate_memory

    small, large = (estimate_memory(config_of("single", 1, model__moe__experts=n)) for n in (5, 50))
    assert large.total > small.total
