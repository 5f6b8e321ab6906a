"""One sample as the model gets it, in numpy: what the plan prepares, Ray tasks carry and ``collate`` joins to batches.

Legend: L positions, H height, W width, C channels, F frames, M mel channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PreparedItem", "PreparedSample", "blank_sample"]


@dataclass
class PreparedItem:
    """A medium of a sample."""

    modality: str
    features: NDArray[Any]  # uint8 (H, W, C) pixels or float32 (F, M) log-mel frames
    position: int  # of its placeholder, or of its first place
    slots: int  # places that it takes in the sequence, fewer where the sequence was cut; 0: the model places none
    present: bool = True  # False: left out or bad; then the features are blank, and the places are there all the same


@dataclass
class PreparedSample:
    """A sequence and its media. Where ``weights`` is 0, ``targets`` is 0 too."""

    tokens: NDArray[np.int32]  # (L,) L >= 1; places of a medium hold the token of its modality
    targets: NDArray[np.int32]  # (L,) the next token; with classification the class at the last position
    weights: NDArray[np.float32]  # (L,)
    sample_id: int  # index of the sequence in the run; -1: past the end of the data
    document_id: int
    label: int = -1  # index of its class; -1: none
    name: str = ""  # where it comes from
    group: str = ""  # what it belongs to together with others; "": nothing
    bad: str = ""  # "kind: reason" of a sample that cannot be used: then all weights are 0
    num_prompt: int = 1  # leading positions that are begin marker and prompt
    items: list[PreparedItem] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [self.tokens, self.targets, self.weights, *(item.features for item in self.items)]
        return sum(array.nbytes for array in arrays)


def blank_sample() -> PreparedSample:
    """What fills a row past the end of the data, so that every rank takes every step."""
    zeros = np.zeros(1, np.int32)
    return PreparedSample(zeros, zeros, np.zeros(1, np.float32), -1, -1)
