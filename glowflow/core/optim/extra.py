"""Optimisers that want to know more than the gradient of the step: what they are asked, and what they may ask for.

Before the step's own forward pass, every ``extra_every`` steps from step 0 on, the loop lets such an optimiser take an
extra pass over the first ``extra_rows`` sequences of the step's global batch. What it can work out there is a
``GradientSource``: the optimiser needs to know neither ranks nor micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["GradientSource", "HessianProduct", "TakesExtraPass"]

HessianProduct = Literal["exact", "finite_diff"]
"""Ways to a Hessian-vector product: derivatives of the gradient, or differences of two gradients."""


class GradientSource(Protocol):
    """What can be worked out about L, the mean loss per target of the extra pass's sequences on all ranks.

    Auxiliary losses are no part of L. All is equal on every number of ranks, but for rounding and dropout, and nothing
    waits for the device. What fills ``grad`` adds nothing to what was there: it replaces it.
    """

    @property
    def num_targets(self) -> Tensor:
        """() how many targets L is the mean of, at least 1."""

    def fill_sampled_gradient(self) -> None:
        """Fill ``grad`` with the gradient of L against labels that the model draws itself, as precise as training."""

    def fill_gradient(self) -> None:
        """Fill ``grad`` with the gradient of L in full precision; again the same for the same weights."""

    def fill_hessian_product(self, probes: Mapping[Tensor, Tensor]) -> None:
        """Fill ``grad`` with the Hessian of L times the probes, one for each parameter, by differentiating twice."""

    def probe(self, parameter: Tensor) -> Tensor:
        """This rank's part of N(0, 1) numbers in the shape of a parameter, the same for the whole step."""

    def norm(self, parts: list[Tensor]) -> Tensor:
        """() 2-norm of tensors that are laid out as the parameters are, each rank giving its parts."""


@runtime_checkable
class TakesExtraPass(Protocol):
    """An optimiser with extra passes.

    Attributes:
        extra_every: at steps that are multiples of it.
        extra_rows: over how many sequences of the global batch, the first ones; None: all.
        extra_copies: fp32 copies of the parameters that an extra pass holds beside state and gradients.
    """

    extra_every: int
    extra_rows: int | None
    extra_copies: int

    def extra_start(self, reasons: Callable[[HessianProduct], list[str]]) -> None:
        """Called once, before the first step.

        Args:
            reasons: why a way to Hessian-vector products cannot be had in this run; empty when it can.

        Raises:
            ConfigError: what the optimiser needs cannot be had.
        """

    def extra_pass(self, step: int, gradients: GradientSource) -> None:
        """Take an extra pass; ``grad`` may be left filled."""

    def extra_shares(self) -> dict[str, Tensor]:
        """What to log about the last update: name -> (2,) float64, how many of this rank's numbers, of how many."""
