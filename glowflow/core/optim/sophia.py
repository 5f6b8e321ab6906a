"""Sophia (arXiv:2305.14342): a momentum over an estimate of the Hessian's diagonal, clipped number by number.

    m     <- beta1 m + (1 - beta1) g
    theta <- (1 - lr wd) theta - lr clip(m / d, -1, 1)

Every k steps, from the first on, the estimate h of the diagonal takes in a new one from an extra pass over B targets:

    Sophia-G    h <- beta2 h + (1 - beta2) B ghat^2         d = rho h + 1e-15
    Sophia-H    h <- beta2 h + (1 - beta2) u (H u)          d = max(gamma h, eps)

ghat is the gradient of the mean loss against labels that the model draws itself (Gauss-Newton-Bartlett), H the Hessian
of the mean loss against the true labels and u ~ N(0, 1) (Hutchinson). The authors' code (a7e1572) keeps h without B and
multiplies by it at every step: the same, while B does not change.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.optimizers import SophiaGConfig, SophiaHConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.optim.extra import GradientSource, HessianProduct
from glowflow.core.optim.foreach import ForeachOptimizer, unless
from glowflow.core.optim.groups import parameter_groups
from glowflow.core.sharding import local_part

__all__ = [
    "SophiaG",
    "SophiaH",
    "build_sophia_g",
    "build_sophia_h",
    "finite_difference",
    "gauss_newton_bartlett",
    "hutchinson",
    "sophia_update",
]

logger = logging.getLogger(__name__)

_Pairs: TypeAlias = dict[Tensor, tuple[Tensor, Tensor]]
"""Parameter -> this rank's part of the probe u, and of H u."""


def build_sophia_g(module: nn.Module, config: SophiaGConfig, lr: float) -> SophiaG:
    """Sophia-G over plain or sharded (DTensor) parameters.

    Args:
        module: whose parameters are trained; an architecture must be able to sample labels.
        config: betas, rho, weight decay, interval and size of the Hessian's batch.
        lr: learning rate of the first step; schedules set it anew.

    Raises:
        ConfigError: the architecture does not heed ``label_draws``.
    """
    if isinstance(module, BaseArchitecture) and not module.samples_labels:
        rule = f"needs labels that the model samples, and {type(module).__name__} does not say that it does"
        hint = "heed batch.label_draws in forward (OutputHead.sample) and set samples_labels = True, or use sophia-h"
        raise ConfigError(Problem("training.optimizer", rule, config.name, hint))
    groups = parameter_groups(module, config.weight_decay)
    every, rows = config.hessian_interval, config.hessian_batch_size
    return SophiaG(groups, lr=lr, betas=config.betas, rho=config.rho, every=every, rows=rows)


def build_sophia_h(module: nn.Module, config: SophiaHConfig, lr: float) -> SophiaH:
    """Sophia-H over plain or sharded (DTensor) parameters.

    Args:
        module: whose parameters are trained.
        config: betas, gamma, eps, weight decay, how Hessian-vector products are made, how often and on how much.
        lr: learning rate of the first step; schedules set it anew.
    """
    return SophiaH(
        parameter_groups(module, config.weight_decay),
        lr=lr,
        betas=config.betas,
        gamma=config.gamma,
        eps=config.eps,
        every=config.hessian_interval,
        rows=config.hessian_batch_size,
        hvp=config.hvp,
        fd_step=config.fd_step,
    )


