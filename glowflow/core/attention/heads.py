"""What every softmax attention layer does between its two projections: heads, positions, memory, kernel.

Legend: B batch, T new positions, S positions seen, H heads, K key/value heads, W head width, N all channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glowflow.core.attention.cache import FullKV, RingKV
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.layers.norm import RMSNorm
from glowflow.core.layers.rotary import RotaryTables, rotate, split_rotate

if TYPE_CHECKING:
    from glowflow.core.attention.layer import AttentionContext

__all__ = ["attend", "new_kv_cache", "split_heads"]


def split_heads(
    qkv_btn: Tensor,
    spec: AttentionSpec,
    tables: RotaryTables | None,
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, N) -> q (B, H, T, W), k and v (B, K, T, W), normalised and turned where norms and tables are given."""
    heads, kv_heads = spec.heads, spec.kv_heads
    if tables is not None and (q_norm is None or k_norm is None):
        return split_rotate(qkv_btn, heads, kv_heads, tables)
    q_bthw, k_btkw, v_btkw = qkv_btn.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    if q_norm is not None and k_norm is not None:
        q_bthw, k_btkw = q_norm(q_bthw), k_norm(k_btkw)
    if tables is not None:
        q_bthw, k_btkw = rotate(q_bthw, tables), rotate(k_btkw, tables)
    q_bthw, k_btkw = q_bthw.to(v_btkw.dtype), k_btkw.to(v_btkw.dtype)
    return q_bthw.transpose(1, 2), k_btkw.transpose(1, 2), v_btkw.transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    context: AttentionContext,
    memory: FullKV | RingKV | None,
    training: bool,
) -> Tensor:
    """(B, H, T, W) by the kernel of this pass, over what ``memory`` holds and what is new."""
    visibility = context.visibility
    if memory is not None and context.cache is not None:
        start, new = context.cache.length, q.shape[2]
        held = memory.update(k, v, start)
        if start or new == 1:  # a prompt sees itself alone: an ordinary pass, whatever the memory keeps of it
            k, v, positions = held
            visibility = Visibility(new, k.shape[2], q.device)
            if positions is not None:
                visibility.query_positions = torch.arange(start, start + new, device=q.device)
                visibility.key_positions = positions
    return context.kernel(spec).run(q, k, v, spec, visibility, training)


def new_kv_cache(
    spec: AttentionSpec, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
) -> FullKV | RingKV:
    """An empty memory of keys and values: a ring where a window is all that is seen."""
    if spec.kind == "windowed" and spec.window is not None and spec.window + spec.sinks < max_length:
        return RingKV(batch_size, spec.kv_heads, spec.window, spec.sinks, spec.head_dim, device, dtype)
    return FullKV(batch_size, spec.kv_heads, max_length, spec.head_dim, device, dtype)
