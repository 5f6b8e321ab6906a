"""Forward and backward over the micro-batches of one step: which loss a task has, and how it adds up.

The loss of a step is the sum over all tokens of the global batch over the number of its targets, which the plan knows
beforehand: each micro-batch contributes ``loss_sum * world_size / global_weight`` and gradients are averaged over
ranks, so accumulation and unequal padding change nothing. A contrastive loss is no such sum: ``contrastive.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import Carry
from glowflow.core.batch import ModelOutput, StepBatches
from glowflow.training.precision import LossScaler, autocast
from glowflow.training.seeds import seed_forward
from glowflow.training.strategies import Strategy

__all__ = ["Passes", "task_of"]

_TASKS = ("classification", "contrastive")
_SUMS = {"loss_sum": "train_loss", "aux_sum": "aux_loss", "correct_sum": "train_accuracy"}


def task_of(config: GlowFlowConfig) -> str:
    """What the model is trained for: ``model.task`` of architectures that have several, else language modelling."""
    task = getattr(config.model, "task", None)
    return task if task in _TASKS else "language_modelling"


@dataclass
class Passes:
    """Fills the gradients of a step.

    Args:
        config: the whole experiment.
        strategy: how the model is spread over ranks.
        module: what its ``prepare`` returned.
        scaler: of the loss.
    """

    config: GlowFlowConfig
    strategy: Strategy
    module: nn.Module
    scaler: LossScaler
    names: tuple[str, ...] = ("train_loss",)
    """Metrics that ``run`` gives, in their order; known after its first call."""

    def run(self, batches: StepBatches, carries: list[Carry]) -> Tensor:
        """Accumulate gradients over the micro-batches; collective, and nothing waits for the device.

        Args:
            batches: this rank's micro-batches, on the host.
            carries: of each micro-batch; replaced by the new ones.

        Returns:
            The step's global loss and what ``names`` lists beside it, (len(names),) float64.
        """
        weight = max(float(batches.global_weight), 1.0)
        total = torch.zeros(1, dtype=torch.float64, device=self.strategy.device)
        for index in range(len(batches.micro_batches)):
            with self.strategy.accumulate(self.module, index == len(batches.micro_batches) - 1):
                output, carries[index] = self.forward(batches, index, carries)
                self.scaler.apply(output.objective * (self.strategy.world_size / weight)).backward()
            total = total + self.sums(output)
        return self.strategy.all_reduce(total / weight)

    def forward(self, batches: StepBatches, index: int, carries: Sequence[Carry]) -> tuple[ModelOutput, Carry]:
        """One forward pass, which draws the same random numbers whenever it is repeated."""
        seed_forward(self.config.training.seed, batches.step, index, self.strategy.rank)
        with autocast(self.config.training.precision, self.strategy.device):
            output, carry = self.module(batches.micro_batches[index].to(self.strategy.device), carries[index])
        return output, carry

    def sums(self, output: ModelOutput) -> Tensor:
        """The sums of one micro-batch that are reported, in the order of ``names``."""
        given = {name: part for name in _SUMS if (part := getattr(output, name)) is not None}
        self.names = tuple(_SUMS[name] for name in given)
        return torch.stack([part.detach().double() for part in given.values()])
