"""Inside a chunk: (Q K^T * G) V with G_ij = exp(b_i - b_j) for the keys j that query i sees.

Only the inputs are kept for the gradients, which are those of flash attention (arXiv:2205.14135) without its softmax:
with W = G on the visible pairs, S = Q K^T and dP = dO V^T,

    dV = (S * W)^T dO,    dQ = (dP * W) K,    dK = (dP * W)^T Q,    db_i = sum_j E_ij - sum_j E_ji,  E = S * W * dP

Recomputing S and W costs no more than writing matrices over all pairs to memory and reading them back. The gradient is
made of plain operations, so it has gradients too.

Legend: B batch, H heads, N chunks, C positions of a chunk, K width of keys, V width of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["pair_weights", "within_chunks"]


def within_chunks(q_bhnck: Tensor, k_bhnck: Tensor, v_bhncv: Tensor, total: Tensor | None, visible: Tensor) -> Tensor:
    """(B, H, N, C, V): what each position gets from its own chunk; arguments as in ``pair_weights``."""
    y_bhncv: Tensor = _Within.apply(q_bhnck, k_bhnck, v_bhncv, total, visible)
    return y_bhncv


def pair_weights(total: Tensor | None, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """How much of key j reaches query i.

    Args:
        total: (B or 1, H, N, C) log-decays summed up to each position; None: nothing decays.
        visible: (C, C) or (B, 1, N, C, C) bool.

    Returns:
        Broadcastable to (B, H, N, C, C).
    """
    if total is None:
        return visible.to(dtype)
    # Masked before exp: elsewhere exponents may be positive and overflow, and inf * 0 is nan.
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(~visible, float("-inf")).exp_()


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, visible: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, total, visible)
        return (q @ k.transpose(-2, -1)).mul_(pair_weights(total, visible, q.dtype)) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        q, k, v, total, visible = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            weights = pair_weights(total, visible, q.dtype)
            flow = (grad @ v.transpose(-2, -1)) * weights
            scores = q @ k.transpose(-2, -1)
            grad_q, grad_k = flow @ k, flow.transpose(-2, -1) @ q
            grad_v = (scores * weights).transpose(-2, -1) @ grad
            grad_total = None
            if total is not None and ctx.needs_input_grad[3]:
                each = flow * scores
                grad_total = (each.sum(-1) - each.sum(-2)).sum_to_size(total.shape)
        return grad_q, grad_k, grad_v, grad_total, None
