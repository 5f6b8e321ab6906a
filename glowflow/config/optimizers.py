"""Schemas of the registered optimisers: the keys under ``training.optimizer:``. No torch here."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from glowflow.config.base import StrictModel

__all__ = ["AdamWConfig", "AdanConfig", "LionConfig", "OptimizerConfig"]


T = TypeVar("T", bound="tuple[float, ...]")


def _decay_rates(betas: T) -> T:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("each must be at least 0 and less than 1")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_decay_rates)]


class OptimizerConfig(StrictModel):
    """Keys that every optimiser has."""

    name: str = Field(description="Registered name of the optimiser.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay on matrices; vectors (norms) get none.")


class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv:1711.05101), torch's fused kernel."""

    name: str = Field("adamw", description="Registered name of the optimiser.")
    betas: Betas = Field((0.9, 0.95), description="Decay rates of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")


class LionConfig(OptimizerConfig):
    """Lion (arXiv:2302.06675): the sign of a momentum. Wants 3 to 10 times less rate and more decay than AdamW."""

    name: str = Field("lion", description="Registered name of the optimiser.")
    betas: Betas = Field(
        (0.9, 0.99),
        description="Weight of the momentum in the update, and its decay rate; the paper has 0.95, 0.98 for language.",
    )


class AdanConfig(OptimizerConfig):
    """Adan (arXiv:2208.06677): Nesterov momentum with the change of the gradient. Wants 5 to 10 times AdamW's rate."""

    name: str = Field("adan", description="Registered name of the optimiser.")
    weight_decay: float = Field(0.02, ge=0, description="Weight decay on matrices; vectors (norms) get none.")
    betas: Annotated[tuple[float, float, float], AfterValidator(_decay_rates)] = Field(
        (0.98, 0.92, 0.99),
        description="Decay rates of the gradient, of its change, and of the square; the paper writes 1 - beta.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    proximal: bool = Field(True, description="Decay by division, after the step, as in the paper; else as in AdamW.")
