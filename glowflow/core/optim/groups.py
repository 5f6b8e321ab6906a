"""Parameter groups by role: what decays (embeddings and matrices) and what does not (vectors: gains and biases).

A module in, the optimiser's groups out. The architecture says what each parameter is for; see ``ParameterRole``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from glowflow.core.architectures.base import BaseArchitecture, ParameterRole, default_role
from glowflow.core.initialization import qualified_name

__all__ = ["parameter_groups"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """One group for what decays and one for what does not, each in the order of the parameters' names.

    So every rank and every resume agrees. A group without parameters is left out. Parameters whose role scales the
    learning rate follow in groups of their own, which carry the factor as ``lr_scale``.
    """
    named = [(qualified_name(name), p) for name, p in module.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in sorted(named, key=lambda item: item[0]):
        role = _role(module, name)
        groups.setdefault((role.lr_scale, role.decays), []).append(parameter)
    in_order = sorted(groups, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    return [_group(groups[scale, decays], weight_decay if decays else 0.0, scale) for scale, decays in in_order]


def _role(module: nn.Module, name: str) -> ParameterRole:
    return module.parameter_role(name) if isinstance(module, BaseArchitecture) else default_role(module, name)


def _group(parameters: list[nn.Parameter], weight_decay: float, lr_scale: float) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if lr_scale == 1.0 else {**group, "lr_scale": lr_scale}
