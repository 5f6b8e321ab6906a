"""The output head: scores of the next token and their loss, without ever holding all scores at once.

The loss of a large batch goes through the vocabulary chunk by chunk of positions. Each chunk's gradient is computed
while its scores are at hand, so that nothing of size (B*T, V) is kept and nothing is computed twice.

Legend: N positions (B*T), C positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.differentiation import is_twice_differentiable

__all__ = ["OutputHead", "chunked_loss", "plain_loss"]

CHUNK_ELEMENTS = 2**22
"""Scores held at once: 16 MiB in fp32."""


class OutputHead(nn.Module):
    """Projection from width to vocabulary.

    Args:
        dim: width D.
        vocab_size: vocabulary V.
        tied_to: the token embedding whose (V, D) matrix is used; None: a matrix of its own.
        softcap: scores s become softcap * tanh(s / softcap) (arXiv:2408.00118); None: they stay as they are.
        multiplier: factor on the scores before the cap; 1 over the width ratio under maximal-update parametrisation.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        tied_to: nn.Embedding | None = None,
        softcap: float | None = None,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.softcap, self.multiplier = softcap, multiplier
        # In a tuple the embedding is no submodule: its matrix is listed, sharded and saved once, and to_empty or
        # fully_shard may replace it without breaking the tie.
        self._tied_to = () if tied_to is None else (tied_to,)
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if tied_to is None else None

    @property
    def matrix(self) -> Tensor:
        """(V, D), the tied embedding's or its own."""
        return self._tied_to[0].weight if self._tied_to else self.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return _capped(F.linear(self._scaled(hidden), self.matrix), self.softcap)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states whose product with the matrix is the scores before the cap."""
        return hidden if self.multiplier == 1.0 else hidden * self.multiplier

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the negative log-likelihoods in nats, and the sum of the weights.

        Args:
            hidden: (B, T, D). targets: (B, T) int64. weights: (B, T), 0 where a position does not count.

        Returns:
            Two fp32 scalars (fp64 for fp64 models).
        """
        hidden_nd, targets_n, weights_n = self._scaled(hidden.flatten(0, -2)), targets.flatten(), weights.flatten()
        matrix_vd = self.matrix
        if hidden_nd.shape[0] * matrix_vd.shape[0] <= CHUNK_ELEMENTS or is_twice_differentiable():
            loss_sum = plain_loss(hidden_nd, matrix_vd, targets_n, weights_n, self.softcap)
        else:
            loss_sum = chunked_loss(hidden_nd, matrix_vd, targets_n, weights_n, self.softcap)
        return loss_sum, weights_n.sum()

    @torch.no_grad()
    def sample(self, hidden: Tensor, draws: Tensor) -> Tensor:
        """Tokens drawn from the model's own distribution, chunk by chunk as in the loss.

        Args:
            hidden: (B, T, D). draws: (B, T), uniform in [0, 1): where on the cumulated probabilities each token lies.

        Returns:
            (B, T) int64.
        """
        hidden_nd, matrix_vd, draws_n = self._scaled(hidden.flatten(0, -2)), self.matrix, draws.flatten()
        tokens_n = torch.empty_like(draws_n, dtype=torch.int64)
        for part in _chunks(hidden_nd.shape[0], matrix_vd.shape[0]):
            scores_cv = F.linear(hidden_nd[part], matrix_vd)
            scores_cv = _capped(scores_cv.to(_accumulator(scores_cv)), self.softcap)
            cumulated_cv = scores_cv.softmax(dim=-1).cumsum(dim=-1)
            # Times the last sum, which is 1 but for rounding; what rounds up to it lies in the last token.
            wanted_c1 = draws_n[part, None].to(cumulated_cv.dtype) * cumulated_cv[:, -1:]
            tokens_c1 = torch.searchsorted(cumulated_cv, wanted_c1, right=True)
            tokens_n[part] = tokens_c1.squeeze(1).clamp_(max=matrix_vd.shape[0] - 1)
        return tokens_n.view_as(draws)


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Rows whose scores are held at once, part by part."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(scores / softcap)``; its derivative is 1 - (capped / softcap)^2."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def plain_loss(
    hidden_nd: Tensor, matrix_vd: Tensor, targets_n: Tensor, weights_n: Tensor, softcap: float | None = None
) -> Tensor:
    """The loss sum with all scores at once."""
    scores_nv = F.linear(hidden_nd, matrix_vd)
    if scores_nv.dtype in (torch.float16, torch.bfloat16):
        scores_nv = scores_nv.float()
    nll_n = F.cross_entropy(_capped(scores_nv, softcap), targets_n, reduction="none")
    return (nll_n * weights_n).sum()


