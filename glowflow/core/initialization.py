"""Initial weights that do not depend on how the model is sharded.

Each parameter is drawn whole, on the CPU, from a generator seeded by (seed, qualified name), and every rank keeps its
own part. So one process, three FSDP ranks and a GPU all start from the same numbers, bit for bit, and a parameter's
draw does not change when another one is added. (``init.normal_`` on a DTensor gives every rank the same draw.)
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from glowflow.core.architectures.base import BaseArchitecture, InitSpec

__all__ = ["draw", "initialize", "parameter_seed", "qualified_name"]

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def qualified_name(name: str) -> str:
    """The parameter's name without what compilation and activation checkpointing insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parameter_seed(seed: int, name: str) -> int:
    """63 bits of SHA-256 over seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(spec: InitSpec, shape: torch.Size | tuple[int, ...], seed: int, name: str, dtype: torch.dtype) -> Tensor:
    """The whole initial value of one parameter, on the CPU; normal values are drawn in fp32 and then cast."""
    if spec.kind == "normal":
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        return torch.empty(shape, dtype=torch.float32).normal_(0.0, spec.std, generator=generator).to(dtype)
    return torch.full(shape, 1.0 if spec.kind == "ones" else 0.0, dtype=dtype)


@torch.no_grad()
def initialize(module: BaseArchitecture, seed: int) -> None:
    """Fill all parameters in place, sharded or not, and recompute the buffers.

    Where the architecture has weights to start from (``initial_weights``), those are taken.

    Args:
        module: the architecture, off the meta device (``to_empty``), perhaps under ``fully_shard``.
        seed: ``training.seed``.

    Raises:
        CheckpointError: weights to start from cannot be read, or do not fit.
    """
    given = module.initial_weights()
    for raw_name, parameter in module.named_parameters():
        name = qualified_name(raw_name)
        if name in given:
            copy_full(given[name], parameter)
        else:
            copy_full(draw(module.init_spec(name), parameter.shape, seed, name, parameter.dtype), parameter)
    module.reset_buffers()


def copy_full(full: Tensor, parameter: nn.Parameter | Tensor) -> None:
    """Copy a whole tensor into a parameter; a sharded one takes its own part, without communication."""
    from glowflow.core.sharding import local_part, part_of  # torch's DTensor takes a while to import

    local = local_part(parameter)
    local.copy_(part_of(full.to(local.device), parameter))
