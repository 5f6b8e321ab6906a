"""Tokens of media as fusions take them: in the places of a sequence, or as one line per row of the batch.

Nothing is read back from the device; shapes follow from the batch's shapes alone.

Legend: N items, S tokens of each, B rows, I items of a row, L tokens of a row (I * S + 1), T positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.batch import Modality

__all__ = ["Media", "MediaRows", "joined", "masked_mean"]

_ALWAYS = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class MediaRows:
    """All tokens of media of each row, in one line.

    A token is there for the positions t of text with ``start <= t < stop``; in the whole row if ``valid``.
    """

    tokens: Tensor  # (B, L, D)
    valid: Tensor  # (B, L) bool
    start: Tensor  # (B, L) int64
    stop: Tensor  # (B, L) int64; start == stop: never

    def seen(self, first: int, last: int) -> Tensor:
        """(B, 1, T, L) bool: what the positions ``first`` .. ``last - 1`` see. Every position sees something."""
        place_t1 = torch.arange(first, last, device=self.start.device)[:, None]
        return ((self.start[:, None] <= place_t1) & (place_t1 < self.stop[:, None])).unsqueeze(1)


@dataclass(frozen=True)
class Media:
    """The media of one modality in a micro-batch, encoded.

    Args:
        name: of the modality.
        batch: where they belong.
        tokens: (N, S, D); of an item that is not present, the modality's vector of a missing one, S times.
        valid: (N, S) bool: tokens that an item has; those of one that is not present are all there.
        missing: (D,) the vector of a missing medium.
    """

    name: str
    batch: Modality
    tokens: Tensor
    valid: Tensor
    missing: Tensor

    @classmethod
    def of(cls, name: str, batch: Modality, tokens: Tensor, valid: Tensor, missing: Tensor) -> Media:
        """From what an encoder gives."""
        missing, absent = missing.to(tokens.dtype), ~batch.present
        return cls(name, batch, torch.where(absent[:, None, None], missing, tokens), valid, missing)

    def in_slots(self) -> Tensor:
        """(K, D) the tokens that take the batch's slots."""
        return self.tokens.flatten(0, 1)[self.batch.token_index]

    def rows(self, *, latest: bool = False) -> MediaRows:
        """The tokens of the present items of each row, and the missing vector where there is none.

        Position t sees the items that stand at t or before; with ``latest`` only the last of them. A position that no
        item stands before sees the missing vector, and so does the whole row if it has no item.
        """
        slots, modality = self.tokens.shape[1], self.batch
        items_bi = modality.row_items
        if not items_bi.shape[1]:
            items_bi = F.pad(items_bi, (0, 1), value=len(modality.present))
        present_bi = _with_none(modality.present, False)[items_bi]
        place_bi = torch.where(present_bi, _with_none(modality.positions, 0)[items_bi], _ALWAYS)
        end_bi = _next(place_bi) if latest else torch.full_like(place_bi, _ALWAYS)
        valid_bis = _with_none(self.valid, False)[items_bi] & present_bi.unsqueeze(-1)
        first_b1 = place_bi.amin(1, keepdim=True)
        start_bl = torch.where(valid_bis, place_bi.unsqueeze(-1), _ALWAYS).flatten(1)
        end_bl = end_bi.repeat_interleave(slots, dim=1)
        tokens_bld = torch.cat((self.tokens, torch.zeros_like(self.tokens[:1])))[items_bi].flatten(1, 2)
        missing_b1d = self.missing.expand(items_bi.shape[0], 1, -1)
        return MediaRows(
            tokens=torch.cat((tokens_bld, missing_b1d), dim=1),
            valid=torch.cat((valid_bis.flatten(1), first_b1 == _ALWAYS), dim=1),
            start=torch.cat((start_bl, torch.zeros_like(first_b1)), dim=1),
            stop=torch.cat((end_bl, first_b1), dim=1),
        )


def _with_none(of_items: Tensor, none: bool | int) -> Tensor:
    """With one more row at the end: what ``row_items`` names where there is no item."""
    return torch.cat((of_items, torch.full_like(of_items[:1], none)))


def _next(place_bi: Tensor) -> Tensor:
    """The place of the next item of the row that is present."""
    later_bi = place_bi.flip(1).cummin(1).values.flip(1)
    return torch.cat((later_bi[:, 1:], torch.full_like(later_bi[:, :1], _ALWAYS)), dim=1)


def joined(rows: list[MediaRows]) -> MediaRows:
    """The lines of several modalities, one behind the other."""
    return MediaRows(*(torch.cat(parts, dim=1) for parts in zip(*(vars(row).values() for row in rows), strict=True)))


def masked_mean(x_bld: Tensor, valid_bl: Tensor) -> Tensor:
    """(B, D) mean over the valid tokens, of which each row has one."""
    weight_bl1 = valid_bl.to(x_bld.dtype).unsqueeze(-1)
    return (x_bld * weight_bl1).sum(1) / weight_bl1.sum(1)
