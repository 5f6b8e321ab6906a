"""A dropless mixture of experts in place of one feed-forward (arXiv:2401.06066, routing of arXiv:2412.19437).

Each token has an affinity s = sigmoid(W x) to every expert and goes through the ``active`` ones with the largest;
their outputs are added with gates that sum to 1. Tokens are sorted by expert, every expert takes its own run of them,
however long, and the results are put back: no token is dropped and no shape depends on the routing, so that nothing
waits for the device. The experts' matrices are stacked: one that no token came to has a gradient of zero.

Legend: B batch, T positions, N tokens (B*T), E experts, K active, P pairs of token and expert (N*K), D width,
F hidden width.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import MoeConfig
from glowflow.core.layers.feed_forward import ACTIVATIONS, build_feed_forward, gated

__all__ = ["MixtureOfExperts", "balance_loss", "grouped_linear"]

logger = logging.getLogger(__name__)


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones that every token goes through.

    Args:
        dim: width D.
        hidden_dim: hidden width F of one expert.
        ffn: as ``model.ffn``.
        config: the section ``model.moe``.
    """

    def __init__(self, dim: int, hidden_dim: int, ffn: str, config: MoeConfig) -> None:
        super().__init__()
        self.active, self.balance = config.active, config.balance
        self.activation, self.gated = ACTIVATIONS[ffn], ffn.endswith("glu")
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.up = ExpertLinear(config.experts, dim, (hidden_dim, hidden_dim) if self.gated else (hidden_dim,))
        self.down = ExpertLinear(config.experts, hidden_dim, (dim,))
        # Several shared experts are one wider feed-forward: their outputs are added.
        self.shared = build_feed_forward(dim, config.shared * hidden_dim, ffn) if config.shared else None

    def forward(self, x_btd: Tensor, valid_bt: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Route, compute, combine.

        Args:
            x_btd: (B, T, D).
            valid_bt: (B, T) bool, False for padding, which does not count for the balance; None: no padding.

        Returns:
            (B, T, D), and the weighted balance loss of each sequence (B,), None where no gradients are recorded.
        """
        x_nd = x_btd.flatten(0, 1)
        affinity_ne = self._affinity(x_nd)
        chosen_nk = affinity_ne.detach().topk(self.active, dim=-1).indices
        y_nd = self._routed(x_nd, chosen_nk, self._gates(affinity_ne, chosen_nk))
        if self.shared is not None:
            y_nd = y_nd + self.shared(x_nd)
        balance_b = None
        if self.balance and torch.is_grad_enabled():
            rows = x_btd.shape[:2]
            balance_b = self.balance * balance_loss(affinity_ne.view(*rows, -1), chosen_nk.view(*rows, -1), valid_bt)
        return y_nd.view_as(x_btd), balance_b

    def num_idle_parameters(self) -> int:
        """Parameters of the routed experts that a token does not go through."""
        stacked = self.up.weight.numel() + self.down.weight.numel()
        return stacked * (self.router.out_features - self.active) // self.router.out_features

    def _affinity(self, x_nd: Tensor) -> Tensor:
        """(N, E), in fp32 at least: a rounded affinity would change the choice of experts."""
        precise = torch.promote_types(x_nd.dtype, torch.float32)
        with torch.autocast(x_nd.device.type, enabled=False):
            return F.linear(x_nd.to(precise), self.router.weight.to(precise)).sigmoid()

    def _gates(self, affinity_ne: Tensor, chosen_nk: Tensor) -> Tensor:
        """(N, K) weights of the chosen experts; they sum to 1."""
        gates_nk = affinity_ne.gather(1, chosen_nk)
        if self.active == 1:
            # A lone gate of 1 would tell the router nothing about the loss (arXiv:2101.03961).
            return gates_nk
        return gates_nk / gates_nk.sum(-1, keepdim=True)

    def _routed(self, x_nd: Tensor, chosen_nk: Tensor, gates_nk: Tensor) -> Tensor:
        order_p = chosen_nk.flatten().argsort(stable=True)  # pairs, those of expert 0 first
        place_p = torch.empty_like(order_p)
        place_p[order_p] = torch.arange(order_p.numel(), device=order_p.device)
        counts_e = torch.zeros(self.router.out_features, dtype=torch.int32, device=order_p.device)
        counts_e.scatter_add_(0, chosen_nk.flatten(), torch.ones_like(chosen_nk.flatten(), dtype=torch.int32))
        ends_e = counts_e.cumsum(0, dtype=torch.int32)
        hidden_pf = self.up(_take(x_nd, order_p // self.active, place_p, self.active), ends_e)
        hidden_pf = gated(hidden_pf, self.activation) if self.gated else self.activation.value(hidden_pf)
        y_nkd = _take(self.down(hidden_pf, ends_e), place_p, order_p).view(*chosen_nk.shape, -1)
        return (y_nkd * gates_nk.to(y_nkd.dtype).unsqueeze(-1)).sum(1)


class ExpertLinear(nn.Module):
    """One matrix per expert, stacked: ``weight`` (E, out, in); ``rows`` as in ``StackedLinear``."""

    def __init__(self, experts: int, in_features: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.stacked_rows = rows
        self.weight = nn.Parameter(torch.empty(experts, sum(rows), in_features))

    def forward(self, x_pi: Tensor, ends_e: Tensor) -> Tensor:
        """Rows sorted by expert times their expert's matrix, (P, in) -> (P, out); ``ends_e`` as `grouped_linear`."""
        return grouped_linear(x_pi, self.weight, ends_e)


def balance_loss(affinity_bte: Tensor, chosen_btk: Tensor, valid_bt: Tensor | None = None) -> Tensor:
    """The balance loss of each sequence (arXiv:2412.19437, eq. 17 to 20 without its weight), (B,).

    sum_i f_i P_i with f_i = E / (K T) x how many tokens chose expert i, and P_i the mean over the T tokens of
    s_i / sum_j s_j. It is 1 where every expert is chosen equally often and nears E / K where always the same ones are.
    """
    experts, active = affinity_bte.shape[-1], chosen_btk.shape[-1]
    share_bte = affinity_bte / affinity_bte.sum(-1, keepdim=True)
    picked_bte = torch.zeros_like(share_bte).scatter_(-1, chosen_btk, 1.0)
    if valid_bt is None:
        return experts / active * (picked_bte.mean(1) * share_bte.mean(1)).sum(-1)
    weight_bt1 = valid_bt.to(share_bte.dtype).unsqueeze(-1)
    tokens_b1 = weight_bt1.sum(1).clamp(min=1)
    chosen_be, mean_be = (picked_bte * weight_bt1).sum(1) / tokens_b1, (share_bte * weight_bt1).sum(1) / tokens_b1
    return experts / active * (chosen_be * mean_be).sum(-1)


def _take(x: Tensor, forward_index: Tensor, backward_index: Tensor, copies: int = 1) -> Tensor:
    """Rows of ``x`` in another order, each ``copies`` times; the gradient is gathered too, without atomic additions."""
    taken: Tensor = _Take.apply(x, forward_index, backward_index, copies)
    return taken


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_index: Tensor, backward_index: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(backward_index)
        ctx.copies = copies
        return x.index_select(0, forward_index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (backward_index,) = ctx.saved_tensors
        grad = grad.index_select(0, backward_index)
        return (grad.view(-1, ctx.copies, grad.shape[-1]).sum(1) if ctx.copies > 1 else grad), None, None, None


def grouped_linear(x_pi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """Each run of rows times its own matrix.

    Args:
        x_pi: (P, in), rows in runs.
        weight_eoi: (E, out, in).
        ends_e: (E,) int32, where each run ends; the last is P.

    Returns:
        (P, out).
    """
    device = x_pi.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_pi, weight_eoi = x_pi.to(dtype), weight_eoi.to(dtype)
    loop = _no_kernel(device, x_pi.dtype, *weight_eoi.shape[1:])
    y_po: Tensor = (_expert_loop if loop else _GroupedProduct.apply)(x_pi, weight_eoi, ends_e)
    return y_po


@lru_cache(maxsize=256)
def _no_kernel(device: str, dtype: torch.dtype, out_features: int, in_features: int) -> str:
    """Why torch's grouped product cannot serve, empty when it can; logged once where it matters."""
    if device != "cuda":
        return "it is for CUDA"
    reason = ""
    if not hasattr(torch, "_grouped_mm"):
        reason = "this torch has none"
    elif dtype != torch.bfloat16:
        reason = f"it computes in bfloat16, not {dtype}"
    elif out_features % 8 or in_features % 8:
        reason = f"its rows must be multiples of 16 bytes, these are {out_features} and {in_features} numbers long"
    if reason:
        logger.warning("experts one by one, which waits for the device: no grouped matrix product (%s)", reason)
    return reason


class _GroupedProduct(torch.autograd.Function):
    """torch's kernel; its own gradient leaves what was in memory for empty runs on some GPUs (pytorch#172439)."""

    @staticmethod
    def forward(ctx: Any, x_pi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_pi, weight_eoi, ends_e)
        return torch._grouped_mm(x_pi, weight_eoi.transpose(1, 2), offs=ends_e)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_po: Tensor) -> tuple[Tensor, Tensor, None]:
        x_pi, weight_eoi, ends_e = ctx.saved_tensors
        grad_po = grad_po.contiguous()
        grad_weight = torch._grouped_mm(grad_po.transpose(0, 1), x_pi, offs=ends_e)
        empty_e = ends_e.diff(prepend=ends_e.new_zeros(1)) == 0
        grad_weight.masked_fill_(empty_e[:, None, None], 0.0)
        return torch._grouped_mm(grad_po, weight_eoi, offs=ends_e), grad_weight, None


# An operator of its own, so that neither the memory estimate (fake tensors) nor torch.compile looks into the loop,
# whose slices depend on the data.
@torch.library.custom_op("glowflow::expert_loop", mutates_args=())
def _expert_loop(x_pi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    y_po = x_pi.new_empty(x_pi.shape[0], weight_eoi.shape[1])
    for rows, matrix_oi in zip(_runs(ends_e), weight_eoi, strict=True):
        torch.mm(x_pi[rows], matrix_oi.T, out=y_po[rows])
    return y_po


@_expert_loop.register_fake
def _(x_pi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    return x_pi.new_empty(x_pi.shape[0], weight_eoi.shape[1])


@torch.library.custom_op("glowflow::expert_loop_weight_gradient", mutates_args=())
def _weight_gradient(grad_po: Tensor, x_pi: Tensor, ends_e: Tensor) -> Tensor:
    grad_eoi = x_pi.new_empty(ends_e.shape[0], grad_po.shape[1], x_pi.shape[1])
    for rows, matrix_oi in zip(_runs(ends_e), grad_eoi, strict=True):
        torch.mm(grad_po[rows].T, x_pi[rows], out=matrix_oi)  # zeros where the run is empty
    return grad_eoi


@_weight_gradient.register_fake
def _(grad_po: Tensor, x_pi: Tensor, ends_e: Tensor) -> Tensor:
    return x_pi.new_empty(ends_e.shape[0], grad_po.shape[1], x_pi.shape[1])


def _runs(ends_e: Tensor) -> list[slice]:
    ends = ends_e.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loop_backward(ctx: Any, grad_po: Tensor) -> tuple[Tensor, Tensor, None]:
    x_pi, weight_eoi, ends_e = ctx.saved_tensors
    grad_po = grad_po.contiguous()
    grad_x = _expert_loop(grad_po, weight_eoi.transpose(1, 2), ends_e)
    return grad_x, _weight_gradient(grad_po, x_pi, ends_e), None


_expert_loop.register_autograd(_loop_backward, setup_context=_keep_inputs)
