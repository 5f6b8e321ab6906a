"""The sequence of one sample: tokens with the places of its media, targets and weights.

A row [bos] prompt text [eos] has one token per placeholder; each becomes as many places as its medium takes, all with
that token. What is predicted follows from the task:

- language modelling: the next token, with the weight of what it is; of the places of a medium only the first is a
  target. Nothing up to the end of the prompt is one.
- classification: the class of the sample, at its last position.
- contrastive: nothing in particular; the last position carries the weight of the pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.config.media import MODALITIES
from glowflow.data.samples.view import MediaView

__all__ = ["KINDS", "Place", "Sequencer"]

KINDS = ("text", *MODALITIES)
"""Kinds of targets, in the order in which they are counted."""


@dataclass(frozen=True)
class Place:
    """Where a medium stands in a sequence."""

    modality: str
    number: int  # which of the sample's media of this modality
    position: int
    slots: int  # places that it takes, as far as the sequence goes; 0: none in the sequence itself


@dataclass(frozen=True)
class Sequencer:
    """Makes sequences.

    Args:
        view: what the model sees.
        context: longest sequence.
        media_tokens: modality -> id of its placeholder, -1: there is none.
    """

    view: MediaView
    context: int
    media_tokens: Mapping[str, int]

    @property
    def limit(self) -> int:
        """Tokens of a sample that count: with language modelling one more than positions, the last target."""
        return self.context + (self.view.task == "language_modelling")

    def length(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of sequences of so many tokens, places of media included, once they are cut."""
        cut = np.minimum(tokens, self.limit)
        return np.maximum(1, cut - 1) if self.view.task == "language_modelling" else cut

    def expand(
        self, tokens: NDArray[Any], num_prompt: int, slots: Mapping[str, Sequence[int]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int8], int]:
        """Tokens of a row with all places, cut to ``limit``.

        Args:
            tokens: (n,) of the row. num_prompt: how many of them are begin marker and prompt.
            slots: by modality, the places of each of its media.

        Returns:
            tokens (m,); kind of each as a target (m,), an index of ``KINDS`` or -1 for none; number of positions that
            are begin marker and prompt.
        """
        widths, kinds = np.ones(len(tokens), np.int64), np.zeros(len(tokens), np.int8)
        for kind, name in enumerate(KINDS[1:], 1):
            where = np.flatnonzero(tokens == self.media_tokens[name])
            kinds[where] = kind
            if len(where):
                widths[where] = slots[name]
        kinds[: 1 if self.view.prompt_loss else max(1, num_prompt)] = -1
        starts = np.cumsum(widths) - widths
        expanded = np.repeat(tokens.astype(np.int32), widths)
        of_target = np.full(len(expanded), -1, np.int8)
        of_target[starts] = kinds
        return expanded[: self.limit], of_target[: self.limit], int(widths[:num_prompt].sum())

    def places(self, tokens: NDArray[Any], slots: Mapping[str, Sequence[int]], length: int) -> list[Place]:
        """The media of a row that begin inside its first ``length`` positions, in the order of the row."""
        widths, found = np.ones(len(tokens), np.int64), []
        for name in self.view.modalities:
            where = np.flatnonzero(tokens == self.media_tokens[name])
            if len(where):
                widths[where] = slots[name]
            found += [(int(index), name, number) for number, index in enumerate(where)]
        starts = np.cumsum(widths) - widths
        places = []
        for index, name, number in sorted(found):
            position = int(starts[index])
            if position < length:
                count = min(int(widths[index]), length - position) if self.view.places else 0
                places.append(Place(name, number, position, count))
        return places

    def counts(self, kinds: NDArray[np.int8]) -> NDArray[np.int64]:
        """(3,) targets of each kind, from those of ``expand``."""
        return np.bincount(kinds[kinds >= 0], minlength=len(KINDS)).astype(np.int64)

    def weights(self) -> NDArray[np.float64]:
        """(3,) the weight of a target of each kind; of other tasks than language modelling, the first alone."""
        if self.view.task != "language_modelling":
            return np.array([1.0, 0.0, 0.0])
        return np.array([getattr(self.view.loss_weights, kind) for kind in KINDS])

    def targets(
        self, expanded: NDArray[np.int32], kinds: NDArray[np.int8], label: int, paired: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Tokens, targets and weights of a sequence, (L,) each.

        Args:
            expanded, kinds: from ``expand``.
            label: index of the class; -1: none.
            paired: the sample has a medium to be contrasted with.
        """
        if self.view.task == "language_modelling":
            if len(expanded) == 1:
                return expanded, np.zeros(1, np.int32), np.zeros(1, np.float32)
            weights = np.append(self.weights(), 0.0)[kinds[1:]].astype(np.float32)
            return expanded[:-1], np.where(weights > 0, expanded[1:], 0).astype(np.int32), weights
        targets, weights = np.zeros(len(expanded), np.int32), np.zeros(len(expanded), np.float32)
        if self.view.task == "classification" and label >= 0:
            targets[-1], weights[-1] = label, 1.0
        elif self.view.task == "contrastive" and paired:
            weights[-1] = 1.0
        return expanded, targets, weights
