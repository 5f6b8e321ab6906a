"""Contrastive training over the whole global batch: which medium belongs to which text (arXiv:2103.00020).

With pairs (t_i, m_i) of unit vectors, weights w_i and a scale s the loss is, over all ranks and micro-batches,

    L = sum_i w_i (a_i + b_i) / (2 sum_i w_i),   a_i = logsumexp_j(s t_i m_j) - s t_i m_i,   b_i with t and m exchanged

where j goes over the pairs with w_j > 0: what has weight 0 is neither a pair nor a negative. It is no sum over
micro-batches, so its gradients with respect to the embeddings are written out (``contrast``), each rank holding the
rows of its own pairs against all others, and the model is given them back. With one micro-batch this is one pass; with
several it is two (GradCache, arXiv:2101.06983): embeddings without gradients, then the same passes again, with the same
random numbers, each with its part of the gradients.

Legend: N pairs of this rank, M of all ranks, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import Carry
from glowflow.core.batch import ModelOutput, StepBatches
from glowflow.training.passes import Passes
from glowflow.training.precision import autocast
from glowflow.training.strategies import Strategy

__all__ = ["Contrast", "ContrastivePasses", "contrast", "validate_pairs"]


@dataclass(frozen=True)
class Contrast:
    """The loss of one global batch, and what it asks of this rank's embeddings.

    Args:
        loss_sum: () sum of w_i (a_i + b_i) / 2 over this rank's pairs.
        found_sum: () weighted number of this rank's texts whose own medium is the nearest; ties share.
        weight_sum: () sum of the weights over all ranks.
        text_grads: (N, E) d L / d t_i.
        media_grads: (N, E) d L / d m_i.
        scale_grad: () this rank's part of d L / d s: the parts of all ranks add up to it.
    """

    loss_sum: Tensor
    found_sum: Tensor
    weight_sum: Tensor
    text_grads: Tensor
    media_grads: Tensor
    scale_grad: Tensor


@torch.no_grad()
def contrast(texts_ne: Tensor, media_ne: Tensor, weights_n: Tensor, scale: Tensor, strategy: Strategy) -> Contrast:
    """Compare this rank's pairs with those of all ranks; collective, every rank with as many pairs.

    Args:
        texts_ne, media_ne: unit vectors, fp32 (or fp64).
        weights_n: of the pairs.
        scale: () factor on the similarities.
    """
    width = texts_ne.shape[1]
    all_m = _gather(torch.cat([texts_ne, media_ne, weights_n[:, None].to(texts_ne.dtype)], dim=1), strategy)
    texts_me, media_me, weights_m = all_m[:, :width], all_m[:, width:-1], all_m[:, -1]
    own = slice(strategy.rank * len(texts_ne), (strategy.rank + 1) * len(texts_ne))
    to_media, to_texts = texts_ne @ media_me.T, media_ne @ texts_me.T
    forth, back = (_Rows.of(sims_nm, weights_m, scale, own) for sims_nm in (to_media, to_texts))
    logsums_m2 = _gather(torch.stack([forth.logsum_n, back.logsum_n], dim=1), strategy)
    pairs = weights_m.sum().clamp(min=1.0)
    text_slopes_nm = forth.slopes(logsums_m2[:, 1]) / (2 * pairs)
    media_slopes_nm = back.slopes(logsums_m2[:, 0]) / (2 * pairs)
    return Contrast(
        loss_sum=(forth.losses() + back.losses()).sum() / 2,
        found_sum=forth.found().sum(),
        weight_sum=weights_m.sum(),
        text_grads=scale * (text_slopes_nm @ media_me),
        media_grads=scale * (media_slopes_nm @ texts_me),
        # Over all ranks the rows of the texts hold every score, in both directions.
        scale_grad=(text_slopes_nm * to_media).sum(),
    )


@dataclass(frozen=True)
class _Rows:
    """Scores of this rank's vectors of one kind against all vectors of the other kind."""

    scores_nm: Tensor  # s x_i y_j, -inf where either has no weight
    logsum_n: Tensor  # over j, 0 for a row without weight
    weights_m: Tensor
    own: slice

    @classmethod
    def of(cls, sims_nm: Tensor, weights_m: Tensor, scale: Tensor, own: slice) -> _Rows:
        counts_m = weights_m > 0
        scores_nm = (scale * sims_nm).masked_fill(~(counts_m[own, None] & counts_m), -torch.inf)
        return cls(scores_nm, scores_nm.logsumexp(dim=1).masked_fill(~counts_m[own], 0.0), weights_m, own)

    def losses(self) -> Tensor:
        """(N,) weighted negative log-likelihood of the right partner."""
        right_n = self.scores_nm[:, self.own].diagonal()
        weights_n = self.weights_m[self.own]
        return torch.where(weights_n > 0, weights_n * (self.logsum_n - right_n), 0.0)

    def slopes(self, logsum_m: Tensor) -> Tensor:
        """(N, M) 2 W dL / d score of x_i and y_j, as rows in this direction and as columns in the other.

        Args:
            logsum_m: of the other direction's rows, those of y_j.
        """
        weights_n = self.weights_m[self.own]
        slopes_nm = weights_n[:, None] * (self.scores_nm - self.logsum_n[:, None]).exp()
        slopes_nm += self.weights_m * (self.scores_nm - logsum_m).exp()
        slopes_nm[:, self.own].diagonal().sub_(2 * weights_n)
        return slopes_nm

    def found(self) -> Tensor:
        """(N,) weighted share of each row's best scores that are its own partner's: 1, or less where some are equal."""
        best_nm = self.scores_nm == self.scores_nm.amax(dim=1, keepdim=True)
        return self.weights_m[self.own] * best_nm[:, self.own].diagonal() / best_nm.sum(dim=1)


