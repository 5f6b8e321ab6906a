"""Validation inside the loop: the loss over a fixed set of batches, summed over ranks.

Every rank runs the same number of batches, zero-weight ones where it has nothing, so ranks never part ways. The sums
are those of all tokens, so the number of ranks changes nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from glowflow.core.batch import StepBatches
from glowflow.training.precision import autocast
from glowflow.training.strategies import Strategy

__all__ = ["validate", "validation_metrics"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def validate(
    module: nn.Module, stream: Iterable[StepBatches], strategy: Strategy, precision: str, bytes_per_token: float | None
) -> dict[str, float]:
    """Run the model in eval mode over a stream; collective.

    Returns:
        See ``validation_metrics``; {} when no position counts. The same numbers on every rank.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    carries: dict[int, Any] = {}
    module.eval()
    try:
        for batches in stream:
            for index, batch in enumerate(batches.micro_batches):
                with autocast(precision, strategy.device):
                    output, carries[index] = module(batch.to(strategy.device), carries.get(index))
                totals += torch.stack([output.loss_sum.double(), output.weight_sum.double()])
    finally:
        module.train()
    loss_sum, weight = strategy.all_reduce(totals).tolist()
    if weight == 0:
        logger.warning("the validation batches hold no target token: nothing was measured")
        return {}
    return validation_metrics(loss_sum / weight, bytes_per_token)


def validation_metrics(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """val_loss in nats per target, perplexity, and val_bits_per_byte when the bytes behind a target are known."""
    metrics = {"val_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if bytes_per_token:
        metrics["val_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics
