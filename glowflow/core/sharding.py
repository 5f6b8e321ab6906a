"""Tensors that are cut over ranks."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["local_part", "part_of", "whole"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, which shares its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as ``like`` is, without communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on every rank, of which each has its part, cut as ``like`` is and of the same shape."""
    if not isinstance(like, DTensor):
        return part
    cut = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return cut.full_tensor()
