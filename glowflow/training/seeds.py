"""Randomness as a function of where we are, never as state.

The forward pass of a micro-batch is seeded by (seed, step, micro-batch, rank): a resumed run draws the same dropout
masks as an uninterrupted one, with nothing to save.
"""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch

__all__ = ["choose_threads", "derive_seed", "seed_everything", "seed_forward"]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts; the same on every machine and Python version."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, for code that draws outside the seeded places."""
    random.seed(seed)
    np.random.seed(derive_seed("numpy", seed) % 2**32)
    torch.manual_seed(seed)


def seed_forward(seed: int, step: int, micro_batch: int, rank: int, tag: str = "forward") -> None:
    """Seed torch (all devices) for one forward pass: dropout and whatever else it draws; ``tag`` tells passes apart."""
    torch.manual_seed(derive_seed(tag, seed, step, micro_batch, rank))


def choose_threads(named: int | None, stored: int | None, local_world_size: int) -> tuple[int, str]:
    """Intra-op threads of this worker, and why.

    Args:
        named: ``training.threads``.
        stored: what the checkpoint that is resumed was trained with; sums depend on it in the last bits.
        local_world_size: workers on this node.

    Returns:
        (threads, reason)
    """
    if named is not None:
        return named, "training.threads"
    if stored is not None:
        return stored, "as in the checkpoint"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, local_world_size)), f"{cores} cores over {local_world_size} worker(s) on this node"
