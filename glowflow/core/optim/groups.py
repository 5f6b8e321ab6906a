"""Parameter groups: matrices decay, vectors (norms) do not."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, each in the order of the parameters' names, so that every rank and every resume agrees.

    A group without parameters is left out.
    """
    named = sorted(((n, p) for n, p in module.named_parameters() if p.requires_grad), key=lambda item: item[0])
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
