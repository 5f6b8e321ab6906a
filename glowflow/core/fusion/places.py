"""Tokens of media in the places of their placeholders: what ``prefix`` and ``mixture`` share.

Legend: B rows, T positions, K slots, P positions up to the last slot, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.fusion.base import MediaCache
from glowflow.core.fusion.media import Media

__all__ = ["keep_places", "place", "place_kept"]


def place(x_btd: Tensor, media: Sequence[Media]) -> Tensor:
    """The sequence with the slots overwritten."""
    flat_nd = x_btd.flatten(0, 1)
    for one in media:
        flat_nd = flat_nd.index_copy(0, one.batch.slot_index, one.in_slots().to(flat_nd.dtype))
    return flat_nd.view_as(x_btd)


def keep_places(cache: MediaCache, media: Sequence[Media]) -> None:
    """Put the tokens of media into the cache: ``placed`` (B, P, D), and in ``kind`` (B, P) whose they are.

    The batch's slots are those of rows of the cache's length. Kind 0 is text, 1 the first modality, and so on.
    """
    if not media:
        return
    slots = torch.cat([one.batch.slot_index % cache.max_length for one in media])
    length = int(slots.max()) + 1 if len(slots) else 0
    like, batch_size = media[0].tokens, len(media[0].batch.row_items)
    placed = like.new_zeros(batch_size * length, like.shape[-1])
    kind = torch.zeros(batch_size * length, dtype=torch.int64, device=like.device)
    for number, one in enumerate(media, 1):
        index = one.batch.slot_index // cache.max_length * length + one.batch.slot_index % cache.max_length
        placed = placed.index_copy(0, index, one.in_slots())
        kind = kind.index_fill(0, index, number)
    cache.rows["placed"] = placed.view(batch_size, length, like.shape[-1])
    cache.rows["kind"] = kind.view(batch_size, length)


def place_kept(x_btd: Tensor, cache: MediaCache) -> tuple[Tensor, Tensor | None]:
    """The next positions with their slots overwritten, and whose each position is, (B, T); None: all are text."""
    start, length = cache.length, x_btd.shape[1]
    placed_bpd, kind_bp = cache.rows.get("placed"), cache.rows.get("kind")
    if placed_bpd is None or kind_bp is None or start >= kind_bp.shape[1]:
        return x_btd, None
    placed_bpd, kind_bp = placed_bpd[:, start : start + length], kind_bp[:, start : start + length]
    held = kind_bp.shape[1]
    kind_bt = F.pad(kind_bp, (0, length - held))
    head_bpd = torch.where((kind_bp > 0).unsqueeze(-1), placed_bpd.to(x_btd.dtype), x_btd[:, :held])
    return torch.cat((head_bpd, x_btd[:, held:]), dim=1), kind_bt
