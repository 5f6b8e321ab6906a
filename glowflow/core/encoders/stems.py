"""Stems: from pixels or mel frames to the first tokens, with their positions and which of them are valid.

Media of a micro-batch are padded to one size. What lies behind the valid size of an item is zero for every layer, as
if the item were alone, so that padding never changes a valid token. There are no norms over a batch.

Legend: N items, C channels, H height, W width, F frames, M mel channels, S tokens, D width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.encoders.positions import grid_positions, line_positions
from glowflow.core.layers.norm import LayerNorm

__all__ = ["AudioConvolutions", "AudioPatches", "ImageConvolutions", "ImagePatches", "Stem"]

_EPS = 1e-6


class Stem(nn.Module):
    """Base of the stems: ``stem(features, sizes) -> (x_nsd, valid_ns)``, the valid tokens of each item in front."""

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, S, D) in reading order, and which are valid, (N, S) bool: the first ones.

        Args:
            features: (N, C, H, W) or (N, F, M).
            sizes: (N, 2) or (N, 1), at least 1.
        """
        raise NotImplementedError


class ImagePatches(Stem):
    """Square patches and one projection of each (arXiv:2010.11929); at the edges patches are filled with zeros."""

    def __init__(self, in_channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Linear(in_channels * patch * patch, dim)

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        x_nchw = features * _inside(sizes, features.shape[2], features.shape[3])
        patch = self.patch
        x_nchw = F.pad(x_nchw, (0, -x_nchw.shape[3] % patch, 0, -x_nchw.shape[2] % patch))
        cells = x_nchw.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (N, C, rows, patch, columns, patch)
        tokens = self.projection(cells.permute(0, 2, 4, 1, 3, 5).flatten(3))
        return _in_front(tokens, _ceil_div(sizes, patch))


class ImageConvolutions(Stem):
    """Convolutions of 3 x 3 with stride 2, each with a norm over the channels and GELU, then a projection."""

    def __init__(self, in_channels: int, channels: list[int], dim: int) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(LayerNorm(width, _EPS) for width in channels)
        self.projection = nn.Linear(channels[-1], dim)

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        # With the channels last in memory their norm is one pass.
        x_nchw = features.contiguous(memory_format=torch.channels_last)
        x_nchw = x_nchw * _inside(sizes, *x_nchw.shape[2:])
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x_nhwc = F.gelu(norm(convolution(x_nchw).permute(0, 2, 3, 1)))
            x_nchw, sizes = x_nhwc.permute(0, 3, 1, 2), _ceil_div(sizes, 2)
            x_nchw = x_nchw * _inside(sizes, *x_nchw.shape[2:])
        return _in_front(self.projection(x_nchw.permute(0, 2, 3, 1)), sizes)


class AudioPatches(Stem):
    """``patch`` frames at a time and one projection of them; the last patch is filled with zeros."""

    def __init__(self, in_channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Linear(in_channels * patch, dim)

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        x_nfm = features * _below(sizes[:, 0], features.shape[1]).unsqueeze(-1)
        x_nfm = F.pad(x_nfm, (0, 0, 0, -x_nfm.shape[1] % self.patch))
        x_nsd = self.projection(x_nfm.unflatten(1, (-1, self.patch)).flatten(2))
        return _on_line(x_nsd, _ceil_div(sizes[:, 0], self.patch))


class AudioConvolutions(Stem):
    """Convolutions over time of 3 frames, each but the first with stride 2, with norm and GELU (arXiv:2212.04356)."""

    def __init__(self, in_channels: int, channels: list[int], dim: int) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride=2 if layer else 1, padding=1)
            for layer, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(LayerNorm(width, _EPS) for width in channels)
        self.projection = nn.Linear(channels[-1], dim)

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        lengths_n = sizes[:, 0]
        x_nfm = features * _below(lengths_n, features.shape[1]).unsqueeze(-1)
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x_nfm = F.gelu(norm(convolution(x_nfm.transpose(1, 2)).transpose(1, 2)))
            lengths_n = _ceil_div(lengths_n, 2) if layer else lengths_n
            x_nfm = x_nfm * _below(lengths_n, x_nfm.shape[1]).unsqueeze(-1)
        return _on_line(self.projection(x_nfm), lengths_n)


def _ceil_div(sizes: Tensor, step: int) -> Tensor:
    return (sizes + (step - 1)) // step


def _below(lengths_n: Tensor, length: int) -> Tensor:
    """(N, length) bool: what lies inside each item."""
    return torch.arange(length, device=lengths_n.device) < lengths_n[:, None]


def _inside(sizes: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, H, W) bool: the valid rectangle at the upper left."""
    rows_nh, columns_nw = _below(sizes[:, 0], height), _below(sizes[:, 1], width)
    return (rows_nh[:, :, None] & columns_nw[:, None, :]).unsqueeze(1)


def _on_line(x_nsd: Tensor, lengths_n: Tensor) -> tuple[Tensor, Tensor]:
    """With positions, and which tokens are valid."""
    return x_nsd + line_positions(x_nsd.shape[1], x_nsd.shape[2], like=x_nsd), _below(lengths_n, x_nsd.shape[1])


def _in_front(x_nrcd: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A grid (N, R, C, D) with positions as a line of tokens, in which each item's own grid comes first, row by row.

    Args:
        sizes: (N, 2) valid rows and columns.
    """
    rows, columns, dim = x_nrcd.shape[1:]
    x_nsd = x_nrcd.flatten(1, 2) + grid_positions(rows, columns, dim, like=x_nrcd)
    place_s = torch.arange(rows * columns, device=sizes.device)
    own_n1 = sizes[:, 1:]
    source_ns = (place_s // own_n1 * columns + place_s % own_n1).clamp(max=rows * columns - 1)
    tokens_nsd = x_nsd.gather(1, source_ns.unsqueeze(-1).expand(-1, -1, dim))
    return tokens_nsd, place_s < sizes.prod(1, keepdim=True)
