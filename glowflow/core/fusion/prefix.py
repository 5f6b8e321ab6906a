"""``prefix``: tokens of media take the places of their placeholders, in one causal stream.

    x = [E(w_1), ..., v_1, ..., v_S, E(w_k), ...]

as in LLaVA (arXiv:2304.08485), or with the encoder ``linear`` in Fuyu. Media may stand anywhere in the text and in any
number; what comes after sees them, as it sees the text. Every kind of attention works inside; windows and patterns
count the tokens of media as positions.

Legend: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from glowflow.core.batch import Batch
from glowflow.core.fusion.base import Fused, Fusion, MediaCache, Trunk
from glowflow.core.fusion.media import Media
from glowflow.core.fusion.places import keep_places, place, place_kept

__all__ = ["Prefix"]


class Prefix(Fusion):
    """See the module; it has no weights of its own. A model without encoders is one too, and a plain decoder."""

    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        x_btd = trunk.dropped(place(trunk.vectors(batch.tokens), media))
        return trunk.run(x_btd, trunk.context_of(x_btd, batch))

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        keep_places(cache, media)

    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        x_btd, _ = place_kept(trunk.vectors(tokens_bt), cache)
        x_btd = trunk.dropped(x_btd)
        return trunk.run(x_btd, trunk.context_of(x_btd, None, cache)).hidden
