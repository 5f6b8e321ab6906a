"""Initial weights: reproducible, as documented, and the same bits for 1, 2 and 3 gloo ranks under ``fully_shard``."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.initialization import initialize, parameter_seed, qualified_name
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer

# Sizes that neither 2 nor 3 ranks divide evenly.
UNEVEN = {"arch": "transformer", "dim": 20, "depth": 2, "heads": 2, "ffn_dim": 25, "vocab_size": 31}


def config(**model: object) -> GlowFlowConfig:
    return GlowFlowConfig(model={**UNEVEN, **model}, training={"batch_size": 6, "seed": 11, "lr": 1e-3})


def batch(start: int, stop: int) -> Batch:
    text = torch.randint(0, 31, (6, 9), generator=torch.Generator().manual_seed(0))[start:stop]
    rows, zeros = stop - start, torch.zeros(stop - start, 8, dtype=torch.long)
    ones = torch.ones(rows, 8)
    return Batch(
        text[:, :-1], text[:, 1:], ones, zeros, zeros, torch.arange(rows), torch.zeros(rows, dtype=torch.bool), True
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def three_ranks(rank: int, port: int, folder: str) -> None:
    """Three processes, of which the first 1, 2 and 3 train one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    meshes = [DeviceMesh("cpu", list(range(size))) for size in (1, 2, 3)]
    for size, mesh in enumerate(meshes, start=1):
        if rank < size:
            sharded_run(rank, size, mesh, folder)
        dist.barrier()
    dist.destroy_process_group()


def sharded_run(rank: int, world_size: int, mesh: DeviceMesh, folder: str) -> None:
    """Shard on the meta device, initialise, write the whole tensors; take one skipped and two real steps."""
    module = build_module(config(tie_embeddings=world_size != 3), "meta")
    for unit in module.shard_units():
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    initialize(module, 11)
    content = {"initial": full(module)}
    optimizer = build_optimizer(module, config())
    share = 6 // world_size
    for skip in (1.0, 0.0, 0.0):
        output, _ = module(batch(rank * share, (rank + 1) * share))
        (output.loss_sum * world_size / 48).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(skip)
        optimizer.step()
        optimizer.zero_grad()
        content["skipped" if skip else "trained"] = full(module)
    if rank == 0:
        torch.save(content, Path(folder) / f"{world_size}.pt")


def full(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module")
def sharded_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(three_ranks, (free_port(), str(folder)), nprocs=3)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_ranks_start_and_train_as_one_process(world_size: int, sharded_results: Path) -> None:
    content = torch.load(sharded_results / f"{world_size}.pt", weights_only=True)
    single = build_module(config(tie_embeddings=world_size != 3), "cpu")
    initialize(single, 11)
    wanted = dict(single.named_parameters())
    assert content["initial"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(content["initial"][name], value), name
        assert torch.equal(content["skipped"][name], value), name
    optimizer = build_optimizer(single, config())
    for _ in range(2):
        output, _ = single(batch(0, 6))
        (output.loss_sum / 48).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in wanted.items():
        # Adam turns a rounding difference in a near-zero gradient into a visible part of lr = 1e-3.
        torch.testing.assert_close(content["trained"][name], value, rtol=0, atol=2e-5, msg=name)
        assert not torch.equal(content["initial"][name], value), name


def test_draws_are_as_documented(make_module: Callable[..., Transformer]) -> None:
    module = make_module(torch.float32, dim=128, vocab_size=300, init_std=0.05)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = 0.05 / 2 if residual else 0.05  # sqrt(2 * depth) = 2
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_draws_depend_on_seed_and_name_only(make_module: Callable[..., Transformer]) -> None:
    first, again, other = make_module(seed=3), make_module(seed=3), make_module(seed=4)
    deeper = make_module(seed=3, depth=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert "norm" in name or not torch.equal(parameter, other.get_parameter(name))
        if not name.endswith(("out.weight", "down.weight")):  # their scale follows the depth
            assert torch.equal(parameter, deeper.get_parameter(name))
    one, two = (
        first.get_parameter("blocks.0.attention.qkv.weight"),
        first.get_parameter("blocks.1.attention.qkv.weight"),
    )
    assert not torch.equal(one, two)


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"7:head.weight").digest()
    assert parameter_seed(7, "head.weight") == int.from_bytes(digest[:8], "big") >> 1


def test_wrappers_do_not_change_names(make_module: Callable[..., Transformer]) -> None:
    assert qualified_name("blocks.0._checkpoint_wrapped_module._orig_mod.norm.weight") == "blocks.0.norm.weight"
    module, plain = make_module(seed=1), make_module(seed=1)
    module.blocks[0] = torch.compile(module.blocks[0], backend="eager")
    for parameter in module.parameters():
        parameter.data.zero_()
    initialize(module, 1)
    for ours, wanted in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    initialize(build_module(config(), "meta").to_empty(device="cpu"), 0)
    assert torch.equal(state, torch.get_rng_state())
