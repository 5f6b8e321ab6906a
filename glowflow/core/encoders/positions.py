"""Positions of patches and frames: sines and cosines, which need no table and hold for any size.

Legend: R rows, C columns, T positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grid_positions", "line_positions"]

_BASE = 10_000.0


def line_positions(length: int, dim: int, like: Tensor) -> Tensor:
    """(T, D): sines of the lower channels and cosines of the upper ones (arXiv:1706.03762, section 3.5).

    Args:
        like: gives device and dtype.
    """
    return _waves(torch.arange(length, device=like.device), dim).to(like.dtype)


def grid_positions(rows: int, columns: int, dim: int, like: Tensor) -> Tensor:
    """(R * C, D): the first half of the channels tells the row, the second the column (arXiv:2111.06377).

    Rows and columns are counted from the upper left corner in patches, whatever the size of the picture.
    """
    half = dim // 2
    row_rd = _waves(torch.arange(rows, device=like.device), half)
    column_cd = _waves(torch.arange(columns, device=like.device), dim - half)
    row_rcd = row_rd[:, None].expand(-1, columns, -1)
    column_rcd = column_cd[None].expand(rows, -1, -1)
    return torch.cat((row_rcd, column_rcd), dim=-1).flatten(0, 1).to(like.dtype)


def _waves(positions_t: Tensor, dim: int) -> Tensor:
    """(T, dim) float64 in [-1, 1]; an odd last channel is 0."""
    half = dim // 2
    each = _BASE ** -(torch.arange(half, device=positions_t.device, dtype=torch.float64) / max(1, half))
    angles_td = positions_t.to(torch.float64)[:, None] * each
    return torch.nn.functional.pad(torch.cat((angles_td.sin(), angles_td.cos()), dim=-1), (0, dim - 2 * half))