def _gather(rows: Tensor, strategy: Strategy) -> Tensor:
    """The rows of all ranks, in order of rank."""
    if strategy.world_size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(strategy.world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _contrast_of(outputs: Sequence[ModelOutput], strategy: Strategy) -> Contrast:
    """The contrast of all micro-batches of a step.

    Raises:
        ConfigError: the architecture gives no pairs.
    """
    pairs = [(output.pairs, output.pair_weights, output.logit_scale) for output in outputs]
    if any(part is None for given in pairs for part in given):
        rule = "is contrastive, but the architecture gives no pairs, pair_weights and logit_scale"
        raise ConfigError(Problem("model.task", rule, "contrastive"))
    texts, media = ([pair[kind].detach() for pair, _, _ in pairs if pair] for kind in (0, 1))
    weights = [weight for _, weight, _ in pairs if weight is not None]
    scale = pairs[0][2]
    assert scale is not None
    # Outside of autocast: similarities are as exact as the embeddings are.
    with torch.autocast(strategy.device.type, enabled=False):
        return contrast(torch.cat(texts), torch.cat(media), torch.cat(weights), scale.detach(), strategy)


class ContrastivePasses(Passes):
    """Fills the gradients of a step by the contrastive loss over all micro-batches of all ranks."""

    def run(self, batches: StepBatches, carries: list[Carry]) -> Tensor:
        """As ``Passes.run``; the loss is the mean over the pairs that are there."""
        count = len(batches.micro_batches)
        once = count == 1
        outputs: list[ModelOutput] = []
        for index in range(count):
            with self.strategy.accumulate(self.module, once), torch.set_grad_enabled(once):
                outputs.append(self.forward(batches, index, carries)[0])
        found = _contrast_of(outputs, self.strategy)
        pairs = found.weight_sum.clamp(min=1.0)
        sums, balances = [found.loss_sum.double()], []
        sizes = [len(output.pair_weights) for output in outputs if output.pair_weights is not None]
        parts = zip(found.text_grads.split(sizes), found.media_grads.split(sizes), strict=True)
        for index, (text_grads, media_grads) in enumerate(parts):
            with self.strategy.accumulate(self.module, index == count - 1):
                output = outputs[0] if once else self.forward(batches, index, carries)[0]
                loss = _with_gradients(output, text_grads, media_grads, found.scale_grad / count)
                if output.aux_sum is not None:
                    loss = loss + output.aux_sum / pairs
                    balances.append(output.aux_sum.detach().double())
                self.scaler.apply(loss * self.strategy.world_size).backward()
        if balances:
            self.names = ("train_loss", "aux_loss")
            sums.append(torch.stack(balances).sum())
        return self.strategy.all_reduce(torch.stack(sums) / pairs)


def _with_gradients(output: ModelOutput, text_grads: Tensor, media_grads: Tensor, scale_grad: Tensor) -> Tensor:
    """A scalar whose gradients are the given ones."""
    assert output.pairs is not None and output.logit_scale is not None
    texts_ne, media_ne = output.pairs
    return (texts_ne * text_grads).sum() + (media_ne * media_grads).sum() + output.logit_scale * scale_grad


@torch.no_grad()
def validate_pairs(
    module: nn.Module, stream: Iterable[StepBatches], strategy: Strategy, precision: str
) -> tuple[Tensor, Tensor]:
    """Contrast within each global batch of a stream, the module in eval mode; collective.

    Returns:
        This rank's sums of losses and of texts whose own medium was the nearest, (2,), and of weights, (); float64.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=strategy.device)
    weight = torch.zeros((), dtype=torch.float64, device=strategy.device)
    for batches in stream:
        outputs = []
        for batch in batches.micro_batches:
            with autocast(precision, strategy.device):
                outputs.append(module(batch.to(strategy.device), None)[0])
        found = _contrast_of(outputs, strategy)
        sums += torch.stack([found.loss_sum.double(), found.found_sum.double()])
        weight += sum(output.pair_weights.double().sum() for output in outputs if output.pair_weights is not None)
    return sums, weight
