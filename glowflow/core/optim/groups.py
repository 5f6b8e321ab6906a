"""Parameter groups by role: what decays (embeddings and matrices) and what does not (vectors: gains and biases).

A module in, the optimiser's groups out. The architecture says what each parameter is for; see ``ParameterRole``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture, ParameterRole, default_role
from glowflow.core.initialization import qualified_name

__all__ = ["MatrixLayout", "matrix_groups", "parameter_groups", "parameters_with_roles"]

MatrixLayout: TypeAlias = tuple[tuple[int, ...], int]
"""A parameter as matrices: the heights of those that are stacked, and their common width. One with more numbers than
that is a batch, laid out as (batch, sum of heights, width): the experts of a mixture."""

_Found: TypeAlias = tuple[str, nn.Parameter, ParameterRole]


def parameter_groups(module: nn.Module, weight_decay: float, *, width_exponent: float = 1.0) -> list[dict[str, Any]]:
    """One group for what decays and one for what does not, each in the order of the parameters' names.

    So every rank and every resume agrees. A group without parameters is left out. Parameters whose role scales the
    learning rate follow in groups of their own, which carry the factor as ``lr_scale``.

    Args:
        weight_decay: of what decays; times the width ratio where the rate is divided by it, so that rate times decay
            does not depend on the width.
        width_exponent: under maximal-update parametrisation the rate of hidden matrices is divided by the width ratio
            to this power: 1 for rules whose step has a size of its own for every number (arXiv:2203.03466, table 3).
    """
    return _groups(parameters_with_roles(module), weight_decay, width_exponent)


def matrix_groups(
    module: nn.Module, weight_decay: float, *, width_exponent: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups as in ``parameter_groups`` of the hidden matrices, and of all the rest (whose exponent is 1).

    Those of the matrices say under ``matrices`` how each parameter is laid out.

    Args:
        width_exponent: of the matrices' rule; see ``parameter_groups``.

    Raises:
        ConfigError: a role stacks matrices that do not add up to the parameter.
    """
    found = list(parameters_with_roles(module))
    hidden = [(name, p, role) for name, p, role in found if role.kind == "hidden" and p.ndim >= 2]
    layouts: dict[Tensor, MatrixLayout] = {p: _layout(name, p, role) for name, p, role in hidden}
    matrices = _groups(hidden, weight_decay, width_exponent)
    for group in matrices:
        group["matrices"] = [layouts[p] for p in group["params"]]
    return matrices, _groups([item for item in found if item[1] not in layouts], weight_decay, 1.0)


def _layout(name: str, parameter: Tensor, role: ParameterRole) -> MatrixLayout:
    shape = parameter.shape
    filters = shape[1:].numel()  # a convolution's: one row for each channel that comes out
    height, width = (shape[0], filters) if role.fan_in == filters else (shape[-2], shape[-1])
    rows = role.rows or (height,)
    if sum(rows) != height or min(rows) < 1:
        rule = f"parameter_role({name!r}): rows must add up to the {height} rows of the parameter"
        raise ConfigError(Problem("model.arch", rule, list(rows)))
    return rows, width


def _groups(found: Iterable[_Found], weight_decay: float, width_exponent: float) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool, float], list[nn.Parameter]] = {}
    for _, parameter, role in found:
        slowdown = role.width_ratio**width_exponent
        decay = weight_decay * slowdown if role.decays else 0.0
        groups.setdefault((role.lr_scale / slowdown, role.decays, decay), []).append(parameter)
    in_order = sorted(groups, key=lambda key: (key[0] != 1.0, key[0], not key[1], key[2]))
    return [_group(groups[key], key[2], key[0]) for key in in_order]


def parameters_with_roles(module: nn.Module) -> Iterator[_Found]:
    """Qualified name, parameter and role of all that is trained, in the order of the names."""
    named = [(qualified_name(name), p) for name, p in module.named_parameters() if p.requires_grad]
    for name, parameter in sorted(named, key=lambda item: item[0]):
        own = module.parameter_role(name) if isinstance(module, BaseArchitecture) else default_role(module, name)
        yield name, parameter, own


def _group(parameters: list[nn.Parameter], weight_decay: float, lr_scale: float) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if lr_scale == 1.0 else {**group, "lr_scale": lr_scale}
