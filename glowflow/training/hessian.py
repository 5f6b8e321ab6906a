"""The loop's side of an optimiser's extra pass: gradients and Hessian-vector products over the head of a global batch.

The sequences are the first ``extra_rows`` of the step's global batch; the others count with weight 0, and micro-batches
that hold none of them on any rank are left out, which all ranks know from the numbers of rows alone. So ranks never
part ways, and any number of workers sees the same sequences. The carry is read as it was before the step. Labels and
probes are drawn from (seed, step, sequence or parameter), dropout from a seed of its own: the step that follows draws
what it would have drawn anyway, and a resumed run repeats everything.

Legend: B sequences of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import Carry
from glowflow.core.batch import Batch, StepBatches
from glowflow.core.differentiation import twice_differentiable
from glowflow.core.initialization import qualified_name
from glowflow.core.optim.extra import HessianProduct, TakesExtraPass
from glowflow.core.sharding import local_part, part_of
from glowflow.training.passes import task_of
from glowflow.training.precision import LossScaler, autocast
from glowflow.training.seeds import derive_seed, seed_forward
from glowflow.training.strategies import Strategy

__all__ = ["ExtraPasses", "HessianBatch", "label_draws", "make_extra_passes"]

_TAG = "hessian"


def make_extra_passes(
    config: GlowFlowConfig, strategy: Strategy, module: nn.Module, optimizer: Optimizer, scaler: LossScaler
) -> ExtraPasses | None:
    """The extra passes that the optimiser asks for; None: it asks for none.

    Raises:
        ConfigError: they cannot be had in this run.
    """
    if not isinstance(optimizer, TakesExtraPass):
        return None
    if task_of(config) == "contrastive":
        rule = "takes extra passes over some sequences, and a contrastive loss is no sum over sequences"
        hint = "take another optimiser, for example adamw"
        raise ConfigError(Problem("training.optimizer", rule, config.training.optimizer.name, hint))
    rows, batch_size = optimizer.extra_rows, config.training.batch_size
    if rows is not None and rows > batch_size:
        rule = f"must be at most training.batch_size, which is {batch_size}"
        raise ConfigError(Problem("training.optimizer.hessian_batch_size", rule, rows))
    passes = ExtraPasses(config, strategy, module, optimizer, scaler)
    optimizer.extra_start(passes.reasons)
    return passes


@dataclass
class ExtraPasses:
    """When extra passes are due, and on what."""

    config: GlowFlowConfig
    strategy: Strategy
    module: nn.Module
    optimizer: TakesExtraPass
    scaler: LossScaler

    def run(self, batches: StepBatches, carries: Sequence[Carry]) -> None:
        """Take the extra pass of this step, where one is due; leaves no gradients and reads nothing from the device.

        Args:
            batches: the step's micro-batches, on the host.
            carries: of each micro-batch, before the step.
        """
        if batches.step % self.optimizer.extra_every:
            return
        self.optimizer.extra_pass(batches.step, HessianBatch(self, batches, carries))
        self.clear()

    def shares(self) -> dict[str, float]:
        """What the optimiser says about its updates, over all ranks; reads the device."""
        found = {}
        for name, share in self.optimizer.extra_shares().items():
            part, whole = self.strategy.all_reduce(share).tolist()
            found[name] = part / max(whole, 1.0)
        return found

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def reasons(self, way: HessianProduct) -> list[str]:
        """Why Hessian-vector products cannot be made in this way; empty when they can."""
        training = self.config.training
        sharded = any(isinstance(parameter, DTensor) for parameter in self.module.parameters())
        if way == "finite_diff":
            rule = f"weights that are sharded are gathered in {training.precision}, too coarse for differences"
            return [rule] if sharded and training.precision != "fp32" else []
        unfit = {
            f"sharded parameters (training.strategy {self.strategy.name})": sharded,
            "recomputed blocks (training.activation_checkpointing)": training.activation_checkpointing,
            "compiled blocks (training.compile)": training.compile,
        }
        reasons = self.strategy.unwrap(self.module).second_order_reasons()
        return reasons + [f"gradients of {what} cannot be differentiated" for what, is_so in unfit.items() if is_so]


class _Part(NamedTuple):
    """One micro-batch of the Hessian's batch."""

    micro_batch: int  # among the micro-batches of the step
    first: int  # number of its first sequence in the run
    batch: Batch
    carry: Carry


