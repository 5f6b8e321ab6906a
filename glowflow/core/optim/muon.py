"""Muon (Jordan, 2024; arXiv:2502.16982) for the hidden matrices, AdamW for the rest.

A matrix of so many rows and columns, with the gradient g:

    m <- mu m + (1 - mu) g
    d = mu m + (1 - mu) g        Nesterov's; else d = m
    theta <- (1 - lr wd) theta - lr 0.2 sqrt(max(rows, cols)) zeropower(d)

An orthogonal matrix has numbers of root mean square 1 / sqrt(max(rows, cols)): after the factor they are as large as
AdamW's steps are (section 2.2 of the paper), so that its learning rate and weight decay carry over. Matrices that are
stacked in one parameter (queries, keys and values; gate and up; the experts of a mixture) are orthogonalised each by
itself.

Embeddings, the output matrix and vectors follow AdamW (arXiv:1711.05101):

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    theta <- (1 - lr wd) theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from glowflow.config.optimizers import MuonConfig
from glowflow.core.optim.foreach import (
    ForeachOptimizer,
    bias_corrections,
    bunches,
    local_gradients,
    unless,
    with_gradient,
)
from glowflow.core.optim.groups import MatrixLayout, matrix_groups
from glowflow.core.optim.newton_schulz import working_dtype, zeropower
from glowflow.core.sharding import local_part, part_of, whole

__all__ = ["Muon", "adamw_update", "build_muon", "muon_update"]

_TOGETHER = 2**24  # numbers, 64 MiB in fp32: what is gathered and orthogonalised at a time


def build_muon(module: nn.Module, config: MuonConfig, lr: float) -> Muon:
    """Muon over plain or sharded (DTensor) parameters; roles say which are matrices.

    Args:
        module: whose parameters are trained.
        config: momentum, Newton-Schulz steps, weight decay, and what the AdamW part has of its own.
        lr: learning rate of the first step; schedules set it anew.
    """
    # The factor makes a step's spectral norm grow with the root of the width, which the rate has to take back.
    matrices, others = matrix_groups(module, config.weight_decay, width_exponent=0.5)
    for group in others:
        group["rule"] = "adamw"
        if config.adamw_lr_scale != 1.0:
            group["lr_scale"] = group.get("lr_scale", 1.0) * config.adamw_lr_scale
    return Muon(
        [*matrices, *others],
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        betas=config.betas,
        eps=config.eps,
    )


class Muon(ForeachOptimizer):
    """See the module; parameter groups may set every option.

    A group's ``rule`` is ``muon`` or ``adamw``. Of a Muon group ``matrices`` says how each parameter is laid out (see
    ``MatrixLayout``); left out, the last two dimensions are one matrix. State: the momentum alone in Muon groups,
    twice the parameters in AdamW's.

    Where a matrix is cut over ranks its momentum is updated shard by shard, then gathered; the matrices of a stack are
    shared out over the ranks and gathered again. Experts that lie whole on a rank stay there. Replicas (DDP) do the
    same work all.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rule: str = "muon",
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps,
            "betas": betas, "eps": eps, "rule": rule, "matrices": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: a parameter of a Muon group is no matrix.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rule"] == "muon" and group["matrices"] is None:
            if any(p.ndim < 2 for p in group["params"]):
                raise ValueError("Muon is for matrices; the others belong into a group whose rule is 'adamw'")
            group["matrices"] = [((p.shape[-2],), p.shape[-1]) for p in group["params"]]

    def update_group(self, group: dict[str, Any], grad_scale: Tensor | None, skip: Tensor | None) -> None:
        """By the group's rule; the same matrices together on every rank."""
        if group["rule"] == "adamw":
            super().update_group(group, grad_scale, skip)
            return
        layout_of = dict(zip(group["params"], group["matrices"], strict=True))
        options = {name: group[name] for name in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps")}
        for params in bunches(with_gradient(group), Tensor.numel, _TOGETHER):
            grads = local_gradients(params, grad_scale)
            momenta = [local_part(self._state(p, "momentum_buffer")) for p in params]
            muon_update(params, grads, momenta, [layout_of[p] for p in params], **options, skip=skip)

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
        group: dict[str, Any],
        skip: Tensor | None,
    ) -> None:
        """See ``adamw_update``."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw_update(params, grads, *states, **options, skip=skip)


def muon_update(
    theta: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    layouts: list[MatrixLayout],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool = True,
    ns_steps: int = 5,
    skip: Tensor | None = None,
) -> None:
    """One step in place, in the symbols of the module; ``skip`` as in ``ForeachOptimizer.update``.

    Args:
        theta: the parameters as they are, sharded or not; all ranks give the same ones in the same order.
        g, m: this rank's part of gradients and momenta.
        layouts: which matrices each parameter holds.
    """
    g = unless(skip, m, g)  # then m stays as it is
    torch._foreach_lerp_(m, g, 1.0 - momentum)
    d = list(torch._foreach_lerp(g, m, momentum)) if nesterov else m
    step = _orthogonal(d, theta, layouts, ns_steps)
    decay: float | Tensor = 1.0 - lr * weight_decay
    if skip is not None:
        decay = torch.where(skip, 1.0, decay)
        torch._foreach_mul_(step, (~skip).to(step[0].dtype))
    parts = [local_part(parameter) for parameter in theta]
    torch._foreach_mul_(parts, decay)
    torch._foreach_add_(parts, step, alpha=-lr)


def adamw_update(
    theta: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    t: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """One step in place, in the symbols of the module; ``t`` counts the steps done, ``skip`` as in ``update``."""
    beta1, beta2 = betas
    torch._foreach_lerp_(m, unless(skip, m, g), 1.0 - beta1)
    torch._foreach_lerp_(v, unless(skip, v, list(torch._foreach_mul(g, g))), 1.0 - beta2)
    keep: float | Tensor = 1.0 if skip is None else (~skip).to(t[0].dtype)
    torch._foreach_add_(t, keep)
    step = torch._foreach_div(m, bias_corrections(t, beta1, m))
    root = torch._foreach_div(v, bias_corrections(t, beta2, v))
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, eps)
    decay: float | Tensor = 1.0 - lr * weight_decay
    if skip is not None:
        torch._foreach_mul_(step, keep)
        decay = torch.where(skip, 1.0, decay)
    torch._foreach_mul_(theta, decay)
    torch._foreach_addcdiv_(theta, step, root, value=-lr)


def _orthogonal(d: list[Tensor], theta: list[Tensor], layouts: list[MatrixLayout], steps: int) -> list[Tensor]:
    """This rank's part of 0.2 sqrt(max(rows, cols)) zeropower of every matrix.

    Args:
        d: this rank's parts.
        theta: the parameters, which say how those are cut.
    """
    meshes = [_mesh_of_cut(parameter, layout) for parameter, layout in zip(theta, layouts, strict=True)]
    pieces: list[list[Tensor]] = []
    stacks: dict[tuple[DeviceMesh | None, torch.dtype, torch.Size], list[tuple[int, int]]] = {}
    for i, (part, parameter, mesh, (rows, cols)) in enumerate(zip(d, theta, meshes, layouts, strict=True)):
        part = part.to(working_dtype(part))
        full = part if mesh is None else whole(part, parameter)
        pieces.append(list(full.reshape(-1, sum(rows), cols).split(rows, dim=1)))
        for j, piece in enumerate(pieces[i]):
            stacks.setdefault((mesh, piece.dtype, piece.shape[1:]), []).append((i, j))
    for (mesh, _, shape), places in stacks.items():
        stack_nrc = _shared(torch.cat([pieces[i][j] for i, j in places]), steps, mesh)
        done = stack_nrc.to(d[places[0][0]].dtype) * (0.2 * math.sqrt(max(shape)))
        for (i, j), piece in zip(places, done.split([pieces[i][j].shape[0] for i, j in places]), strict=True):
            pieces[i][j] = piece
    step = []
    for part, parameter, mesh, stacked in zip(d, theta, meshes, pieces, strict=True):
        full = torch.cat(stacked, dim=1) if len(stacked) > 1 else stacked[0]
        step.append(full.reshape(part.shape) if mesh is None else part_of(full.reshape(parameter.shape), parameter))
    return step


def _mesh_of_cut(parameter: Tensor, layout: MatrixLayout) -> DeviceMesh | None:
    """The ranks over which a parameter's matrices are cut; None where this one has whole ones."""
    if not isinstance(parameter, DTensor):
        return None
    batch = parameter.ndim - 2 if (sum(layout[0]), layout[1]) == tuple(parameter.shape[-2:]) else 0
    if all(isinstance(placement, Shard) and placement.dim < batch for placement in parameter.placements):
        return None
    return parameter.device_mesh


def _shared(stack_nrc: Tensor, steps: int, mesh: DeviceMesh | None) -> Tensor:
    """``zeropower`` of what all ranks of the mesh have: each does its share of the matrices and gathers the others'."""
    if mesh is None:
        return zeropower(stack_nrc, steps)
    share = distribute_tensor(stack_nrc, mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
    return whole(zeropower(share.to_local(), steps), share)
