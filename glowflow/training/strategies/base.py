"""How a model is spread over processes: the few operations in which one process and many differ.

``prepare`` builds the architecture on the meta device, turns on activation checkpointing and compilation per block,
lets the strategy shard it, allocates memory, and fills it by name: so the weights are the same for any strategy and
any number of ranks. Nothing here renames a parameter: checkpointing and compilation change the block in place and
``unwrap`` takes off the one wrapper there is (DDP), so state dicts always carry the architecture's own names.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from glowflow.config.errors import CheckpointError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.initialization import copy_full, initialize
from glowflow.core.model import build_module, state_dict_problems
from glowflow.core.sharding import local_part

__all__ = ["Strategy", "gather", "load_full_weights", "unwrap_module"]


class Strategy(ABC):
    """Base of all strategies.

    Args:
        device: where this rank computes.
        precision: ``fp32``, ``bf16`` or ``fp16``; weights stay fp32 in every case.
    """

    name: str

    def __init__(self, *, device: torch.device, precision: str) -> None:
        self.device = torch.device(device)
        self.precision = precision
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if distributed else 0
        self.world_size: int = dist.get_world_size() if distributed else 1

    def prepare(self, config: GlowFlowConfig, *, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model that ``config`` describes, on this rank's device, ready to train.

        Args:
            config: the whole experiment, ``model.vocab_size`` set.
            state_dict: full weights to start from, the same on every rank; left out, the weights are drawn from
                (``training.seed``, parameter name).

        Returns:
            A module to be called as ``module(batch, carry) -> (ModelOutput, carry)``.

        Raises:
            CheckpointError: ``state_dict`` does not fit the architecture.
        """
        module = build_module(config, device="meta")
        for unit in module.shard_units():
            _prepare_unit(unit, checkpointed=config.training.activation_checkpointing, compiled=config.training.compile)
        self._shard(module)
        module.to_empty(device=self.device)
        module.reset_buffers()
        if state_dict is None:
            initialize(module, config.training.seed)
        else:
            load_full_weights(module, state_dict)
        return self._wrap(module)

    def _shard(self, module: BaseArchitecture) -> None:
        """Shard the parameters, still on the meta device. Default: every rank holds all of them."""
        return

    def _wrap(self, module: BaseArchitecture) -> nn.Module:
        """Wrap the finished module. Default: not at all."""
        return module

    def unwrap(self, module: nn.Module) -> BaseArchitecture:
        """The architecture inside what ``prepare`` returned."""
        return unwrap_module(module)

    @abstractmethod
    def accumulate(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one forward and backward pass: gradients are synchronised only for the ``last`` of a step.

        After the last pass ``grad`` holds, in every strategy, the MEAN over ranks of the accumulated gradients.
        """

    def clip_grad_norm(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm``; ``None`` only measures.

        Returns:
            The norm before clipping, () float32 on the device, equal on all ranks; nothing waits for the device. It is
            not finite where a gradient is not, and then (as in torch) the gradients are not finite either.
        """
        gradients = [local_part(p.grad) for p in module.parameters() if p.grad is not None]
        norm = self.global_norm(gradients)
        if max_norm is not None and gradients:
            # The same formula as torch.nn.utils.clip_grad_norm_, so that one process equals plain torch bit for bit.
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def global_norm(self, parts: list[Tensor]) -> Tensor:
        """The 2-norm of plain (local) tensors that are laid out as the parameters are, () float32, on all ranks.

        Where each rank has parts of them, the others' shares are added.
        """
        if not parts:
            return torch.zeros((), device=self.device)
        norms = torch._foreach_norm(parts)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        return norm

    @torch.no_grad()
    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Reduce a plain tensor over all ranks, in place; returns it. Nothing happens with one rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def full_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """All weights by the architecture's own names, as CPU tensors on rank 0 and ``{}`` elsewhere.

        Collective: every rank must call it. One tensor at a time is whole on the device.
        """
        full = {}
        for name, tensor in unwrap_module(module).state_dict().items():
            whole = gather(tensor)
            if self.rank == 0:
                # A copy even on the CPU: training goes on in place while the caller writes the weights.
                full[name] = whole.detach().to("cpu", copy=True)
        return full


def unwrap_module(module: nn.Module) -> BaseArchitecture:
    """The architecture inside a DDP wrapper, or the module itself."""
    inner: Any = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor behind a shard (collective); a plain tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _prepare_unit(unit: nn.Module, *, checkpointed: bool, compiled: bool) -> None:
    """Turn on recomputation and compilation for one block without wrapping it, so its parameters keep their names."""
    if checkpointed:
        # Only where gradients are recorded: in validation there is nothing to recompute.
        unit.forward = _recomputed(unit.forward)
    if compiled:
        unit.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` that keeps its inputs only and runs again in the backward pass (arXiv:1604.06174)."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@torch.no_grad()
def load_full_weights(module: BaseArchitecture, state_dict: Mapping[str, Tensor], source: str = "state_dict") -> None:
    """Copy full weights, the same on every rank, into a module whose parameters may be shards; nothing is sent.

    Raises:
        CheckpointError: a name is missing or left over, or a shape differs.
    """
    if problems := state_dict_problems(module, state_dict, source):
        raise CheckpointError(problems, "The given weights do not fit the architecture")
    for name, target in module.state_dict().items():
        copy_full(state_dict[name], target)