class _Sophia(ForeachOptimizer):
    """What both have in common; see ``TakesExtraPass`` for the attributes. State: twice the parameters."""

    state_names = ("exp_avg", "hessian")
    extra_copies = 0

    def __init__(self, params: Any, defaults: dict[str, Any], every: int, rows: int | None) -> None:
        super().__init__(params, defaults)
        self.extra_every, self.extra_rows = every, rows

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """See ``sophia_update``."""
        momenta, hessians = states
        options = {"lr": group["lr"], "beta1": group["betas"][0], "weight_decay": group["weight_decay"]}
        sophia_update(params, grads, momenta, self.denominators(hessians, group), **options, skip=skip)

    @abstractmethod
    def denominators(self, h: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """d of the rule, above zero."""

    @torch.no_grad()
    def extra_shares(self) -> dict[str, Tensor]:
        """``win_rate``: the share of the numbers that are not clipped; the paper has 0.1 to 0.5."""
        parameters = self._parameters()
        counts = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
        for group in self.param_groups:
            for m, h in ((self._part(p, "exp_avg"), self._part(p, "hessian")) for p in group["params"]):
                (d,) = self.denominators([h], group)
                counts += torch.stack([(m.abs() < d).sum(), torch.full_like(counts[1], m.numel())])
        return {"win_rate": counts}

    def _part(self, parameter: Tensor, name: str) -> Tensor:
        return local_part(self._state(parameter, name))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _estimates(self, found: Collection[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor], float]]:
        """By group: those of its parameters that are among ``found``, their h and beta2."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p in found]
            yield parameters, [self._part(p, "hessian") for p in parameters], group["betas"][1]


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate; see the module.

    Args:
        params: parameters, or groups that may set ``lr``, ``betas``, ``rho`` and ``weight_decay``.
        every: steps from one estimate to the next.
        rows: sequences of the global batch that an estimate is made on; None: all.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        weight_decay: float = 0.0,
        *,
        every: int = 10,
        rows: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}
        super().__init__(params, defaults, every, rows)

    def denominators(self, h: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        d = torch._foreach_mul(h, group["rho"])
        torch._foreach_add_(d, 1e-15)
        return list(d)

    def extra_start(self, reasons: Callable[[HessianProduct], list[str]]) -> None:
        """Nothing: no Hessian-vector product is needed."""

    def extra_pass(self, step: int, gradients: GradientSource) -> None:
        """Take in a new estimate, unless it is not finite."""
        gradients.fill_sampled_gradient()
        with torch.no_grad():
            found = {p: local_part(p.grad) for p in self._parameters() if p.grad is not None}
            skip = ~gradients.norm([*found.values()]).isfinite()
            for parameters, h, beta2 in self._estimates(found):
                ghat = [found[p] for p in parameters]
                gauss_newton_bartlett(h, ghat, gradients.num_targets, beta2=beta2, skip=skip)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimate; see the module. An estimate needs room for 2 more copies of the parameters.

    Args:
        params: parameters, or groups that may set ``lr``, ``betas``, ``gamma``, ``eps`` and ``weight_decay``.
        every: steps from one estimate to the next.
        rows: sequences of the global batch that an estimate is made on; None: all.
        hvp: how H u is made: ``exact`` differentiates twice; ``finite_diff`` see ``finite_difference``; ``auto`` takes
            ``exact`` where that can be had.
        fd_step: length of the step to either side, relative to the root mean square of the parameters.
    """

    extra_copies = 2

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        every: int = 10,
        rows: int | None = None,
        hvp: str = "auto",
        fd_step: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, every, rows)
        self.hvp, self.fd_step = hvp, fd_step
        self._product: HessianProduct = "finite_diff" if hvp == "finite_diff" else "exact"

    def denominators(self, h: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        d = torch._foreach_mul(h, group["gamma"])
        torch._foreach_clamp_min_(d, group["eps"])
        return list(d)

    def extra_start(self, reasons: Callable[[HessianProduct], list[str]]) -> None:
        """Choose how H u is made."""
        ways: list[HessianProduct] = ["exact", "finite_diff"] if self.hvp == "auto" else [self._product]
        against = {way: reasons(way) for way in ways}
        chosen = next((way for way, found in against.items() if not found), None)
        if chosen is None:
            key = "training.optimizer.hvp"
            problems = [Problem(key, f"{way} cannot be had: {rule}", self.hvp) for way in ways for rule in against[way]]
            raise ConfigError(problems, title="No way to Hessian-vector products")
        self._product = chosen
        passed_over = "; ".join(rule for found in against.values() for rule in found)
        why = f"no exact ones: {passed_over}" if passed_over else "first choice" if self.hvp == "auto" else "named"
        logger.info("sophia-h: Hessian-vector products by %s (%s)", chosen, why)

    def extra_pass(self, step: int, gradients: GradientSource) -> None:
        """Take in a new estimate, unless it is not finite."""
        if self._product == "exact":
            found = _exact(self._parameters(), gradients)
        else:
            found = finite_difference(self._parameters(), gradients, self.fd_step)
        with torch.no_grad():
            skip = ~gradients.norm([product for _, product in found.values()]).isfinite()
            for parameters, h, beta2 in self._estimates(found):
                u, product = [found[p][0] for p in parameters], [found[p][1] for p in parameters]
                hutchinson(h, u, product, beta2=beta2, skip=skip)


def sophia_update(
    theta: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    d: list[Tensor],
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """One step in place, in the symbols of the module; ``skip`` as in ``ForeachOptimizer.update``."""
    decay: float | Tensor = 1.0 - lr * weight_decay
    torch._foreach_lerp_(m, unless(skip, m, g), 1.0 - beta1)
    step = torch._foreach_div(m, d)
    torch._foreach_clamp_min_(step, -1.0)
    torch._foreach_clamp_max_(step, 1.0)
    if skip is not None:
        torch._foreach_mul_(step, (~skip).to(step[0].dtype))
        decay = torch.where(skip, 1.0, decay)
    torch._foreach_mul_(theta, decay)
    torch._foreach_add_(theta, step, alpha=-lr)


def gauss_newton_bartlett(
    h: list[Tensor], ghat: list[Tensor], count: Tensor | float, *, beta2: float, skip: Tensor | None = None
) -> None:
    """``h <- beta2 h + (1 - beta2) B ghat^2`` in place, which estimates the diagonal of the Gauss-Newton matrix.

    Args:
        ghat: gradient of the mean loss over B targets, against labels sampled from the model.
        count: B.
        skip: 0-dim bool on the device: where it is true nothing changes.
    """
    squares = [x.square().mul_(count) for x in ghat]
    torch._foreach_lerp_(h, unless(skip, h, squares), 1.0 - beta2)


def hutchinson(
    h: list[Tensor], u: list[Tensor], product: list[Tensor], *, beta2: float, skip: Tensor | None = None
) -> None:
    """``h <- beta2 h + (1 - beta2) u (H u)`` in place, which estimates the diagonal of H.

    Args:
        u: numbers with mean 0, variance 1 and no correlation.
        product: H u.
        skip: as in ``gauss_newton_bartlett``.
    """
    torch._foreach_lerp_(h, unless(skip, h, list(torch._foreach_mul(u, product))), 1.0 - beta2)


def finite_difference(parameters: list[Tensor], gradients: GradientSource, relative_step: float) -> _Pairs:
    """H u = (grad(theta + e u) - grad(theta - e u)) / 2e, with e = ``relative_step`` rms(theta).

    Only gradients are needed, so that fused kernels, recomputation and shards do not matter. In fp32 the error is about
    1e-4 at 1e-3: longer steps leave the parabola, shorter ones drown in rounding. The parameters are put back bit for
    bit. One copy of them and one of the gradient are held.

    Returns:
        Parameters that have a gradient -> u, as far as rounding let it be stepped along, and H u.
    """
    parts = [local_part(p.detach()) for p in parameters]
    with torch.no_grad():
        start = [x.clone() for x in parts]
        count = sum(p.numel() for p in parameters)
        e = gradients.norm(parts) * (relative_step / math.sqrt(count))
        for parameter, x in zip(parameters, parts, strict=True):
            x.add_(gradients.probe(parameter).mul_(e))
    gradients.fill_gradient()
    ahead = {p: local_part(p.grad).clone() for p in parameters if p.grad is not None}
    with torch.no_grad():
        for x, x0 in zip(parts, start, strict=True):
            x.neg_().add_(x0, alpha=2.0)
    gradients.fill_gradient()
    found: _Pairs = {}
    with torch.no_grad():
        for parameter, x, x0 in zip(parameters, parts, start, strict=True):
            if parameter.grad is not None:
                behind = local_part(parameter.grad)
                product = ahead[parameter].sub_(behind).div_(2 * e)
                found[parameter] = torch.sub(x0, x, out=behind).div_(e), product
            x.copy_(x0)
    return found


def _exact(parameters: list[Tensor], gradients: GradientSource) -> _Pairs:
    probes = {p: gradients.probe(p) for p in parameters}
    gradients.fill_hessian_product(probes)
    return {p: (u, local_part(p.grad)) for p, u in probes.items() if p.grad is not None}
