"""What a fusion is: from text and encoded media to hidden states, in one pass and while decoding.

One contract for all: a fusion has the weights that are its own, is handed the trunk (embedding, blocks, norm of the
text decoder) and the media of the micro-batch, and says how they go through the blocks. It must call every block and
every module of its own in every pass, in the same order, whatever media the batch has: ranks that part ways would pair
the wrong collectives. The media of a batch are those of all modalities that the model reads, blanks among them.

Legend: B rows, T positions, D width, L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.architectures.base import InitSpec
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch
from glowflow.core.encoders.encoder import init_by_fan_in
from glowflow.core.fusion.media import Media

__all__ = ["Fused", "Fusion", "MediaCache", "Trunk"]


class Trunk(Protocol):
    """What a fusion asks of the text decoder."""

    config: MultimodalConfig
    blocks: nn.ModuleList
    norm: nn.Module

    def vectors(self, tokens_bt: Tensor) -> Tensor:
        """(B, T, D) of the token embedding."""

    def dropped(self, x_btd: Tensor) -> Tensor:
        """With the dropout of the embedding."""

    def context_of(self, x_btd: Tensor, batch: Batch | None, cache: DecodeCache | None = None) -> AttentionContext:
        """Masks, positions and kernels of a pass over T positions, those of the batch or the cache's next ones."""

    def softmax_spec(self, layer: int) -> AttentionSpec:
        """What a layer of softmax attention computes."""

    def run(self, x_btd: Tensor, context: AttentionContext) -> Fused:
        """Through all blocks and the last norm."""


@dataclass
class Fused:
    """What comes out of a fusion.

    Args:
        hidden: (B, T, D) after the last norm.
        balances: what the blocks gave back: (B,) each, or None.
        pooled: (B, D) what a sample's class is read from; None: the hidden state at its readout.
        media: (B, D) the media of each row alone (contrastive).
    """

    hidden: Tensor
    balances: list[Tensor | None] = field(default_factory=list)
    pooled: Tensor | None = None
    media: Tensor | None = None


@dataclass
class MediaCache(DecodeCache):
    """A decoding cache that knows the media of its rows.

    Args:
        rows: what a fusion keeps of the media, by name, one row each.
        extra: positions that layers hold before those of the text.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    extra: list[int] = field(default_factory=list)

    def nbytes(self) -> int:
        return super().nbytes() + sum(tensor.nbytes for tensor in self.rows.values())

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.rows = {name: tensor[rows] for name, tensor in self.rows.items()}

    def cut(self, length: int) -> bool:
        before = self.extra or [0] * len(self.layers)
        if not all(layer.cut(length + extra) for layer, extra in zip(self.layers, before, strict=True)):
            return False
        self.length = length
        return True


class Fusion(nn.Module, ABC):
    """Base of all fusions.

    Args:
        config: ``model`` of the experiment.
    """

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.config = config

    def build_block(self, layer: int) -> nn.Module | None:
        """The trunk's block of this layer, where the fusion wants one of its own sort. Default: the decoder's."""
        return None

    def extra_positions(self, layer: int) -> int:
        """Positions of the trunk's layer that hold no text."""
        return 0

    @abstractmethod
    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        """Text and media of a whole micro-batch."""

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        """Put into the cache's ``rows`` what decoding needs of the media. Default: nothing."""
        return

    @abstractmethod
    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        """(B, T, D) hidden states of the next tokens, which go into the cache."""

    def units(self, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        """Shard units of trunk and fusion in order of execution. Default: the trunk's blocks."""
        return list(blocks)

    def parameters_per_token(self) -> int:
        """Parameters of the fusion that every token of text is multiplied with. Default: none."""
        return 0

    def init_spec(self, name: str) -> InitSpec:
        """How the parameter with this name inside the fusion starts. Default: see ``init_by_fan_in``."""
        return init_by_fan_in(self, name, 2 * self.config.depth)
