"""What attention computes, apart from how: the *kind* and its sizes, which every backend is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AttentionSpec"]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's computation.

    Args:
        kind: ``dense``: every position that the mask allows.
        causal: a query sees no later key; keys and queries are aligned at their ends (decoding with a cache).
        heads, kv_heads: query heads and key/value heads; each key/value head serves ``heads / kv_heads`` queries.
        head_dim: width of one head.
        scale: factor on the scores; None: ``head_dim ** -0.5``.
        dropout: probability of dropping an attention weight in training.
    """

    kind: Literal["dense"] = "dense"
    causal: bool = True
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    scale: float | None = None
    dropout: float = 0.0

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale
