"""What attention computes, apart from how: the *kind* and its sizes, which every backend is asked about.

A spec is immutable and hashable, knows nothing of the config and of modules, and is the whole truth about one layer's
computation: two backends that are given the same spec give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AttentionSpec", "LinearSpec", "SparsePattern"]


@dataclass(frozen=True)
class SparsePattern:
    """Which keys a query of kind ``sparse`` sees, beside the nearest ``local`` ones (its own among them).

    Positions count from the start of the sequence, over documents and decoding steps. With i a query and j a key:
    ``strided``: (i - j) % stride == 0; ``fixed``: j % stride == stride - 1; ``local_global``: j < global_tokens (and
    bidirectional also i < global_tokens); ``blocks``: ``blocks[i // block_size][j // block_size]``, and nothing else
    (``local`` does not count). Block rows from n = len(blocks) on are the last row, shifted along the diagonal.
    """

    pattern: Literal["strided", "fixed", "local_global", "blocks"] = "strided"
    local: int = 16
    stride: int = 8
    global_tokens: int = 1
    block_size: int = 64
    blocks: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True)
class LinearSpec:
    """The recurrence of kind ``linear``; see ``glowflow.core.attention.linear``."""

    variant: Literal["gated", "feature_map", "retention", "gated_delta"] = "gated"
    chunk: int = 64


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's computation.

    Args:
        kind: ``dense``: every position that the mask allows; ``windowed``: the last ``window`` of them;
            ``sparse``: a pattern; ``linear``: a recurrent state.
        causal: a query sees no later key. Queries and keys are aligned at their ends (decoding with a cache). A window
            that is not causal reaches as far to the right: abs(i - j) < window.
        heads, kv_heads: query heads and key/value heads; each key/value head serves ``heads / kv_heads`` queries.
        head_dim: width of one head.
        scale: factor on the scores; None: ``head_dim ** -0.5``.
        dropout: probability of dropping an attention weight in training.
        window: keys that ``windowed`` sees, the query's own among them (i - j < window).
        sinks: first positions of the sequence that a window sees too (arXiv:2309.17453).
        softcap: scores s become softcap * tanh(s / softcap), before masks and biases other than ALiBi's
            (arXiv:2408.00118).
        alibi: subtract slope_h * (i - j) from the scores (arXiv:2108.12409); bidirectional: abs(i - j).
        relative: scores of relative positions too, of ``transformer-xl`` (arXiv:1901.02860).
        sparse: the pattern of kind ``sparse``.
        linear: the recurrence of kind ``linear``.
    """

    kind: Literal["dense", "windowed", "sparse", "linear"] = "dense"
    causal: bool = True
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    alibi: bool = False
    relative: bool = False
    sparse: SparsePattern | None = None
    linear: LinearSpec | None = None

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Widths of all queries, all keys and all values: how their projections are stacked."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def plain(self) -> bool:
        """Dense, without bias and cap: what every kernel computes."""
        return self.kind == "dense" and self.softcap is None and not self.alibi and not self.relative
