"""Tensors that are cut over ranks."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["local_part"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, which shares its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
