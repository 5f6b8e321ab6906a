"""A few steps of a small model with media on the ranks that there are, for tests that ranks never part ways.

The rows of every global batch are such that two ranks have disjoint modalities, or none at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, StepBatches
from glowflow.core.optim import build_optimizer
from glowflow.training.contrastive import ContrastivePasses
from glowflow.training.passes import Passes, task_of
from glowflow.training.precision import LossScaler
from glowflow.training.strategies import Strategy, make_strategy
from glowflow.training.strategies.fsdp import FSDPStrategy
from tests.core.media_batches import Row, media_batch, media_config, picture, sound

CPU = torch.device("cpu")

# The first two rows of a step are those of the first of two ranks.
STEPS: list[list[Row]] = [
    # Pictures alone, recordings alone.
    [[1, picture(0), 2, 3], [1, 4, picture(1, height=12), 5], [1, sound(0), 6, 7, 8], [1, sound(1, frames=4), 9]],
    # Text alone; of two micro-batches of the other rank one has blanks only.
    [[1, 10, 11, 12], [1, 13, 14], [1, 15, picture(2), 16, sound(2)], [1, 17, 18, 19, 20, 21]],
    # The other way round, and media that were left out.
    [
        [1, sound(3), 22],
        [1, sound(4, present=False), 23],
        [1, picture(3, present=False), 24],
        [1, picture(4), 25, picture(5), 26],
    ],
    # Nothing but text anywhere.
    [[1, 27, 28], [1, 29, 30, 31, 32], [1, 33], [1, 34, 2, 3]],
]
PAIRS: list[list[Row]] = [
    [[1, picture(4 * step + row), *range(2, 5 + row)] if row != step else [1, 2, 3] for row in range(4)]
    for step in range(3)
]
"""For contrastive training: one row of each step has no picture, and so is no pair."""


def run_config(training: dict[str, Any] | None = None, **model: Any) -> GlowFlowConfig:
    """A small model, 4 rows a step. Adam would blow up the rounding of gradients that are zero but for rounding: so a
    large eps."""
    values = media_config(**model).model_dump(mode="json", exclude_unset=True)
    optimizer = {"name": "adamw", "eps": 1e-2}
    training = {"batch_size": 4, "lr": 0.02, "optimizer": optimizer, "seed": 3, **(training or {})}
    return GlowFlowConfig(**{**values, "training": training})


def _batch(config: GlowFlowConfig, rows: list[Row]) -> Batch:
    """A micro-batch whose targets and weights are functions of each row alone."""
    model: Any = config.model
    batch = media_batch(model, rows)
    weights = (batch.loss_weights > 0) * (0.5 + batch.targets % 5 / 4)
    if model.task == "classification":
        weights, classes = batch.loss_weights, batch.tokens.sum(1) % model.num_classes
        batch.targets = torch.where(weights > 0, classes[:, None], batch.targets)
    elif model.task == "contrastive":
        with_picture = torch.tensor([any(not isinstance(part, int) for part in row) for row in rows])
        weights = batch.loss_weights * with_picture[:, None]
    return replace(batch, loss_weights=weights)


def step_batches(config: GlowFlowConfig, step: int, rows: list[Row], strategy: Strategy, micro: int) -> StepBatches:
    """This rank's micro-batches of a step."""
    share = len(rows) // strategy.world_size
    first = strategy.rank * share
    parts = [_batch(config, rows[start : start + micro]) for start in range(first, first + share, micro)]
    return StepBatches(step, parts, float(_batch(config, rows).loss_weights.sum()))


def make(name: str, precision: str = "fp32") -> Strategy:
    """A strategy; ``sharded`` is FSDP with a group per unit, whose weights are gathered anew for each pass."""
    if name == "sharded":
        return FSDPStrategy(device=CPU, precision=precision, group_bytes=0, keep_bytes=0)
    return make_strategy(name, device=CPU, precision=precision)


def passes_of(config: GlowFlowConfig, strategy: Strategy) -> Passes:
    """Forward and backward of a fresh model, for its task."""
    kind = ContrastivePasses if task_of(config) == "contrastive" else Passes
    return kind(config, strategy, strategy.prepare(config).train(), LossScaler(CPU, False))


def rows_of(config: GlowFlowConfig) -> list[list[Row]]:
    """The global batches of its task."""
    return PAIRS if task_of(config) == "contrastive" else STEPS


def trained(config: GlowFlowConfig, name: str, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What each step measured, (steps, metrics and gradient norm), and the weights at the end, whole, on rank 0."""
    strategy = make(name, config.training.precision)
    passes = passes_of(config, strategy)
    module, found = passes.module, []
    optimizer = build_optimizer(strategy.unwrap(module), config)
    for step, each in enumerate(rows_of(config)):
        batches = step_batches(config, step, each, strategy, micro)
        measured = passes.run(batches, [None] * len(batches.micro_batches))
        norm = strategy.clip_grad_norm(module, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(torch.cat([measured, norm.double().reshape(1)]))
    return torch.stack(found), strategy.full_state_dict(module)
