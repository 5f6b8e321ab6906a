"""``late``: towers of their own for text and media, which meet at the head.

    m_k = norm_k(mean of the tokens of modality k in the row)          k = 1 .. M
    h_t = h_t + W_2 gelu(W_1 [h_t; m_1; ...; m_M] + b_1) + b_2

with h_t the text decoder's hidden state. A classifier reads h at the sample's last position; a model of language
scores the next token with it. For the task ``contrastive`` (arXiv:2103.00020) the towers stay apart, and nothing is
added: text is the decoder's state at the last position, media are m. Fusion of whole towers is what the multi-modal
benchmarks compare with (arXiv:2107.07502).

All media of a row count from its first position on, wherever they stand. A row without media of a modality has the
vector of a missing medium in their place. Every kind of attention works in the text tower.

Legend: B rows, T positions, D width, M modalities, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.batch import Batch
from glowflow.core.fusion.base import Fused, Fusion, MediaCache, Trunk
from glowflow.core.fusion.media import Media, masked_mean
from glowflow.core.layers.norm import build_norm

__all__ = ["Late"]


class Late(Fusion):
    """See the module."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        dim, parts = config.dim, len(config.modalities)
        self.norms = nn.ModuleDict(
            {name: build_norm(config.norm, dim, config.norm_eps, config.bias is True) for name in config.modalities}
        )
        self.apart = config.task == "contrastive"
        if not self.apart:
            hidden = config.late.hidden or dim
            self.up = nn.Linear((1 + parts) * dim, hidden)
            self.down = nn.Linear(hidden, dim)

    def fuse(self, trunk: Trunk, batch: Batch, media: Sequence[Media]) -> Fused:
        x_btd = trunk.dropped(trunk.vectors(batch.tokens))
        fused = trunk.run(x_btd, trunk.context_of(x_btd, batch))
        media_bn = self._media(media)
        if self.apart:
            fused.media = media_bn
        else:
            fused.hidden = self._together(fused.hidden, media_bn)
        return fused

    def _media(self, media: Sequence[Media]) -> Tensor:
        """(B, M * D)."""
        pooled = []
        for one in media:
            rows = one.rows()
            pooled.append(self.norms[one.name](masked_mean(rows.tokens, rows.valid)))
        return torch.cat(pooled, dim=-1)

    def _together(self, hidden_btd: Tensor, media_bn: Tensor) -> Tensor:
        """``[h; m] W^T`` in two parts, since m is the same at all positions."""
        dim = hidden_btd.shape[-1]
        of_text_btf = F.linear(hidden_btd, self.up.weight[:, :dim])
        of_media_bf = F.linear(media_bn, self.up.weight[:, dim:], self.up.bias)
        active_btf = F.gelu(of_text_btf + of_media_bf.unsqueeze(1))
        if self.config.dropout:
            active_btf = F.dropout(active_btf, self.config.dropout, self.training)
        output: Tensor = hidden_btd + self.down(active_btf)
        return output

    def open(self, trunk: Trunk, cache: MediaCache, media: Sequence[Media]) -> None:
        cache.rows["media"] = self._media(media)

    def step(self, trunk: Trunk, tokens_bt: Tensor, cache: MediaCache) -> Tensor:
        x_btd = trunk.dropped(trunk.vectors(tokens_bt))
        fused = trunk.run(x_btd, trunk.context_of(x_btd, None, cache))
        return self._together(fused.hidden, cache.rows["media"])

    def parameters_per_token(self) -> int:
        return 0 if self.apart else self.config.dim * self.up.out_features + self.down.weight.numel()