def chunked_loss(
    hidden_nd: Tensor, matrix_vd: Tensor, targets_n: Tensor, weights_n: Tensor, softcap: float | None = None
) -> Tensor:
    """The loss sum, chunk by chunk; differentiable once, in ``hidden_nd`` and ``matrix_vd``."""
    device = hidden_nd.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_nd, matrix_vd = hidden_nd.to(dtype), matrix_vd.to(dtype)
    loss_sum: Tensor = _ChunkedLoss.apply(hidden_nd, matrix_vd, targets_n, weights_n, softcap)
    return loss_sum


class _ChunkedLoss(torch.autograd.Function):
    """Scores and their gradient in one go: d loss / d scores = weight * (softmax - onehot(target)), and the cap's."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, matrix_vd: Tensor, targets_n: Tensor, weights_n: Tensor, softcap: float | None
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden_nd) if ctx.needs_input_grad[0] else None
        grad_matrix = torch.zeros_like(matrix_vd, dtype=_accumulator(matrix_vd)) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden_nd.device.type, enabled=False):
            loss_sum = _loss_and_gradients(
                hidden_nd, matrix_vd, targets_n, weights_n, softcap, grad_hidden, grad_matrix
            )
        ctx.save_for_backward(grad_hidden, grad_matrix)
        ctx.dtypes = hidden_nd.dtype, matrix_vd.dtype
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # In fp32: a loss scale can be larger than fp16 holds.
        grad_hidden, grad_matrix = (
            None if part is None else (part.to(_accumulator(part)) * grad).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden, grad_matrix, None, None, None


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _loss_and_gradients(
    hidden_nd: Tensor,
    matrix_vd: Tensor,
    targets_n: Tensor,
    weights_n: Tensor,
    softcap: float | None,
    grad_hidden: Tensor | None,
    grad_matrix: Tensor | None,
) -> Tensor:
    """The loss sum; fills the two gradients that are not None."""
    precision = _accumulator(hidden_nd)
    loss_sum = torch.zeros((), dtype=precision, device=hidden_nd.device)
    for part in _chunks(hidden_nd.shape[0], matrix_vd.shape[0]):
        hidden_cd, targets_c1, weights_c1 = hidden_nd[part], targets_n[part, None], weights_n[part, None].to(precision)
        scores_cv = _capped(F.linear(hidden_cd, matrix_vd).to(precision), softcap)
        log_probs_cv = scores_cv.log_softmax(dim=-1)
        loss_sum -= (log_probs_cv.gather(1, targets_c1) * weights_c1).sum()
        if grad_hidden is None and grad_matrix is None:
            continue
        scores_grad_cv = log_probs_cv.exp_().mul_(weights_c1)
        scores_grad_cv = scores_grad_cv.scatter_add_(1, targets_c1, -weights_c1)
        if softcap is not None:
            scores_grad_cv.mul_(1 - (scores_cv / softcap).square_())
        scores_grad_cv = scores_grad_cv.to(hidden_nd.dtype)
        if grad_hidden is not None:
            grad_hidden[part] = scores_grad_cv @ matrix_vd
        if grad_matrix is not None:
            grad_matrix += scores_grad_cv.T @ hidden_cd
    return loss_sum
