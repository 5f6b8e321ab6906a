"""Strategies: the same weights, gradients and names whatever the wrapping and the number of ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glowflow.config.errors import CheckpointError, ConfigError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer
from glowflow.training.precision import autocast
from glowflow.training.strategies import DDPStrategy, FSDPStrategy, SingleStrategy, Strategy, make_strategy
from glowflow.training.strategies.fsdp import _groups
from tests.training.distributed import WorkerError, run_workers

CPU = torch.device("cpu")
VOCAB = 31
CONTEXT = 9
GLOBAL_BATCH = 12
STEPS = 3
BLOCK_BYTES = 43_440


def small_config(model: dict[str, Any] | None = None, **training: Any) -> GlowFlowConfig:
    # 30 columns, 31 rows: nothing divides evenly over 2 or 3 ranks but the width.
    section = {"arch": "transformer", "vocab_size": VOCAB, "dim": 30, "depth": 3, "heads": 3, **(model or {})}
    return GlowFlowConfig(model=section, training={"batch_size": GLOBAL_BATCH, "seed": 5, **training})


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (GLOBAL_BATCH, CONTEXT + 1), generator=generator)
    shape = GLOBAL_BATCH, CONTEXT
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        loss_weights=(torch.rand(shape, generator=generator) < 0.8).float(),
        positions=torch.arange(CONTEXT).expand(shape).contiguous(),
        document_ids=torch.zeros(shape, dtype=torch.int64),
        sample_ids=torch.arange(GLOBAL_BATCH),
        reset=torch.zeros(GLOBAL_BATCH, dtype=torch.bool),
        single_document=True,
    )


def rows(batch: Batch, start: int, stop: int) -> Batch:
    cut = {name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return Batch(**cut, single_document=batch.single_document)


def backward(strategy: Strategy, module: Any, step: int, micro_batches: int = 1, sync: bool = True) -> Tensor:
    """Gradients of the mean loss over the global batch; returns the loss of this rank's share."""
    whole = global_batch(step)
    weight = whole.loss_weights.sum()
    share = GLOBAL_BATCH // strategy.world_size
    size = share // micro_batches
    total = torch.zeros(())
    for index in range(micro_batches):
        start = strategy.rank * share + index * size
        with strategy.accumulate(module, sync and index == micro_batches - 1):
            output, _ = module(rows(whole, start, start + size), None)
            (output.loss_sum * strategy.world_size / weight).backward()
        total += output.loss_sum.detach() / weight
    return total


