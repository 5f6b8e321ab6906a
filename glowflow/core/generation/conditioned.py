"""Generation from prompts with pictures and recordings: a module that knows the media of each of its texts.

``generate``, ``generate_batch`` and ``beam_search`` hand tokens to a module, and know nothing of media. What they are
given here is the module together with the media of all prompts; for each batch of texts that is read at once,
``for_texts`` makes one that knows the media of these texts, and places them in the cache when it is opened.

Legend: B texts, T positions, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.core.architectures.base import BaseArchitecture, Carry
from glowflow.core.batch import Batch, Modality, ModelOutput

__all__ = ["ConditionedModule", "with_row_length"]


class ConditionedModule(BaseArchitecture):
    """A module, and the media of the texts that it goes on from.

    Args:
        module: an architecture whose ``new_cache`` takes ``media``.
        media: gives the prompts with these numbers, with their media, as one batch on the host: row i is the i-th of
            the numbers. It is asked for one batch of texts at a time, so that not all features need be held at once.
        numbers: the texts that are read, in order; None: this module only makes others, see ``for_texts``.

    Prompt and new tokens must fit the context together: media have their places in it, so that no earlier part of a
    text can be forgotten.
    """

    head: nn.Module

    def __init__(
        self,
        module: BaseArchitecture,
        media: Callable[[Sequence[int]], Batch],
        numbers: Sequence[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.module, self.config, self.vocab_size = module, module.config, module.vocab_size
        self.training = module.training
        self._media = media
        self._numbers = None if numbers is None else list(numbers)

    def for_texts(self, numbers: Sequence[int]) -> ConditionedModule:
        """The same module with the media of the texts with these numbers, which it reads in this order."""
        return ConditionedModule(self.module, self._media, numbers)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Any:
        """An empty cache that holds the media of the texts."""
        new_cache: Any = self.module.new_cache
        if self._numbers is None:
            return new_cache(batch_size, max_length, device, dtype)
        assert batch_size == len(self._numbers)
        batch = self._media(self._numbers)
        media = {
            name: with_row_length(one, batch.tokens.shape[1], max_length).to(device)
            for name, one in batch.modalities.items()
        }
        return new_cache(batch_size, max_length, device, dtype, media=media)

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        return self.module.decode(tokens, cache, last_only=last_only)

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        """The pass over whole texts, without a cache: ``sample_ids`` say which of the texts the rows are."""
        if self._numbers is None:
            output, carry = self.module(batch, carry, compute_loss=compute_loss)
            return output, carry
        prompts = self._media([self._numbers[row] for row in batch.sample_ids.tolist()])
        (rows, length), device = batch.tokens.shape, batch.tokens.device
        media = {
            name: with_row_length(one, prompts.tokens.shape[1], length) for name, one in prompts.modalities.items()
        }
        is_text = torch.ones(rows * length, dtype=torch.bool)
        for one in media.values():
            is_text[one.slot_index] = False
        batch = replace(
            batch,
            modalities={name: one.to(device) for name, one in media.items()},
            text_index=is_text.nonzero().squeeze(1).to(device),
            readout=torch.full((rows,), length - 1, device=device),
        )
        output, carry = self.module(batch, carry, compute_loss=compute_loss)
        return output, carry

    def logits(self, hidden: Tensor) -> Tensor:
        return self.module.logits(hidden)


def with_row_length(media: Modality, length: int, new_length: int) -> Modality:
    """The same media in rows of another length; slots that lie behind the end of a row are left out.

    Args:
        media: its flat positions are those of rows of ``length``.
        new_length: T of the result.
    """
    row_k, place_k = media.slot_index // length, media.slot_index % length
    kept = place_k < new_length
    return replace(
        media,
        slot_index=(row_k * new_length + place_k)[kept],
        token_index=media.token_index[kept],
    )
