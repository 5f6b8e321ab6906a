"""A tiny real model with its optimiser on the ranks that there are, for tests of the checkpoint store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch
from glowflow.core.optim import build_optimizer
from glowflow.training.checkpoint import CheckpointStore
from glowflow.training.flat_state import optimizer_tensors
from glowflow.training.markers import checkpoint_path
from glowflow.training.strategies import Strategy, make_strategy
from glowflow.training.strategies.base import gather

CPU = torch.device("cpu")
VOCAB, CONTEXT, BATCH = 17, 6, 6


def small_config(**model: Any) -> GlowFlowConfig:
    section = {"arch": "transformer", "vocab_size": VOCAB, "dim": 12, "depth": 2, "heads": 2, **model}
    return GlowFlowConfig(model=section, training={"batch_size": BATCH, "lr": 1e-2})


class Trainer:
    """A real model and optimiser on the ranks that there are."""

    def __init__(self, name: str = "auto", **model: Any) -> None:
        config = small_config(**model)
        self.strategy: Strategy = make_strategy(name, device=CPU, precision="fp32")
        self.module: nn.Module = self.strategy.prepare(config)
        self.optimizer = build_optimizer(self.strategy.unwrap(self.module), config)

    def train(self, *steps: int) -> None:
        share = BATCH // self.strategy.world_size
        rows = slice(self.strategy.rank * share, (self.strategy.rank + 1) * share)
        for step in steps:
            tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(step))[rows]
            batch = Batch(
                tokens=tokens[:, :-1].contiguous(),
                targets=tokens[:, 1:].contiguous(),
                loss_weights=torch.ones(share, CONTEXT),
                positions=torch.arange(CONTEXT).expand(share, CONTEXT).contiguous(),
                document_ids=torch.zeros(share, CONTEXT, dtype=torch.int64),
                sample_ids=torch.arange(share),
                reset=torch.zeros(share, dtype=torch.bool),
                single_document=True,
            )
            with self.strategy.accumulate(self.module, True):
                output, _ = self.module(batch, None)
                (output.loss_sum / (share * CONTEXT)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Whole weights and optimiser state, on every rank."""
        model = self.strategy.unwrap(self.module).state_dict()
        tensors, _ = optimizer_tensors(self.module, self.optimizer)
        return {name: gather(tensor).clone() for name, tensor in {**model, **tensors}.items()}

    def store(self, run_dir: Path, **options: Any) -> CheckpointStore:
        options = {"keep": 2, **options}
        return CheckpointStore(run_dir, rank=self.strategy.rank, world_size=self.strategy.world_size, **options)

    def save(self, run_dir: Path, step: int, **options: Any) -> Path:
        store = self.store(run_dir, **options)
        store.save(step, self.module, self.optimizer, {"step": step}, {"val_loss": 1.0 / (1 + step)})
        store.wait()
        self.strategy.barrier()
        return checkpoint_path(run_dir, step)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in other.items()}
    assert not [name for name in one if not torch.equal(one[name], other[name])]
