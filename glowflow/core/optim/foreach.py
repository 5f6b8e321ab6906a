"""What optimisers of our own share: whole lists of tensors at a time, shards as they lie, skips on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from glowflow.core.sharding import local_part

__all__ = ["ForeachOptimizer", "bias_corrections", "bunches", "local_gradients", "unless", "with_gradient"]

_CACHED = 2**18  # numbers: 1 MiB of each of about eight tensors


class ForeachOptimizer(Optimizer):
    """An optimiser whose rule treats every number by itself, so that a shard of a parameter is updated like the whole.

    State is zero at first and laid out as the parameter is, so that checkpoints hold it whole; the rule sees this
    rank's part of everything. ``grad_scale`` and ``found_inf`` (0-dim, on the device), where they are set, divide the
    gradients and leave everything untouched, as in torch's fused optimisers. A parameter's state ``step`` counts its
    updates where the rule wants to know. A rule that looks at more than one number overrides ``update_group``.

    Args:
        params: as of torch's optimisers.
        defaults: options of groups that do not set them.
    """

    state_names: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = False
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # Torch's word for a count of steps that lies on the device: whoever loads the state shall put it there.
        super().__init__(params, {**defaults, "capturable": True} if self.counts_steps else defaults)

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
            self.update_group(group, grad_scale, skip)
        return loss

    def update_group(self, group: dict[str, Any], grad_scale: Tensor | None, skip: Tensor | None) -> None:
        """Update a group's parameters that have a gradient, as many at a time as is best.

        Args:
            group: one of ``param_groups``, with the step's learning rate.
            grad_scale: 0-dim: what the gradients are divided by.
            skip: as in ``update``.
        """
        for params in bunches(with_gradient(group), _cached_numbers, _CACHED):
            states = [[local_part(self._state(p, name)) for p in params] for name in self.state_names]
            if self.counts_steps:
                states.append([self._count(p) for p in params])
            grads = local_gradients(params, grad_scale)
            self.update([local_part(p) for p in params], grads, *states, group=group, skip=skip)

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


def _cached_numbers(parameter: Tensor) -> int:
    """On a GPU everything is updated together, on a CPU as much as stays in the cache from pass to pass."""
    return local_part(parameter).numel() if parameter.device.type == "cpu" else 0


def with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that this step updates."""
    return [p for p in group["params"] if p.grad is not None]


def local_gradients(params: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """This rank's part of the gradients, divided by ``grad_scale``."""
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    return grads if grad_scale is None else list(torch._foreach_div(grads, grad_scale))


def bunches(params: list[Tensor], size: Callable[[Tensor], int], most: int) -> Iterator[list[Tensor]]:
    """Consecutive parameters whose sizes add up to ``most`` at most, or one that is larger."""
    bunch: list[Tensor] = []
    numbers = 0
    for parameter in params:
        count = size(parameter)
        if bunch and numbers + count > most:
            yield bunch
            bunch, numbers = [], 0
        bunch.append(parameter)
        numbers += count
    if bunch:
        yield bunch


def unless(skip: Tensor | None, old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """``new``, or where the step is skipped ``old``."""
    return new if skip is None else [torch.where(skip, a, b) for a, b in zip(old, new, strict=True)]


def bias_corrections(t: list[Tensor], beta: float, like: list[Tensor]) -> list[Tensor]:
    """1 - beta^t, 0-dim; before the first step, which only a skipped one can be, 1 - beta."""
    return [(1.0 - beta ** count.clamp(min=1.0).double()).to(x.dtype) for count, x in zip(t, like, strict=True)]
