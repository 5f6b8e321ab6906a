"""Every rank holds the whole model; gradients are averaged in buckets during the backward pass (arXiv:2006.15704)."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from glowflow.core.architectures.base import BaseArchitecture
from glowflow.training.strategies.base import Strategy

__all__ = ["DDPStrategy"]

# torch 2.13 has a new name for it and warns about the old one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class DDPStrategy(Strategy):
    """Data parallel with replicas. With one worker and no process group it is the plain module."""

    name = "ddp"

    def _wrap(self, module: BaseArchitecture) -> nn.Module:
        if not (dist.is_available() and dist.is_initialized()):
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # gradients live in the buckets: no second copy
            **_KEEP_BUFFERS,  # rotary tables are functions of the config, equal everywhere
        )

    def accumulate(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()
