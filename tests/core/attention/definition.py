"""Attention as the papers say it, in plain Python numbers and row by row: what all kernels are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec, SparsePattern

CPU = torch.device("cpu")
MATRIX = ((1, 0, 0, 0, 0), (0, 1, 0, 0, 1), (1, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 1, 0, 0, 1))
BLOCKS = tuple(tuple(bool(cell) for cell in row) for row in MATRIX)

PATTERNS: dict[str, AttentionSpec] = {
    "dense": AttentionSpec(),
    "windowed": AttentionSpec(kind="windowed", window=5),
    "windowed-1": AttentionSpec(kind="windowed", window=1),
    "sinks": AttentionSpec(kind="windowed", window=4, sinks=3),
    "strided": AttentionSpec(kind="sparse", sparse=SparsePattern("strided", local=5, stride=7)),
    "strided-local": AttentionSpec(kind="sparse", sparse=SparsePattern("strided", local=9, stride=6)),
    "fixed": AttentionSpec(kind="sparse", sparse=SparsePattern("fixed", local=3, stride=7)),
    "fixed-1": AttentionSpec(kind="sparse", sparse=SparsePattern("fixed", local=1, stride=5)),
    "local_global": AttentionSpec(kind="sparse", sparse=SparsePattern("local_global", local=5, global_tokens=3)),
    "blocks": AttentionSpec(kind="sparse", sparse=SparsePattern("blocks", block_size=5, blocks=BLOCKS)),
    "blocks-small": AttentionSpec(kind="sparse", sparse=SparsePattern("blocks", block_size=3, blocks=BLOCKS)),
}
"""Small rules of every kind and pattern."""


def sees(spec: AttentionSpec, query: int, key: int) -> bool:
    """Whether the query at one position sees the key at another: the rule in words of the config's reference."""
    if spec.causal and key > query:
        return False
    gap = query - key if query >= key else key - query
    if spec.kind == "windowed":
        assert spec.window is not None
        return gap < spec.window or key < spec.sinks
    if spec.sparse is None:
        return True
    sparse = spec.sparse
    if sparse.pattern == "blocks":
        row, column = query // sparse.block_size, key // sparse.block_size
        while row >= len(sparse.blocks):  # the last row, shifted along the diagonal
            row, column = row - 1, column - 1
        return 0 <= column < len(sparse.blocks) and sparse.blocks[row][column]
    if gap < sparse.local:
        return True
    if sparse.pattern == "strided":
        return gap % sparse.stride == 0
    if sparse.pattern == "fixed":
        return (key + 1) % sparse.stride == 0
    return key < sparse.global_tokens or (not spec.causal and query < sparse.global_tokens)


def seen_keys(spec: AttentionSpec, visibility: Visibility, row: int, query: int) -> list[int]:
    """The keys that one query of one row of the batch sees; documents and padding count."""
    keys = [key for key in range(visibility.num_keys) if sees(spec, query, key)]
    if visibility.documents is not None:
        documents = visibility.documents[row].tolist()
        keys = [key for key in keys if documents[key] == documents[query]]
    if visibility.key_valid is not None:
        valid = visibility.key_valid[row].tolist()
        keys = [key for key in keys if valid[key]]
    return keys


def slopes(spec: AttentionSpec) -> Tensor:
    """(H, 1) ALiBi's slopes where the number of heads is a power of two; zeros without ALiBi."""
    assert spec.heads & (spec.heads - 1) == 0
    slopes = [2.0 ** (-8.0 * (head + 1) / spec.heads) if spec.alibi else 0.0 for head in range(spec.heads)]
    return torch.tensor(slopes, dtype=torch.float64)[:, None]


def definition(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility) -> Tensor:
    """One softmax per row, query and head, over the keys that the query sees."""
    start, group = k.shape[2] - q.shape[2], spec.heads // spec.kv_heads
    served = [head // group for head in range(spec.heads)]
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            keys = seen_keys(spec, visibility, b, start + t)
            gaps = torch.tensor([abs(start + t - key) for key in keys], dtype=q.dtype)
            k_hnd, v_hnd = k[b, :, keys][served], v[b, :, keys][served]
            scores_hn = (k_hnd * q[b, :, t, None]).sum(-1) * spec.softmax_scale - slopes(spec) * gaps
            rows.append((torch.softmax(scores_hn, 1)[..., None] * v_hnd).sum(1))
    return torch.stack(rows).unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def draw(spec: AttentionSpec, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values of two rows, which need gradients."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, spec.heads, queries), (2, spec.kv_heads, keys), (2, spec.kv_heads, keys)]
    drawn = [torch.randn(*s, spec.head_dim, dtype=torch.float64, generator=generator) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def see_all(queries: int, keys: int) -> Visibility:
    """Nothing but the spec's rule counts."""
    return Visibility(queries, keys, CPU)


def see_documents(queries: int, keys: int) -> Visibility:
    """Documents of some ten positions, whose borders differ between the rows."""
    starts = torch.rand(2, keys, generator=torch.Generator().manual_seed(keys)) < 0.1
    return Visibility(queries, keys, CPU, documents=starts.long().cumsum(1))


def see_padded(queries: int, keys: int) -> Visibility:
    """Padding at the left of one row, so that queries are blind, and strewn over the other."""
    valid = torch.rand(2, keys, generator=torch.Generator().manual_seed(keys)) < 0.8
    valid[0] = torch.arange(keys) >= keys // 3
    return Visibility(queries, keys, CPU, key_valid=valid)


SITUATIONS: dict[str, Callable[[int, int], Visibility]] = {
    "plain": see_all,
    "documents": see_documents,
    "padding": see_padded,
}
"""What the batch adds to the rule."""