def train(strategy: Strategy, config: GlowFlowConfig, micro_batches: int = 1) -> dict[str, Any]:
    """A few real steps: everything that has to agree between strategies."""
    module = strategy.prepare(config)
    optimizer = build_optimizer(strategy.unwrap(module), config)
    initial = strategy.full_state_dict(module)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(strategy.all_reduce(backward(strategy, module, step, micro_batches)).item())
        norms.append(strategy.clip_grad_norm(module, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # a pass without backward leaves FSDP's weights gathered: nothing below may mind
        module(rows(global_batch(99), 0, 2), None)
    return {"initial": initial, "final": strategy.full_state_dict(module), "losses": losses, "norms": norms}


def assert_equal_weights(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# -- what each worker does; everything that needs ranks happens in one start of the workers ---------------------------


def worker_trains(names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The named variants, or all, on the ranks that there are."""
    config = small_config()
    variants: dict[str, tuple[Strategy, GlowFlowConfig, int]] = {
        "ddp": (DDPStrategy(device=CPU, precision="fp32"), config, 1),
        "ddp, 2 micro-batches": (DDPStrategy(device=CPU, precision="fp32"), config, 2),
        "fsdp": (make_strategy("fsdp", device=CPU, precision="fp32"), config, 1),
        "fsdp, 2 micro-batches": (FSDPStrategy(device=CPU, precision="fp32", group_bytes=BLOCK_BYTES + 1), config, 2),
        "fsdp, a group per block": (FSDPStrategy(device=CPU, precision="fp32", group_bytes=0), config, 1),
        "fsdp, resharded": (FSDPStrategy(device=CPU, precision="fp32", group_bytes=0, keep_bytes=0), config, 2),
        "fsdp, recomputed": (
            FSDPStrategy(device=CPU, precision="fp32", group_bytes=0, keep_bytes=0),
            small_config(activation_checkpointing=True),
            1,
        ),
    }
    return {name: train(*variant) for name, variant in variants.items() if not names or name in names}


def worker_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {"trained": worker_trains()}
    found["auto"] = make_strategy("auto", device=CPU, precision="fp32").name
    try:
        make_strategy("single", device=CPU, precision="fp32")
    except ConfigError as error:
        found["single"] = str(error)

    fsdp = FSDPStrategy(device=CPU, precision="fp32")
    rank = fsdp.rank
    found["sum"] = fsdp.all_reduce(torch.tensor([1.0, rank])).tolist()
    found["max"] = fsdp.all_reduce(torch.tensor([1.0, rank]), "max").tolist()

    ddp = DDPStrategy(device=CPU, precision="fp32")
    for sync in (False, True):
        module = ddp.prepare(small_config())
        backward(ddp, module, 0, sync=sync)
        found[f"gradient, sync {sync}"] = ddp.unwrap(module).embedding.weight.grad.clone()

    weights = {name: torch.full_like(t, 0.5) + torch.arange(t.numel()).view_as(t) for name, t in _plain().items()}
    module = fsdp.prepare(small_config(), state_dict=weights)
    found["sharded"] = all(isinstance(p, DTensor) for p in module.parameters())
    found["loaded"], found["given"] = fsdp.full_state_dict(module), weights
    found["names"] = {}
    for strategy in (ddp, fsdp):
        changed = small_config(activation_checkpointing=True)
        found["names"][strategy.name] = sorted(strategy.full_state_dict(strategy.prepare(changed)))
    found["bf16"] = _low_precision(FSDPStrategy(device=CPU, precision="bf16"))
    return found


def _plain() -> dict[str, Tensor]:
    module = build_module(small_config(), device="cpu")
    return dict(module.state_dict())


def _low_precision(strategy: FSDPStrategy) -> dict[str, Any]:
    module = strategy.prepare(small_config())
    batch = global_batch(0)
    batch.loss_weights = torch.full_like(batch.loss_weights, 1.001)  # bf16 would make it 1.0
    with strategy.accumulate(module, True), autocast("bf16", CPU):
        output, _ = module(batch, None)
        assert output.loss_sum is not None and output.weight_sum is not None
        output.loss_sum.backward()
    return {
        "weight_sum": output.weight_sum.item(),
        "loss": (output.loss_sum / output.weight_sum).item(),
        "dtypes": {p.dtype for p in module.parameters()} | {p.grad.dtype for p in module.parameters()},
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_workers(2, worker_two_ranks)


@pytest.fixture(scope="module")
def three_ranks() -> list[dict[str, Any]]:
    return run_workers(3, worker_trains, ("ddp", "fsdp", "fsdp, resharded"))


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return train(make_strategy("auto", device=CPU, precision="fp32"), small_config())


# -- the same training everywhere -------------------------------------------------------------------------------------


def test_initial_weights_are_equal_bit_for_bit_on_1_2_and_3_ranks(
    one_process: dict[str, Any], two_ranks: list[dict[str, Any]], three_ranks: list[dict[str, Any]]
) -> None:
    for trained in (two_ranks[0]["trained"], three_ranks[0]):
        for run in trained.values():
            assert_equal_weights(run["initial"], one_process["initial"])
    assert one_process["initial"]["blocks.0.attention_norm.weight"].eq(1).all()


def test_training_equals_one_process_within_rounding(
    one_process: dict[str, Any], two_ranks: list[dict[str, Any]], three_ranks: list[dict[str, Any]]
) -> None:
    assert len(two_ranks[0]["trained"]) == 7 and len(three_ranks[0]) == 3
    for trained in (two_ranks[0]["trained"], three_ranks[0]):
        for name, run in trained.items():
            assert run["losses"] == pytest.approx(one_process["losses"], rel=1e-5), name
            assert run["norms"] == pytest.approx(one_process["norms"], rel=1e-4), name
            assert_equal_weights(run["final"], one_process["final"], atol=1e-5)
    moved = one_process["final"]["embedding.weight"] - one_process["initial"]["embedding.weight"]
    assert moved.abs().max() > 1e-4, "nothing was trained, so nothing was compared"


def test_what_costs_memory_or_messages_does_not_change_a_bit(two_ranks: list[dict[str, Any]]) -> None:
    trained = two_ranks[0]["trained"]
    assert_equal_weights(trained["fsdp, a group per block"]["final"], trained["fsdp"]["final"])
    assert_equal_weights(trained["fsdp, recomputed"]["final"], trained["fsdp"]["final"])
    assert_equal_weights(trained["fsdp, resharded"]["final"], trained["fsdp, 2 micro-batches"]["final"])


def test_losses_and_norms_are_equal_on_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for name, run in two_ranks[0]["trained"].items():
        other = two_ranks[1]["trained"][name]
        assert (run["losses"], run["norms"]) == (other["losses"], other["norms"])
        assert run["final"] and not other["final"], "full weights belong on rank 0 alone"


def test_without_the_last_synchronisation_gradients_stay_apart(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    assert torch.equal(first["gradient, sync True"], second["gradient, sync True"])
    assert not torch.allclose(first["gradient, sync False"], second["gradient, sync False"])
    mean = (first["gradient, sync False"] + second["gradient, sync False"]) / 2
    torch.testing.assert_close(first["gradient, sync True"], mean)


def test_activation_checkpointing_recomputes_and_changes_nothing() -> None:
    gradients, calls = [], []
    for activation_checkpointing in (False, True):
        strategy = SingleStrategy(device=CPU, precision="fp32")
        config = small_config({"dropout": 0.2}, activation_checkpointing=activation_checkpointing)
        module = strategy.prepare(config)
        counted: list[int] = []
        module.blocks[1].attention_norm.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(3)
        backward(strategy, module, 0)
        gradients.append({name: p.grad for name, p in module.named_parameters()})
        calls.append(len(counted))
    assert_equal_weights(gradients[0], gradients[1])
    assert calls == [1, 2]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_under_the_same_names() -> None:
    losses, names = [], []
    for compile_blocks in (False, True):
        strategy = SingleStrategy(device=CPU, precision="fp32")
        module = strategy.prepare(small_config({"depth": 1}, compile=compile_blocks))
        losses.append(backward(strategy, module, 0))
        losses.append(strategy.clip_grad_norm(module, None))
        names.append(sorted(strategy.full_state_dict(module)))
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=1e-5)
    assert names[0] == names[1]


def test_blocks_are_joined_until_a_group_is_worth_a_message() -> None:
    blocks = build_module(small_config()).shard_units()
    assert {sum(p.numel() * 4 for p in block.parameters()) for block in blocks} == {BLOCK_BYTES}
    sizes = {smallest: [len(group) for group in _groups(blocks, smallest)] for smallest in (0, BLOCK_BYTES)}
    assert sizes == {0: [1, 1, 1], BLOCK_BYTES: [1, 1, 1]}
    assert _groups(blocks, BLOCK_BYTES + 1) == [blocks[:2], blocks[2:]]
    assert _groups(blocks, 3 * BLOCK_BYTES) == [blocks]
    assert _groups(blocks, 3 * BLOCK_BYTES + 1) == []


def test_older_torch_finds_the_tensors_of_an_output_too() -> None:
    output = ModelOutput(torch.zeros(1, 1, 1), torch.tensor(1.0), torch.tensor(2.0))
    leaves = tree_leaves((output, None))
    assert all(any(leaf is tensor for leaf in leaves) for tensor in vars(output).values())


# -- names, weights, precision ----------------------------------------------------------------------------------------


def test_names_are_the_architectures_own_under_every_wrapping(two_ranks: list[dict[str, Any]]) -> None:
    plain = sorted(_plain())
    assert two_ranks[0]["names"] == {"ddp": plain, "fsdp": plain}


def test_given_weights_are_sharded_and_gathered_unchanged(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["sharded"]
    assert_equal_weights(two_ranks[0]["loaded"], two_ranks[0]["given"])


def test_given_weights_that_do_not_fit_are_named() -> None:
    weights = _plain()
    weights["embedding.weight"] = torch.zeros(VOCAB, 7)
    weights["blocks.9.extra"] = weights.pop("norm.weight")
    with pytest.raises(CheckpointError) as caught:
        SingleStrategy(device=CPU, precision="fp32").prepare(small_config(), state_dict=weights)
    assert len(caught.value.problems) == 3
    for part in ("embedding.weight", "(31, 30)", "(31, 7)", "blocks.9.extra", "norm.weight"):
        assert part in str(caught.value)


def test_full_weights_are_a_copy() -> None:
    strategy = SingleStrategy(device=CPU, precision="fp32")
    module = strategy.prepare(small_config())
    full = strategy.full_state_dict(module)
    before = full["norm.weight"].clone()
    with torch.no_grad():
        module.norm.weight.add_(1)
    assert torch.equal(full["norm.weight"], before)


def test_bf16_keeps_fp32_weights_gradients_and_loss_weights(
    two_ranks: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    result = two_ranks[0]["bf16"]
    assert result["dtypes"] == {torch.float32}
    assert result["weight_sum"] == pytest.approx(1.001 * GLOBAL_BATCH * CONTEXT, rel=1e-6)
    assert result["loss"] == pytest.approx(one_process["losses"][0], rel=0.02)


# -- gradient norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_is_torchs_own_bit_for_bit(max_norm: float) -> None:
    strategy = SingleStrategy(device=CPU, precision="fp32")
    ours, theirs = (strategy.prepare(small_config()) for _ in range(2))
    for module in (ours, theirs):
        backward(strategy, module, 0)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert torch.equal(strategy.clip_grad_norm(ours, max_norm), expected)
    assert_equal_weights(
        {n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()}
    )


def test_measuring_only_leaves_gradients_alone() -> None:
    strategy = SingleStrategy(device=CPU, precision="fp32")
    module = strategy.prepare(small_config())
    assert strategy.clip_grad_norm(module, None).item() == 0.0
    backward(strategy, module, 0)
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    square = sum(g.double().square().sum() for g in before.values())
    assert strategy.clip_grad_norm(module, None).item() == pytest.approx(float(square) ** 0.5, rel=1e-5)
    assert_equal_weights(before, {name: p.grad for name, p in module.named_parameters()})


class NoHostSync(TorchDispatchMode):
    """Fails where a value goes from the device to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_nothing() -> None:
    strategy = SingleStrategy(device=CPU, precision="fp32")
    module = strategy.prepare(small_config())
    with NoHostSync():
        backward(strategy, module, 0)
        norm = strategy.clip_grad_norm(module, 0.1)
        with pytest.raises(AssertionError, match="the host waits"):
            norm.item()


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    strategy = SingleStrategy(device=CPU, precision="fp32")
    module = strategy.prepare(small_config())
    backward(strategy, module, 0)
    module.norm.weight.grad[0] = float("inf")
    assert not strategy.clip_grad_norm(module, 1.0).isfinite()


# -- choice -----------------------------------------------------------------------------------------------------------


def test_auto_and_single_follow_the_number_of_workers(two_ranks: list[dict[str, Any]]) -> None:
    assert make_strategy("auto", device=CPU, precision="fp32").name == "single"
    assert two_ranks[0]["auto"] == "fsdp"
    assert "training.strategy" in two_ranks[0]["single"] and "2 workers" in two_ranks[0]["single"]
    with pytest.raises(ConfigError, match="auto, single, ddp, fsdp"):
        make_strategy("zero", device=CPU, precision="fp32")


def test_reductions(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert found["sum"] == [2.0, 1.0]
        assert found["max"] == [1.0, 1.0]
    alone = torch.tensor([3.0])
    assert SingleStrategy(device=CPU, precision="fp32").all_reduce(alone) is alone and alone.item() == 3.0


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_one_worker_without_a_process_group(name: str, no_group_left: None, one_process: dict[str, Any]) -> None:
    strategy = make_strategy(name, device=CPU, precision="fp32")
    strategy.barrier()
    run = train(strategy, small_config())
    assert run["losses"] == pytest.approx(one_process["losses"], rel=1e-6)
    assert_equal_weights(run["final"], one_process["final"], atol=1e-6)


# -- the helper itself ------------------------------------------------------------------------------------------------


def worker_fails() -> None:
    dist.barrier()  # a group whose other end is gone before it is up would be another failure
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has enough")
    time.sleep(0.5)  # until the other has left the barrier too
    os._exit(7)


def test_helper_reports_tracebacks_and_deaths() -> None:
    with pytest.raises(WorkerError, match=r"exit code 7(?s:.)*ValueError: rank 1 has enough"):
        run_workers(2, worker_fails)
