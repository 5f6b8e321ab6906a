"""Schemas of the registered optimisers: the keys under ``training.optimizer:``. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from glowflow.config.base import StrictModel

__all__ = [
    "AdamWConfig",
    "AdanConfig",
    "LionConfig",
    "MuonConfig",
    "OptimizerConfig",
    "SophiaGConfig",
    "SophiaHConfig",
]


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


class MuonConfig(OptimizerConfig):
    """Muon (arXiv:2502.16982): orthogonalised momentum for hidden matrices, AdamW for the rest. Wants AdamW's rate."""

    name: str = Field("muon", description="Registered name of the optimiser.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay rate of the matrices' momentum.")
    nesterov: bool = Field(True, description="Look ahead: the momentum once more with the gradient of the step.")
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz steps that orthogonalise the momentum.")
    betas: Betas = Field((0.9, 0.95), description="Decay rates of the first and second moment, in the AdamW part.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment, in the AdamW part.")
    adamw_lr_scale: float = Field(1.0, gt=0, description="Learning rate of the AdamW part over `training.lr`.")


class _SophiaConfig(OptimizerConfig):
    """Keys that both Sophias have."""

    weight_decay: float = Field(0.2, ge=0, description="Weight decay on matrices; vectors (norms) get none.")
    hessian_interval: int = Field(10, ge=1, description="Steps from one estimate of the Hessian to the next.")
    hessian_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences of the global batch that it is estimated on, the first ones; default: all of them.",
    )


class SophiaGConfig(_SophiaConfig):
    """Sophia-G (arXiv:2305.14342): a clipped momentum over the squares of gradients against sampled labels."""

    name: str = Field("sophia-g", description="Registered name of the optimiser.")
    betas: Betas = Field((0.965, 0.99), description="Decay rates of the momentum and of the Hessian's estimate.")
    rho: float = Field(0.05, gt=0, description="The larger, the fewer numbers of an update are clipped.")


class SophiaHConfig(_SophiaConfig):
    """Sophia-H (arXiv:2305.14342): a clipped momentum over Hutchinson's estimate of the Hessian's diagonal."""

    name: str = Field("sophia-h", description="Registered name of the optimiser.")
    betas: Betas = Field((0.96, 0.99), description="Decay rates of the momentum and of the Hessian's estimate.")
    gamma: float = Field(0.01, gt=0, description="The larger, the fewer numbers of an update are clipped.")
    eps: float = Field(1e-12, gt=0, description="Least denominator of an update, where the estimate is not positive.")
    hvp: Literal["auto", "exact", "finite_diff"] = Field(
        "auto",
        description=(
            "Hessian-vector products by differentiating twice (not of sharded parameters, recomputed or compiled "
            "blocks and mixtures of experts), or by differences of two gradients; auto: the first where it can be."
        ),
    )
    fd_step: float = Field(
        1e-3, gt=0, lt=1, description="Step of the differences, relative to the parameters' root mean square."
    )
