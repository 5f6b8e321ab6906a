"""A custom model from outside the package under FSDP2: the same weights on one and on two ranks, with its own roles."""

from __future__ import annotations

import torch
from torch import Tensor

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch
from glowflow.core.optim import build_optimizer
from glowflow.training.strategies import Strategy
from glowflow.training.strategies.fsdp import FSDPStrategy
from glowflow.training.strategies.single import SingleStrategy
from tests.core.custom_models import VOCABULARY, Scaled, arch
from tests.training.distributed import run_workers

ROWS, LENGTH = 4, 5


def lanes(step: int, rows: slice) -> Batch:
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))[rows]
    count = len(text)
    return Batch(
        tokens=text[:, :-1].contiguous(),
        targets=text[:, 1:].contiguous(),
        loss_weights=torch.ones(count, LENGTH),
        positions=torch.arange(LENGTH).repeat(count, 1),
        document_ids=torch.zeros(count, LENGTH, dtype=torch.int64),
        sample_ids=torch.arange(count),
        reset=torch.zeros(count, dtype=torch.bool),
    )


def trained(sharded: bool) -> dict[str, Tensor]:
    """Weights after three steps of one lane each, the carry handed on; whole, on rank 0."""
    training = {"batch_size": ROWS, "lr": 0.05, "activation_checkpointing": True, "seed": 5}
    config = GlowFlowConfig(model={"arch": arch(Scaled), "vocab_size": VOCABULARY}, training=training)
    device = torch.device("cpu")
    strategy: Strategy = (
        FSDPStrategy(device=device, precision="fp32", group_bytes=0, keep_bytes=0)
        if sharded
        else SingleStrategy(device=device, precision="fp32")
    )
    module = strategy.prepare(config)
    optimizer = build_optimizer(strategy.unwrap(module), config)
    assert [group.get("lr_scale") for group in optimizer.param_groups] == [None, 0.5, 4.0]
    share, carry = ROWS // strategy.world_size, None
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * group.get("lr_scale", 1.0)
        batch = lanes(step, slice(strategy.rank * share, (strategy.rank + 1) * share))
        with strategy.accumulate(module, True):
            output, carry = module(batch, carry)
            (output.loss_sum * strategy.world_size / (ROWS * LENGTH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return strategy.full_state_dict(module)


def test_two_ranks_train_a_custom_model_as_one() -> None:
    single = trained(sharded=False)
    sharded, other = run_workers(2, trained, True)
    assert other == {} and sharded.keys() == single.keys()
    for name, weight in single.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-5, atol=1e-6, msg=name)
