"""A linear layer whose matrix is several, one above the other: one product where they all read the same input."""

from __future__ import annotations

from torch import nn

__all__ = ["StackedLinear"]


class StackedLinear(nn.Linear):
    """``weight`` holds the rows of one matrix after the other; optimisers that look at whole matrices cut it there.

    Args:
        in_features: width of the input.
        rows: outputs of each matrix, in order.
        bias: whether a bias of all outputs is added.
    """

    def __init__(self, in_features: int, rows: tuple[int, ...], bias: bool = True) -> None:
        super().__init__(in_features, sum(rows), bias=bias)
        self.stacked_rows = rows
