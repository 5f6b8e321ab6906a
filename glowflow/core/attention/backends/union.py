"""One softmax over two sets of keys, each in the arrangement that suits it: the nearest in tiles, the far by residues.

In: queries, and two parts, each keys and values folded into many small problems. Out: what one softmax over all keys
gives. torch's fused kernel computes each part, and the log-sum-exps weigh the parts' outputs; backward the same kernel
gets the output and the log-sum-exp of the whole, which makes its weights those of the one softmax (as ring attention
does, arXiv:2310.01889). Nothing of size (T, S) is kept.

Legend: B batch, N groups of a folding, H heads, K key/value heads, T queries, D head width; t queries and s keys of one
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glowflow.core.attention.tiles import Folding

__all__ = ["Arrangement", "Part", "softmax_over_both"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Arrangement:
    """How the queries lie before the keys of one part, and which of them they see.

    Args:
        folding: of the queries.
        bias: (B N, 1 or H, t, s) additive mask; None: causal, with as many keys as queries.
    """

    folding: Folding
    bias: Tensor | None

    def attend(self, q_nhtd: Tensor, k_nksd: Tensor, v_nksd: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(B N, H, t, D), and (B N, H, t, 1) the log of the sum of exponentiated scores: -inf where no key is seen."""
        causal = self.bias is None
        y, lse = _forward(q_nhtd, k_nksd, v_nksd, 0.0, causal, attn_mask=self.bias, scale=scale)
        if self.bias is not None:  # the kernel gives a blind query 0, as if it had seen a key
            lse = lse.masked_fill(self.bias.amax(-1) == float("-inf"), float("-inf"))
        return y, lse[..., None]

    def gradients(self, qkv: Sequence[Tensor], whole: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, keys and values, from gradient, output and log-sum-exp of the whole, (B, H, T, D or 1) each."""
        grad, y, lse = (self.folding.fold(x) for x in whole)
        causal = self.bias is None
        gradients: tuple[Tensor, Tensor, Tensor] = _backward(
            grad, *qkv, y, lse.squeeze(-1), 0.0, causal, attn_mask=self.bias, scale=scale
        )
        return gradients


class Part(NamedTuple):
    """One set of keys: (B N, K, s, D) keys and values in their arrangement."""

    arrangement: Arrangement
    k_nksd: Tensor
    v_nksd: Tensor


def softmax_over_both(q_bhtd: Tensor, parts: tuple[Part, Part], scale: float) -> Tensor:
    """(B, H, T, D): each query weighs the values of both parts by one softmax; a blind query gets zeros.

    The parts must not show a query the same key twice. No dropout, no second derivative; on the CPU alone.
    """
    tensors = [x for part in parts for x in (part.arrangement.folding.fold(q_bhtd), part.k_nksd, part.v_nksd)]
    arrangements = [part.arrangement for part in parts]
    y_bhtd: Tensor = _Union.apply(q_bhtd.shape[0], scale, arrangements, *tensors)
    return y_bhtd


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: int, scale: float, arrangements: list[Arrangement], *tensors: Tensor) -> Tensor:
        outputs, logs = [], []
        for index, arrangement in enumerate(arrangements):
            q, k, v = tensors[3 * index : 3 * index + 3]
            y_nhtd, lse_nht1 = arrangement.attend(q, k, v, scale)
            outputs.append(arrangement.folding.unfold(y_nhtd, batch))
            logs.append(arrangement.folding.unfold(lse_nht1, batch))
        lse_bht1 = torch.logaddexp(*logs)
        lse_bht1 = lse_bht1.masked_fill(lse_bht1 == float("-inf"), 0.0)  # of blind queries: exp(-inf - 0) is 0
        near, far = (y * torch.exp(log - lse_bht1) for y, log in zip(outputs, logs, strict=True))
        y_bhtd = (near + far).to(outputs[0].dtype)
        ctx.scale, ctx.arrangements = scale, arrangements
        ctx.save_for_backward(y_bhtd, lse_bht1, *tensors)
        return y_bhtd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_bhtd, lse_bht1, *tensors = ctx.saved_tensors
        results: list[Tensor | None] = [None, None, None]
        for index, arrangement in enumerate(ctx.arrangements):
            qkv = tensors[3 * index : 3 * index + 3]
            results += arrangement.gradients(qkv, (grads[0], y_bhtd, lse_bht1), ctx.scale)
        return tuple(results)