class HessianBatch:
    """A ``GradientSource`` over the first rows of one step's global batch.

    Args:
        passes: how the model is trained.
        batches: this rank's micro-batches of the step.
        carries: their carries, which stay as they are.
    """

    def __init__(self, passes: ExtraPasses, batches: StepBatches, carries: Sequence[Carry]) -> None:
        self._strategy, self._module, self._clear = passes.strategy, passes.module, passes.clear
        self._scaler, self._training = passes.scaler, passes.config.training
        self._step = batches.step
        self._parts = self._head(batches, carries, passes.optimizer.extra_rows)
        weight = torch.stack([part.batch.loss_weights.double().sum() for part in self._parts]).sum()
        self.num_targets = self._strategy.all_reduce(weight.to(self._strategy.device, non_blocking=True)).clamp(min=1.0)

    def _head(self, batches: StepBatches, carries: Sequence[Carry], rows: int | None) -> list[_Part]:
        """The micro-batches that hold one of the rows on some rank, with weight 0 for all that are not of them."""
        strategy, size = self._strategy, len(batches.micro_batches[0].tokens)
        start = strategy.rank * len(batches.micro_batches) * size
        rows = self._training.batch_size if rows is None else rows
        parts = []
        for index, (batch, carry) in enumerate(zip(batches.micro_batches, carries, strict=True)):
            first = start + index * size
            if index * size >= rows:  # the rank with the first rows has none left, so nobody has
                break
            if first + size > rows:
                others_b = torch.arange(first, first + size) >= rows
                batch = replace(batch, loss_weights=batch.loss_weights.masked_fill(others_b[:, None], 0.0))
            parts.append(_Part(index, self._step * self._training.batch_size + first, batch, carry))
        return parts

    # -- what an optimiser asks for ------------------------------------------------------------------------------------

    def fill_sampled_gradient(self) -> None:
        self._fill(sampled=True, precision=self._training.precision)
        self._scaler.unscale([local_part(p.grad) for p in self._module.parameters() if p.grad is not None])

    def fill_gradient(self) -> None:
        self._fill(sampled=False, precision="fp32")

    def fill_hessian_product(self, probes: Mapping[Tensor, Tensor]) -> None:
        # Past any wrapper: ranks are added up here.
        architecture, parameters = self._strategy.unwrap(self._module), list(probes)
        self._clear()
        for part in self._parts:
            self._seed(part)
            with torch.enable_grad(), twice_differentiable():
                output, _ = architecture(part.batch.to(self._strategy.device), part.carry)
                gradients = torch.autograd.grad(
                    self._mean(output.loss_sum), parameters, create_graph=True, materialize_grads=True
                )
                slope = torch.stack([(g * probes[p]).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
                # Not torch.autograd.grad, which would pass over functions that have no second derivative in silence.
                slope.backward()
        for parameter in parameters:
            if parameter.grad is not None:
                self._strategy.all_reduce(parameter.grad)

    def probe(self, parameter: Tensor) -> Tensor:
        seed = derive_seed(_TAG, self._training.seed, self._step, self._names[parameter])
        # On the device itself: whole, and yet nothing waits for it.
        generator = torch.Generator(self._strategy.device).manual_seed(seed)
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._strategy.device)
        return part_of(full.normal_(generator=generator), parameter)

    def norm(self, parts: list[Tensor]) -> Tensor:
        return self._strategy.global_norm(parts)

    # -- passes --------------------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> dict[Tensor, str]:
        return {p: qualified_name(name) for name, p in self._strategy.unwrap(self._module).named_parameters()}

    def _fill(self, *, sampled: bool, precision: str) -> None:
        """Gradients of the mean loss, times the loss scale where labels are sampled, as in the step itself."""
        self._clear()
        for part in self._parts:
            self._seed(part)
            last = part is self._parts[-1]
            with torch.enable_grad(), self._strategy.accumulate(self._module, last):
                with autocast(precision, self._strategy.device):
                    batch = self._labelled(part) if sampled else part.batch
                    output, _ = self._module(batch.to(self._strategy.device), part.carry)
                loss = self._mean(output.loss_sum) * self._strategy.world_size  # ranks are averaged
                (self._scaler.apply(loss) if sampled else loss).backward()

    def _mean(self, loss_sum: Tensor) -> Tensor:
        return loss_sum / self.num_targets.to(loss_sum.dtype)

    def _seed(self, part: _Part) -> None:
        seed_forward(self._training.seed, self._step, part.micro_batch, self._strategy.rank, _TAG)

    def _labelled(self, part: _Part) -> Batch:
        rows, length = part.batch.tokens.shape
        numbers = range(part.first, part.first + rows)
        return replace(part.batch, label_draws=label_draws(self._training.seed, self._step, numbers, length))


def label_draws(seed: int, step: int, sequences: range, length: int) -> Tensor:
    """(B, T) float32 uniform numbers by which labels are drawn, on the host.

    Args:
        seed: ``training.seed``.
        step: whose global batch it is.
        sequences: numbers of the sequences in the run: those of the micro-batch.
        length: T.
    """
    rows = [torch.Generator().manual_seed(derive_seed(_TAG, seed, step, number)) for number in sequences]
    return torch.stack([torch.rand(length, generator=generator, dtype=torch.float32) for generator in rows])
