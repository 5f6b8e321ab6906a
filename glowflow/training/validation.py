"""Validation inside the loop: the loss over a fixed set of batches, summed over ranks.

Every rank runs the same number of batches, zero-weight ones where it has nothing, so ranks never part ways. The sums
are those of all tokens, so the number of ranks changes nothing. A contrastive loss is that of each global batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.core.batch import StepBatches
from glowflow.training.contrastive import validate_pairs
from glowflow.training.precision import autocast
from glowflow.training.strategies import Strategy

__all__ = ["validate", "validation_metrics"]

logger = logging.getLogger(__name__)

_SHARES = {"classification": "val_accuracy", "contrastive": "val_recall_at_1"}


@torch.no_grad()
def validate(
    module: nn.Module,
    stream: Iterable[StepBatches],
    strategy: Strategy,
    precision: str,
    bytes_per_token: float | None,
    task: str = "language_modelling",
) -> dict[str, float]:
    """Run the model in eval mode over a stream; collective.

    Returns:
        See ``validation_metrics``, and ``val_bad_samples`` where some could not be read; {} when no position counts.
        The same numbers on every rank.
    """
    bad = [0]
    module.eval()
    try:
        if task == "contrastive":
            sums, weight = validate_pairs(module, _counting(stream, bad), strategy, precision)
        else:
            sums, weight = _sums(module, _counting(stream, bad), strategy, precision)
    finally:
        module.train()
    totals = strategy.all_reduce(torch.cat([sums, weight.reshape(1), weight.new_full((1,), float(bad[0]))]))
    loss_sum, right_sum, weight_sum, num_bad = totals.tolist()
    if weight_sum == 0:
        logger.warning("the validation batches hold no target token: nothing was measured")
        return {}
    metrics = validation_metrics(loss_sum / weight_sum, bytes_per_token, task)
    if task in _SHARES:
        metrics[_SHARES[task]] = right_sum / weight_sum
    return {**metrics, "val_bad_samples": num_bad} if num_bad else metrics


def _sums(
    module: nn.Module, stream: Iterable[StepBatches], strategy: Strategy, precision: str
) -> tuple[Tensor, Tensor]:
    """This rank's sums of losses and of right answers, (2,), and of weights, (); float64."""
    totals = torch.zeros(3, dtype=torch.float64, device=strategy.device)
    nothing = torch.zeros((), dtype=torch.float64, device=strategy.device)
    carries: dict[int, Any] = {}
    for batches in stream:
        for index, batch in enumerate(batches.micro_batches):
            with autocast(precision, strategy.device):
                output, carries[index] = module(batch.to(strategy.device), carries.get(index))
            right = nothing if output.correct_sum is None else output.correct_sum.double()
            totals += torch.stack([output.loss_sum.double(), right, output.weight_sum.double()])
    return totals[:2], totals[2]


def _counting(stream: Iterable[StepBatches], bad: list[int]) -> Iterator[StepBatches]:
    """The stream, with the bad samples of this rank added up."""
    for batches in stream:
        bad[0] += len(batches.bad_samples)
        yield batches


def validation_metrics(
    loss: float, bytes_per_token: float | None, task: str = "language_modelling"
) -> dict[str, float]:
    """val_loss in nats per target; of language models perplexity, and val_bits_per_byte when the bytes behind a target
    are known."""
    metrics = {"val_loss": loss}
    if task != "language_modelling":
        return metrics
    metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    if bytes_per_token:
        metrics["val_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics
