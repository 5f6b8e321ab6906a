"""Parameters, gradients and optimiser state sharded over the ranks with FSDP2 (``fully_shard``; arXiv:2304.11277).

Small models are latency-bound, not memory-bound: see ``FSDPStrategy`` for what is chosen by size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.export import register_dataclass

from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import ModelOutput
from glowflow.training.strategies.base import Strategy

__all__ = ["FSDPStrategy"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

GROUP_BYTES = 16 * 2**20
KEEP_BYTES = 512 * 2**20

# FSDP2 hooks the backward pass to the tensors in a module's output. Older releases of torch look into pytrees only and
# would not reduce the root's gradients behind a plain dataclass.
register_dataclass(ModelOutput)


class FSDPStrategy(Strategy):
    """Fully sharded data parallel.

    Two choices follow from the size of the model, the same on all ranks:

    - Consecutive shard units are communicated together until a group holds ``group_bytes`` of weights, because every
      collective has a fixed price: the blocks of a 124M model stay apart, a model smaller than that is one group.
    - A model of at most ``keep_bytes`` keeps its gathered weights from the forward to the backward pass, and from one
      micro-batch to the next: one all-gather per step instead of two per micro-batch. A larger one gives each group's
      memory back after use.

    With bf16 and fp16 the gathered weights are in that type and gradients are reduced in fp32; the sharded weights
    and the optimiser state stay fp32. Inputs are not cast: loss weights must keep their precision.

    Args:
        group_bytes: smallest size of a group in bytes of fp32 weights; 0 gives one group per shard unit.
        keep_bytes: largest model in bytes of fp32 weights that stays gathered.
    """

    name = "fsdp"

    def __init__(
        self, *, device: torch.device, precision: str, group_bytes: int = GROUP_BYTES, keep_bytes: int = KEEP_BYTES
    ) -> None:
        _ensure_process_group(torch.device(device))
        super().__init__(device=device, precision=precision)
        self.group_bytes = group_bytes
        self.keep_bytes = keep_bytes
        self._mesh: DeviceMesh = init_device_mesh(self.device.type, (self.world_size,))
        self._keep_gathered = False

    def _shard(self, module: BaseArchitecture) -> None:
        self._keep_gathered = _num_bytes([module]) <= self.keep_bytes
        dtype = _DTYPES.get(self.precision)
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for group in _groups(module.shard_units(), self.group_bytes):
            # The list form makes one group of several blocks: one all-gather and one reduce-scatter for all of them.
            fully_shard(
                group if len(group) > 1 else group[0],
                mesh=self._mesh,
                mp_policy=policy,
                reshard_after_forward=not self._keep_gathered,
            )
        fully_shard(module, mesh=self._mesh, mp_policy=policy)

    @contextlib.contextmanager
    def accumulate(self, module: nn.Module, last: bool) -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last or not self._keep_gathered)
        yield

    def global_norm(self, parts: list[Tensor]) -> Tensor:
        # Shards are disjoint, so the squares of their norms add up to that of the whole: exact, one small message.
        square = super().global_norm(parts).square()
        return self.all_reduce(square).sqrt()


def _groups(units: Sequence[nn.Module], smallest: int) -> list[list[nn.Module]]:
    """Consecutive units, joined until each group holds ``smallest`` bytes (the last may hold less).

    No group at all where all units together are smaller: they are then part of the root, beside the embedding.
    """
    if _num_bytes(units) < smallest:
        return []
    groups: list[list[nn.Module]] = []
    for unit in units:
        if groups and _num_bytes(groups[-1]) < smallest:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def _num_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _ensure_process_group(device: torch.device) -> None:
    """FSDP2 needs a process group even for one worker; a group of one needs no address."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
