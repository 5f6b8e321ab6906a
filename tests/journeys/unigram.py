"""A custom architecture that costs nearly nothing: one bias per token. For tests of the data path, not of models."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.core.architectures.base import BaseArchitecture, Carry
from glowflow.core.batch import Batch, ModelOutput


class UnigramConfig(ArchitectureConfig):
    """No keys of its own."""


class Unigram(BaseArchitecture):
    """P(token) = softmax(bias): what any language model learns first."""

    config_class: ClassVar[type[ArchitectureConfig]] = UnigramConfig

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.empty(self.vocab_size))

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        nll_bt: Tensor = torch.logsumexp(self.bias, 0) - self.bias[batch.targets]
        weights = batch.loss_weights
        return ModelOutput(nll_bt.unsqueeze(-1), (nll_bt * weights).sum(), weights.sum()), carry
