"""The loop on two gloo ranks: the same numbers as one rank, and ranks that never part ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.errors import RunError
from glowflow.training.callbacks import read_samples
from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_run import make_loop, small_config, train, weights

STEPS = 12


def config_of(strategy: str, workers: int, **more: Any) -> Any:
    return small_config(
        training__strategy=strategy, resources__workers=workers, training__max_steps=STEPS, training__log_interval=4,
        training__checkpoint_interval=6, **more,
    )  # fmt: skip


def run_on_rank(run_dir: Path) -> dict[str, Any]:
    """Several runs in one process group, since starting processes is what takes the time."""
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        result, recorder, loop = train(config_of(strategy, 2), run_dir / strategy)
        state = {name: value.numpy() for name, value in weights(loop).items()}
        found[strategy] = (recorder.curve, recorder.validations, recorder.checkpoints, state, result.status)

    # The last rank alone sees an infinite loss; both must skip the step and count it.
    result, recorder, loop = train(config_of("fsdp", 2), run_dir / "poison", poison=frozenset({3}))
    found["poison"] = (result.final["nonfinite_steps"], recorder.curve["train_loss"], recorder.curve["grad_norm"])

    # One rank alone is asked to stop; both stop at the next step that reads the device (6).
    result, first, _ = train(config_of("fsdp", 2), run_dir / "stop", stop_at=5 if rank == 1 else None)
    resumed, second, _ = train(config_of("fsdp", 2), run_dir / "stop", checkpoint_path(run_dir / "stop", result.step))
    found["stop"] = (
        result.status,
        result.step,
        resumed.status,
        {**first.curve["train_loss"], **second.curve["train_loss"]},
    )

    loop, _ = make_loop(config_of("ddp", 2, training__max_nonfinite_steps=0), run_dir / "many", poison=frozenset({2}))
    try:
        loop.run()
    except RunError as error:
        found["error"] = str(error)

    # Without synchronised gradients each rank goes its own way: the comparison below can fail.
    loop, recorder = make_loop(config_of("ddp", 2), run_dir / "unsynchronised")
    loop.strategy.accumulate = lambda module, last: module.no_sync()  # type: ignore[method-assign]
    loop.run()
    found["unsynchronised"] = recorder.curve["train_loss"]
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("two")
    return run_dir, run_workers(2, run_on_rank, run_dir, timeout=240)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("one")
    _, recorder, loop = train(config_of("single", 1), run_dir)
    return run_dir, recorder, weights(loop)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one(two: Any, one: Any, strategy: str) -> None:
    _, found = two
    _, alone, alone_weights = one
    curve, validations, checkpoints, state, status = found[0][strategy]
    assert status == "FINISHED"
    for step in range(1, STEPS + 1):
        assert curve["train_loss"][step] == pytest.approx(alone.curve["train_loss"][step], rel=1e-5)
        assert curve["grad_norm"][step] == pytest.approx(alone.curve["grad_norm"][step], rel=1e-4)
    assert validations[STEPS]["val_loss"] == pytest.approx(alone.validations[STEPS]["val_loss"], rel=1e-5)
    for name, value in alone_weights.items():
        torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-3, atol=1e-4)
    assert checkpoints == [6, 12]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_agree_on_every_number(two: Any, strategy: str) -> None:
    _, found = two
    assert found[0][strategy][:3] == found[1][strategy][:3]
    assert found[1][strategy][3] == {}, "the full weights are gathered on rank 0 only"


def test_the_same_samples_in_the_same_order(two: Any, one: Any) -> None:
    assert read_samples(two[0] / "fsdp") == read_samples(one[0])
    assert len(read_samples(one[0])) == STEPS


def test_unsynchronised_gradients_are_noticed(two: Any, one: Any) -> None:
    _, alone, _ = one
    curve = two[1][0]["unsynchronised"]
    worst = max(abs(curve[step] / alone.curve["train_loss"][step] - 1) for step in curve)
    assert worst > 1e-4


def test_a_loss_that_one_rank_alone_loses_is_skipped_by_both(two: Any) -> None:
    for found in two[1]:
        skipped, losses, norms = found["poison"]
        assert skipped == 1
        bad = [step for step, value in losses.items() if not torch.isfinite(torch.tensor(value))]
        assert bad == [4]
        assert all(torch.isfinite(torch.tensor(value)) for step, value in norms.items() if step != 4)
    assert [v for v in two[1][0]["poison"][1].values() if v == v] == [
        v for v in two[1][1]["poison"][1].values() if v == v
    ]


def test_a_stop_asked_of_one_rank_stops_both(two: Any) -> None:
    for found in two[1]:
        status, step, resumed, losses = found["stop"]
        assert (status, step, resumed) == ("KILLED", 6, "FINISHED")
        assert losses == found["fsdp"][0]["train_loss"], "bit for bit, also over the restart"


def test_too_many_skipped_steps_stop_both(two: Any) -> None:
    for found in two[1]:
        assert "training.max_nonfinite_steps" in found["error"]
