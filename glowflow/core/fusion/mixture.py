"""``mixture``: one sequence, in which each modality has its own weights and all share attention (arXiv:2411.04996).

Tokens of media take the places of their placeholders, as in ``prefix``. In a block, with m(t) the modality of
position t:

    q_t, k_t, v_t = W^m(t)_qkv norm^m(t)(x_t)
    a = Attention(q, k, v)                           over the whole sequence, causal
    x_t = x_t + W^m(t)_out a_t
    x_t = x_t + FFN^m(t)(norm'^m(t)(x_t))

Each position goes through the weights of one modality, so that a token costs what it costs in the plain decoder. With
equal weights for all modalities it is the plain decoder. What acts between the two projections of attention is shared:
norms of queries and keys, and of linear attention its decays, gates and convolutions; so are embedding, last norm and
head. The weights of text have the plain decoder's names.

Legend: B rows, T positions, K positions sorted by modality (B * T), D width, N channels of q, k and v together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.architectures.decoder import DecoderBlock
from glowflow.core.attention.build import build_attention
from glowflow.core.attention.layer import AttentionContext, SelfAttention
from glowflow.core.batch import Batch
from glowflow.core.fusion.base import Fused, Fusion, MediaCache, Trunk
from glowflow.core.fusion.media import Media
from glowflow.core.fusion.places import keep_places, place, place_kept
from glowflow.core.layers.stacked import StackedLinear

__all__ = ["Mixture", "MixtureBlock", "Routes"]


@dataclass
class Routes:
    """Which positions are whose. Not a tensor, so that mixed-precision wrappers leave it alone.

    Args:
        rows, length: B and T.
        counts: positions of text and of each modality; they add up to B * T.
        order: (K,) int64 flat positions b * T + t, those of text first; None: they lie in order.
    """

    rows: int
    length: int
    counts: list[int]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        self._back: Tensor | None = None
        if self.order is not None:
            numbers = torch.arange(len(self.order), device=self.order.device)
            self._back = torch.empty_like(numbers).scatter_(0, self.order, numbers)

    def sort(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (K, D), by modality."""
        x_kd = x_btd.flatten(0, 1)
        return x_kd if self.order is None else x_kd.index_select(0, self.order)

    def restore(self, x_kd: Tensor) -> Tensor:
        """(K, D) -> (B, T, D), as in the sequence."""
        x_kd = x_kd if self._back is None else x_kd.index_select(0, self._back)
        return x_kd.view(self.rows, self.length, -1)

    def split(self, x_kd: Tensor) -> tuple[Tensor, ...]:
        """The parts of text and of each modality."""
        return x_kd.split(self.counts)


