"""What optimisers of our own share: whole lists of tensors at a time, shards as they lie, skips on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from glowflow.core.sharding import local_part

__all__ = ["ForeachOptimizer", "unless"]

_CACHED = 2**18  # numbers: 1 MiB of each of about eight tensors


class ForeachOptimizer(Optimizer):
    """An optimiser whose rule treats every number by itself, so that a shard of a parameter is updated like the whole.

    State is zero at first and laid out as the parameter is, so that checkpoints hold it whole; the rule sees this
    rank's part of everything. ``grad_scale`` and ``found_inf`` (0-dim, on the device), where they are set, divide the
    gradients and leave everything untouched, as in torch's fused optimisers. A parameter's state ``step`` counts its
    updates where the rule wants to know.
    """

    state_names: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = False
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; reads nothing back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        skip = None if found_inf is None else found_inf > 0
        if skip is not None and skip.device.type == "cpu":  # nothing to wait for
            if skip:
                return loss
            skip = None
        for group in self.param_groups:
            for params in _bunches([p for p in group["params"] if p.grad is not None]):
                grads = [local_part(p.grad) for p in params if p.grad is not None]
                if grad_scale is not None:
                    grads = list(torch._foreach_div(grads, grad_scale))
                states = [[local_part(self._state(p, name)) for p in params] for name in self.state_names]
                if self.counts_steps:
                    states.append([self._count(p) for p in params])
                self.update([local_part(p) for p in params], grads, *states, group=group, skip=skip)
        return loss

    @abstractmethod
    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """Apply the rule in place.

        Args:
            states: a list per entry of ``state_names``, then 0-dim numbers of updates where ``counts_steps``.
            group: the parameter group, with the step's learning rate.
            skip: 0-dim bool on the device: where it is true nothing may change, whatever the gradients hold.
        """

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        value: Tensor = state[name]
        return value

    def _count(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        value: Tensor = state["step"]
        return value


def _bunches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """What is updated together: on a GPU everything, on a CPU as much as stays in the cache from pass to pass."""
    bunch: list[Tensor] = []
    numbers = 0
    for parameter in params:
        count = local_part(parameter).numel()
        if bunch and parameter.device.type == "cpu" and numbers + count > _CACHED:
            yield bunch
            bunch, numbers = [], 0
        bunch.append(parameter)
        numbers += count
    if bunch:
        yield bunch


def unless(skip: Tensor | None, old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """``new``, or where the step is skipped ``old``."""
    return new if skip is None else [torch.where(skip, a, b) for a, b in zip(old, new, strict=True)]
