"""Short causal convolution of each channel (arXiv:2212.14052): what lets a linear layer compare neighbours.

Position t becomes sum over lags of weight[lag] * x[t - lag], with zeros before the start, before a document's start and
at padding. While decoding the last positions of what was read are the convolution's memory.

Legend: B batch, T positions, C channels, W width of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ShortConvolution", "short_convolution"]


class ShortConvolution(nn.Module):
    """``weight`` is (C, W); its last column belongs to the position itself, as in ``nn.Conv1d``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.normal_(self.weight, 0.0, self.init_std)

    @property
    def init_std(self) -> float:
        """Keeps the variance of what comes in."""
        return self.width**-0.5

    def forward(self, x_btc: Tensor, runs: Tensor | None = None, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> (B, T, C) and the new tail.

        Args:
            runs: (B, T) int64 number of the run of positions that belong together; None: all do.
            tail: (B, W - 1, C) what came before; None: zeros.
        """
        batch, _, channels = x_btc.shape
        before = x_btc.new_zeros(batch, self.width - 1, channels) if tail is None else tail.to(x_btc.dtype)
        padded = torch.cat((before, x_btc), dim=1)
        return short_convolution(padded, self.weight, runs), padded[:, padded.shape[1] - (self.width - 1) :]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"


def short_convolution(padded_bsc: Tensor, weight_cw: Tensor, runs: Tensor | None = None) -> Tensor:
    """Of (B, W - 1 + T, C), the first W - 1 positions being what came before, the T outputs."""
    width = weight_cw.shape[1]
    length = padded_bsc.shape[1] - (width - 1)
    weight_cw = weight_cw.to(padded_bsc.dtype)
    y_btc = padded_bsc[:, width - 1 :] * weight_cw[:, -1]
    for lag in range(1, width):
        shifted_btc = padded_bsc[:, width - 1 - lag :][:, :length]
        if runs is not None:
            shifted_btc = shifted_btc * _same_run(runs, lag).to(shifted_btc.dtype)
        y_btc = torch.addcmul(y_btc, shifted_btc, weight_cw[:, width - 1 - lag])
    return y_btc


def _same_run(runs_bt: Tensor, lag: int) -> Tensor:
    """(B, T, 1) whether a position and the one ``lag`` before belong together; what came before is of the first run."""
    earlier_bt = torch.cat((runs_bt[:, :1].expand(-1, lag), runs_bt), dim=1)[:, : runs_bt.shape[1]]
    return (runs_bt == earlier_bt).unsqueeze(-1)