class _Projections(nn.Module):
    """What of attention is a modality's own, of the same shapes as in ``attention``."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        qkv, out = attention.qkv, attention.out
        assert isinstance(qkv, StackedLinear) and isinstance(out, nn.Linear)
        self.qkv = StackedLinear(qkv.in_features, qkv.stacked_rows, bias=qkv.bias is not None)
        self.out = nn.Linear(out.in_features, out.out_features, bias=out.bias is not None)


class MixtureBlock(DecoderBlock):
    """A block whose weights, and those of its ``twins``, serve one modality each.

    Args:
        config: ``model`` of the experiment.
        layer: index of the block, from 0.
    """

    def __init__(self, config: MultimodalConfig, layer: int) -> None:
        super().__init__(config, layer, build_attention(config, layer))
        # Twins are never called, only their parts: they hold the weights under the same names.
        self.twins = nn.ModuleDict(
            {name: DecoderBlock(config, layer, _Projections(self.attention)) for name in config.modalities}
        )

    def forward(  # type: ignore[override]
        self, x_kd: Tensor, context: AttentionContext, routes: Routes
    ) -> Tensor:
        """(K, D) sorted by modality -> (K, D); ``context`` is that of the sequence."""
        pre = self.placement != "post"
        y_kd = self._each(routes, x_kd, "attention_norm") if pre else x_kd
        read_kd = self._attention(y_kd, context, routes)
        if self.placement == "sandwich":
            read_kd = self._each(routes, read_kd, "attention_out_norm")
        if self.parallel:
            return x_kd + self._drop(read_kd) + self._drop(self._fed(routes, y_kd))
        x_kd = x_kd + self._drop(read_kd)
        x_kd = x_kd if pre else self._each(routes, x_kd, "attention_norm")
        x_kd = x_kd + self._drop(self._fed(routes, self._each(routes, x_kd, "feed_forward_norm") if pre else x_kd))
        return x_kd if pre else self._each(routes, x_kd, "feed_forward_norm")

    def _each(self, routes: Routes, x_kd: Tensor, part: str) -> Tensor:
        """Every position through its own modality's ``part`` of the block."""
        owners: list[nn.Module] = [self, *self.twins.values()]
        pairs = zip(owners, routes.split(x_kd), strict=True)
        return torch.cat([owner.get_submodule(part)(x_part) for owner, x_part in pairs])

    def _fed(self, routes: Routes, y_kd: Tensor) -> Tensor:
        y_kd = self._each(routes, y_kd, "feed_forward")
        return self._each(routes, y_kd, "feed_forward_out_norm") if self.placement == "sandwich" else y_kd

    def _attention(self, y_kd: Tensor, context: AttentionContext, routes: Routes) -> Tensor:
        attention: Any = self.attention
        qkv_btn = routes.restore(self._each(routes, y_kd, "attention.qkv"))
        y_btd = None if isinstance(attention, SelfAttention) else routes.restore(y_kd)
        read_btn = attention.between(qkv_btn, y_btd, context)
        return self._each(routes, routes.sort(read_btn), "attention.out")


class Mixture(Fusion):
    """See the module; its weights are in the trunk's blocks."""

    def build_block(self, layer: int) -> nn.Module:
        return MixtureBlock(self.config, layer)

    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        x_btd = trunk.dropped(place(trunk.vectors(batch.tokens), media))
        return Fused(_through(trunk, x_btd, trunk.context_of(x_btd, batch), _routes(batch, media)))

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        keep_places(cache, media)

    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        x_btd, kind_bt = place_kept(trunk.vectors(tokens_bt), cache)
        x_btd = trunk.dropped(x_btd)
        routes = _routes_of_kinds(kind_bt, tokens_bt.shape[0], tokens_bt.shape[1], len(self.config.modalities))
        return _through(trunk, x_btd, trunk.context_of(x_btd, None, cache), routes)


def _through(trunk: Trunk, x_btd: Tensor, context: AttentionContext, routes: Routes) -> Tensor:
    """Through all blocks, sorted by modality all the way, and the last norm."""
    x_kd = routes.sort(x_btd)
    for block in trunk.blocks:
        x_kd = block(x_kd, context, routes)
    hidden: Tensor = trunk.norm(routes.restore(x_kd))
    return hidden


def _routes(batch: Batch, media: Sequence[Media]) -> Routes:
    """Of a batch: its host knows how many positions each modality has."""
    rows, length = batch.tokens.shape
    slots = [one.batch.slot_index for one in media]
    counts = [len(index) for index in slots]
    if not any(counts):
        return Routes(rows, length, [rows * length, *counts])
    assert batch.text_index is not None
    assert len(batch.text_index) + sum(counts) == rows * length
    return Routes(rows, length, [len(batch.text_index), *counts], torch.cat((batch.text_index, *slots)))


def _routes_of_kinds(kind_bt: Tensor | None, rows: int, length: int, modalities: int) -> Routes:
    """While decoding: looked up, since only a prompt has media."""
    if kind_bt is None:
        return Routes(rows, length, [rows * length] + [0] * modalities)
    index = [(kind_bt.flatten() == kind).nonzero().squeeze(1) for kind in range(modalities + 1)]
    return Routes(rows, length, [len(part) for part in index], torch.cat(index))
