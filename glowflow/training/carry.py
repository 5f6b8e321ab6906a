"""Recurrent memory between steps: one carry per micro-batch, saved as one tensor over this rank's lanes.

A carry is ``dict[str, Tensor] | None`` with lanes in the first dimension. Micro-batch m of a rank always holds the same
lanes, so joining the micro-batches in order gives the rank's lanes in order, whatever the accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glowflow.core.architectures.base import Carry

__all__ = ["join_carries", "split_carry"]


def join_carries(carries: Sequence[Carry]) -> dict[str, Tensor] | None:
    """The carries of all micro-batches as one, or None for an architecture without memory."""
    held = [carry for carry in carries if carry is not None]
    if not held:
        return None
    return {name: torch.cat([carry[name] for carry in held]) for name in held[0]}


def split_carry(carry: dict[str, Tensor] | None, parts: int, device: torch.device) -> list[Carry]:
    """The opposite of ``join_carries``, for any number of equal micro-batches."""
    if carry is None:
        return [None] * parts
    chunks = {name: tensor.to(device).tensor_split(parts) for name, tensor in carry.items()}
    return [{name: pieces[index] for name, pieces in chunks.items()} for index in range(parts)]
