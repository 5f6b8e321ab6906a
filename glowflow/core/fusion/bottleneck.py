"""``bottleneck``: a transformer per modality; they exchange a few tokens z and nothing else (MBT, arXiv:2107.00135).

Each modality m has a stream of bidirectional blocks over its own tokens, text the decoder's causal blocks. From block
``from_layer`` on, with B bottleneck tokens z:

    [x_m'; z_m] = Block_m([x_m; z])          every stream m of media
    z'          = mean over the streams of z_m

In classification text is a stream as the others: it is causal and sees z, z sees all of the text, and z_text counts in
the mean. What the class is read from is the mean of the text's state at the last position and, of each stream of
media, the normalised mean of its tokens. In language modelling z must not see the text, or a position would see the
tokens that it predicts: z' comes from the media alone, and then

    [.; y'] = Block([z'; y])                 causal, so that y sees z' and z' does not see y.

All media of a row count from its first position on, wherever they stand; those of a row without any are the vector of
a missing medium. Attention must be dense: windows and patterns would hide z, which stands before the text, and a
recurrent state would mix it with what comes after.

Legend: B rows, T positions, Z bottleneck tokens, L tokens of a row's media, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch
from glowflow.core.encoders.blocks import EncoderBlock
from glowflow.core.fusion.base import Fused, Fusion, MediaCache, Trunk
from glowflow.core.fusion.media import Media, masked_mean
from glowflow.core.layers.norm import build_norm

__all__ = ["Bottleneck"]


@dataclass
class _Open(Visibility):
    """Causal, but for the first ``first`` positions: every query sees them, and with ``reading`` they see every key."""

    first: int = 0
    reading: bool = False

    @property
    def everywhere(self) -> bool:
        return False

    def _compute(self, spec: AttentionSpec) -> Tensor:
        place = torch.arange(self.num_keys, device=self.device)
        query_t1, key_1s = place[:, None], place[None, :]
        mask_b1ts = super()._compute(spec) | ((key_1s < self.first) & (key_1s <= query_t1))
        if self.reading:
            assert self.key_valid is not None
            mask_b1ts = mask_b1ts | ((query_t1 < self.first) & self.key_valid[:, None, None, :])
        return mask_b1ts


class Bottleneck(Fusion):
    """See the module."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        self.from_layer, self.reads_text = config.bottleneck.from_layer, config.task == "classification"
        self.tokens = nn.Parameter(torch.empty(config.bottleneck.tokens, config.dim))
        self.streams = nn.ModuleDict(
            {
                name: nn.ModuleList(EncoderBlock(config.dim, config.heads, config.dropout) for _ in range(config.depth))
                for name in config.modalities
            }
        )
        named = config.modalities if self.reads_text else ()
        self.norms = nn.ModuleDict(
            {name: build_norm(config.norm, config.dim, config.norm_eps, config.bias is True) for name in named}
        )

    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        y_btd = trunk.dropped(trunk.vectors(batch.tokens))
        near = trunk.context_of(y_btd, batch) if self.from_layer else None
        far = self._far_context(trunk, y_btd, batch)
        streams, z_bzd, balances = _Streams(self, media), self._tokens(y_btd), []
        for layer, block in enumerate(trunk.blocks):
            if layer < self.from_layer:
                streams.alone(layer)
                y_btd, balance_b = block(y_btd, near)
            else:
                z_bzd, y_btd, balance_b = self._exchange(layer, block, streams, z_bzd, y_btd, far)
            balances.append(balance_b)
        hidden = trunk.norm(y_btd)
        return Fused(hidden, balances, self._pooled(hidden, batch, streams) if self.reads_text else None)

    def _tokens(self, like: Tensor) -> Tensor:
        return self.tokens.to(like.dtype).expand(like.shape[0], -1, -1)

    def _exchange(
        self, layer: int, block: nn.Module, streams: _Streams, z_bzd: Tensor, y_btd: Tensor, far: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block of every stream: the new bottleneck tokens, the text, and the block's balance loss."""
        found, count = streams.together(layer, z_bzd), z_bzd.shape[1]
        if not self.reads_text:
            z_bzd = _mean(found)
        both_bsd, balance_b = block(torch.cat((z_bzd.to(y_btd.dtype), y_btd), dim=1), far)
        if self.reads_text:
            z_bzd = _mean([*found, both_bsd[:, :count]])
        return z_bzd, both_bsd[:, count:], balance_b

    def _far_context(self, trunk: Trunk, y_btd: Tensor, batch: Batch) -> AttentionContext:
        """Of a pass over [z; text]."""
        count = self.config.bottleneck.tokens
        both_bsd = torch.cat((y_btd[:, :1].expand(-1, count, -1), y_btd), dim=1)
        context = trunk.context_of(both_bsd, batch)
        if batch.single_document and not self.reads_text:
            return context
        length, device = both_bsd.shape[1], y_btd.device
        visibility = _Open(length, length, device, first=count, reading=self.reads_text)
        visibility.key_valid = torch.arange(length, device=device) - count <= _readout(batch)[:, None]
        if not batch.single_document:
            visibility.documents = F.pad(batch.document_ids, (count, 0), value=-1)
        # A kernel that takes any mask: named ones may know causal masks alone.
        backend = "auto" if self.config.attention.softcap is None else "reference"
        conditions = replace(context.conditions, padding=True)
        opened = replace(context, visibility=visibility, conditions=conditions, backend=backend, _chosen={})
        for layer in range(self.config.depth):
            opened.kernel(trunk.softmax_spec(layer))  # chosen here, because choosing logs
        return opened

    def _pooled(self, hidden_btd: Tensor, batch: Batch, streams: _Streams) -> Tensor:
        index_b11 = _readout(batch)[:, None, None].expand(-1, 1, hidden_btd.shape[-1])
        return _mean([hidden_btd.gather(1, index_b11).squeeze(1), *streams.pooled(self.norms)])

    def extra_positions(self, layer: int) -> int:
        return self.config.bottleneck.tokens if layer >= self.from_layer else 0

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        streams, z_bzd = _Streams(self, media), self._tokens(media[0].rows().tokens)
        for layer in range(self.config.depth):
            if layer < self.from_layer:
                streams.alone(layer)
            else:
                z_bzd = _mean(streams.together(layer, z_bzd))
                cache.rows[f"tokens.{layer}"] = z_bzd

    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        y_btd = trunk.dropped(trunk.vectors(tokens_bt))
        count = self.config.bottleneck.tokens if not cache.length else 0  # of z, which goes in before the prompt
        before = self.config.bottleneck.tokens - count
        shifted = DecodeCache(cache.layers, cache.max_length + count + before, cache.length + before)
        near = trunk.context_of(y_btd, None, cache) if self.from_layer else None
        far = trunk.context_of(torch.cat((y_btd[:, :1].expand(-1, count, -1), y_btd), dim=1), None, shifted)
        for layer, block in enumerate(trunk.blocks):
            if layer < self.from_layer:
                y_btd, _ = block(y_btd, near)
            else:
                z_bzd = cache.rows[f"tokens.{layer}"][:, :count].to(y_btd.dtype)
                both_bsd, _ = block(torch.cat((z_bzd, y_btd), dim=1), far)
                y_btd = both_bsd[:, count:]
        hidden: Tensor = trunk.norm(y_btd)
        return hidden

    def units(self, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        streams: list[nn.ModuleList] = [stream for stream in self.streams.values() if isinstance(stream, nn.ModuleList)]
        return [unit for layer, block in enumerate(blocks) for unit in (*(s[layer] for s in streams), block)]


class _Streams:
    """The streams of media on their way through the layers.

    Args:
        fusion: has their blocks.
    """

    def __init__(self, fusion: Bottleneck, media: Sequence[Media]) -> None:
        self.fusion = fusion
        rows = {one.name: one.rows() for one in media}
        self.tokens = {name: line.tokens for name, line in rows.items()}
        self.valid = {name: line.valid for name, line in rows.items()}

    def _block(self, name: str, layer: int) -> nn.Module:
        stream = self.fusion.streams[name]
        assert isinstance(stream, nn.ModuleList)
        return stream[layer]

    def alone(self, layer: int) -> None:
        """A block of each, which see only themselves."""
        for name in self.tokens:
            self.tokens[name] = self._block(name, layer)(self.tokens[name], self.valid[name])

    def together(self, layer: int, z_bzd: Tensor) -> list[Tensor]:
        """A block of each with the bottleneck tokens behind; what each makes of them, (B, Z, D)."""
        found = []
        for name, x_bld in self.tokens.items():
            valid_bs = torch.cat((self.valid[name], self.valid[name].new_ones(z_bzd.shape[:2])), dim=1)
            both_bsd = self._block(name, layer)(torch.cat((x_bld, z_bzd.to(x_bld.dtype)), dim=1), valid_bs)
            self.tokens[name] = both_bsd[:, : x_bld.shape[1]]
            found.append(both_bsd[:, x_bld.shape[1] :])
        return found

    def pooled(self, norms: nn.ModuleDict) -> list[Tensor]:
        """(B, D) of each."""
        return [norms[name](masked_mean(x_bld, self.valid[name])) for name, x_bld in self.tokens.items()]


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].dtype) for part in parts]).mean(0)


def _readout(batch: Batch) -> Tensor:
    """(B,) last position of each row."""
    if batch.readout is not None:
        return batch.readout
    return torch.full_like(batch.sample_ids, batch.tokens.shape[1] - 1)
