"""Transformer-XL in the loop: memory by global lane over workers, resumes, validation; FSDP2 on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch
from glowflow.training.carry import join_carries
from glowflow.training.loop import TrainLoop
from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_run import VOCAB, make_loop, small_config, train

STEPS, EPOCH = 9, 7  # an epoch ends within the run: all lanes forget


def lanes(step: int, config: GlowFlowConfig) -> Batch:
    """The global batch of a step: each row goes on where it ended in the step before, through several documents."""
    size, context = config.training.batch_size, config.data.context
    epoch, inside = divmod(step, EPOCH if step < 10_000 else 10)
    generator = torch.Generator().manual_seed(epoch)
    text = torch.randint(0, VOCAB, (size, 10 * context + 1), generator=generator)
    here = torch.arange(inside * context, (inside + 1) * context)
    documents = (here + torch.arange(size)[:, None] * 5) // 29
    return Batch(
        tokens=text[:, here],
        targets=text[:, here + 1],
        loss_weights=torch.ones(size, context),
        positions=here.expand(size, context).contiguous(),
        document_ids=documents,
        sample_ids=torch.arange(step * size, (step + 1) * size),
        reset=torch.full((size,), inside == 0),
        single_document=False,
    )


def config_of(workers: int, **more: Any) -> GlowFlowConfig:
    keys: dict[str, Any] = {
        "model__arch": "transformer-xl", "model__memory": 18, "model__init_std": 0.2, "training__max_steps": STEPS,
        "training__log_interval": 1, "training__checkpoint_interval": 3, "training__val_interval": 3,
        "training__micro_batch_size": 2, "resources__workers": workers,
    }  # fmt: skip
    return small_config(**{**keys, **more})


def memory(loop: TrainLoop) -> dict[str, Tensor]:
    joined = join_carries(loop._carries)
    assert joined is not None
    return joined


def part(run_dir: Path, first: int, last: int, workers: int, **more: Any) -> Any:
    """Train steps [first, last) of the run; returns losses, validations and this rank's memory."""
    resume = checkpoint_path(run_dir, first) if first else None
    stop = last if last < STEPS else None
    _, recorder, loop = train(config_of(workers, **more), run_dir, resume, stop_at=stop, rows=lanes)
    assert loop.step == last
    plain = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in memory(loop).items()
    }
    return recorder.curve["train_loss"], {k: v["val_loss"] for k, v in recorder.validations.items()}, plain


def many_ways(run_dir: Path) -> dict[str, Any]:
    """Several runs in one process group, since starting processes is what takes the time."""
    mixed = {"training__precision": "bf16", "training__activation_checkpointing": True, "training__strategy": "fsdp"}
    found = {
        "first": part(run_dir / "moved", 0, 3, 2),
        "whole": part(run_dir / "whole", 0, STEPS, 2, **mixed),
        "stopped": part(run_dir / "stopped", 0, 6, 2, **mixed),
        "resumed": part(run_dir / "stopped", 6, STEPS, 2, **mixed),
        "ddp": part(run_dir / "ddp", 0, 4, 2, training__strategy="ddp"),
    }
    return found


def last_part(run_dir: Path) -> Any:
    return part(run_dir / "moved", 6, STEPS, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one worker, and the same on 2, then 1, then 2."""
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("runs")
    alone = part(run_dir / "alone", 0, STEPS, 1)
    two = run_workers(2, many_ways, run_dir, timeout=240)
    middle = part(run_dir / "moved", 3, 6, 1)
    end = run_workers(2, last_part, run_dir, timeout=240)
    return {"alone": alone, "two": two, "middle": middle, "end": end}


def test_workers_change_from_two_to_one_to_two_and_every_lane_keeps_its_memory(found: dict[str, Any]) -> None:
    losses, validations, state = found["alone"]
    pieces = [found["two"][0]["first"], found["middle"], found["end"][0]]
    got = {step: loss for piece in pieces for step, loss in piece[0].items()}
    assert got == pytest.approx(losses, rel=1e-5) and len(got) == STEPS
    measured = {step: loss for piece in pieces for step, loss in piece[1].items()}
    assert measured == pytest.approx(validations, rel=1e-5) and len(measured) == 3
    for name, whole in state.items():
        joined = torch.cat([torch.from_numpy(end[2][name]) for end in found["end"]])
        torch.testing.assert_close(joined, torch.from_numpy(whole), rtol=1e-3, atol=1e-4)
    assert state["length"].tolist() == [18] * 8 and state["states"].shape == (8, 2, 18, 16)
    assert (state["documents"] == lanes(STEPS - 1, config_of(1)).document_ids.numpy()[:, :1]).any()


def test_ddp_equals_one_worker(found: dict[str, Any]) -> None:
    for rank in found["two"]:
        for step, loss in rank["ddp"][0].items():
            assert loss == pytest.approx(found["alone"][0][step], rel=1e-5)


def test_fsdp_in_bf16_with_recomputation_resumes_exactly(found: dict[str, Any]) -> None:
    for rank in found["two"]:
        whole, stopped, resumed = rank["whole"], rank["stopped"], rank["resumed"]
        assert {**stopped[0], **resumed[0]} == whole[0]
        assert resumed[1][STEPS] == whole[1][STEPS]
        for name, value in whole[2].items():
            assert (resumed[2][name] == value).all()
    assert whole[0][1] != found["alone"][0][1] and whole[0][1] == pytest.approx(found["alone"][0][1], rel=0.02)


def test_memory_that_is_lost_at_a_resume_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _, _ = part(tmp_path / "kept", 0, 3, 1)
    with_memory = part(tmp_path / "kept", 3, 4, 1)[0]
    monkeypatch.setattr("glowflow.training.loop.split_carry", lambda carry, parts, device: [None] * parts)
    without = part(tmp_path / "kept", 3, 4, 1)[0]
    assert kept.keys() == {1, 2, 3} and with_memory.keys() == without.keys() == {4}
    assert abs(with_memory[4] / without[4] - 1) > 1e-4


def test_validation_carries_memory_along_lanes_as_long_as_eval_memory(tmp_path: Path) -> None:
    """Three segments of validation with enough memory are one pass over their text."""
    for memory, equal in ((24, True), (0, False)):
        config = config_of(1, model__eval_memory=memory, model__memory=4)
        loop, recorder = make_loop(config, tmp_path / str(memory), stop_at=3, rows=lanes)
        loop.run()
        batches = [lanes(step, config) for step in range(10_000, 10_003)]
        whole = Batch(*(torch.cat([vars(b)[name] for b in batches], 1) for name in ("tokens", "targets", "loss_weights",
                      "positions", "document_ids")), batches[0].sample_ids, batches[0].reset)  # fmt: skip
        module = loop.strategy.unwrap(loop.module).eval()
        with torch.no_grad():
            output, _ = module(whole)
        want = float(output.loss_sum / output.weight_sum)
        got = recorder.validations[3]["val_loss"]
        assert (got == pytest.approx(want, rel=1e-5)) is equal
