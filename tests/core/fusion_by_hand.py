"""The fusions written a second time: one row at a time, without padding or masks of a batch, from parameters alone.

Norms are RMSNorm, positions rotary, feed-forwards SwiGLU, as the small configs of ``media_batches`` have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.core.architectures.multimodal import Multimodal
from tests.core.media_batches import MEDIA_IDS, Item, Row

Parameters = dict[str, Tensor]


class ByHand:
    """One model; ``hidden(row)`` is what its forward pass must give for a row alone, (T, D)."""

    def __init__(self, module: Multimodal) -> None:
        self.module, self.c = module, module.config
        self.p = dict(module.named_parameters())

    # -- parts --------------------------------------------------------------------------------------------------------

    def norm(self, x_td: Tensor, name: str) -> Tensor:
        return x_td * torch.rsqrt(x_td.square().mean(-1, keepdim=True) + self.c.norm_eps) * self.p[name + ".weight"]

    def layer_norm(self, x_td: Tensor, name: str) -> Tensor:
        return F.layer_norm(x_td, x_td.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"], 1e-6)

    def linear(self, x_td: Tensor, name: str) -> Tensor:
        return F.linear(x_td, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def softmax(self, q_td: Tensor, k_sd: Tensor, v_sd: Tensor, heads: int, seen_ts: Tensor) -> Tensor:
        parts = []
        for q, k, v in zip(*(x.chunk(heads, -1) for x in (q_td, k_sd, v_sd)), strict=True):
            scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~seen_ts, -torch.inf)
            parts.append(scores.softmax(-1) @ v)
        return torch.cat(parts, -1)

    def turned(self, x_td: Tensor) -> Tensor:
        """Rotary positions 0 .. T - 1, head by head."""
        width, heads = self.c.head_dim, []
        for x in x_td.split(width, -1):
            turned = torch.empty_like(x)
            for pair in range(width // 2):
                angle = torch.arange(len(x), dtype=x.dtype) * self.c.rope_theta ** (-2 * pair / width)
                a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
                turned[:, 2 * pair] = a * angle.cos() - b * angle.sin()
                turned[:, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
            heads.append(turned)
        return torch.cat(heads, -1)

    def feed(self, x_td: Tensor, name: str) -> Tensor:
        gate, up = self.linear(x_td, name + ".gate_up").chunk(2, -1)
        return self.linear(F.silu(gate) * up, name + ".down")

    def block(self, x_td: Tensor, layer: int, seen_tt: Tensor | None = None, of: list[str] | None = None) -> Tensor:
        """A block of the trunk; ``of`` names for each position whose weights it has."""
        count = len(x_td)
        seen_tt = torch.ones(count, count, dtype=torch.bool).tril() if seen_tt is None else seen_tt
        at = [f"blocks.{layer}." + ("" if one == "text" else f"twins.{one}.") for one in of or ["text"] * count]

        def each(x: Tensor, function: Any) -> Tensor:
            return torch.cat([function(x[place : place + 1], where) for place, where in enumerate(at)])

        y_td = each(x_td, lambda x, where: self.norm(x, where + "attention_norm"))
        q, k, v = each(y_td, lambda x, where: self.linear(x, where + "attention.qkv")).chunk(3, -1)
        read = self.softmax(self.turned(q), self.turned(k), v, self.c.heads, seen_tt)
        x_td = x_td + each(read, lambda x, where: self.linear(x, where + "attention.out"))
        y_td = each(x_td, lambda x, where: self.norm(x, where + "feed_forward_norm"))
        return x_td + each(y_td, lambda x, where: self.feed(x, where + "feed_forward"))

    def encoder_block(self, x_sd: Tensor, name: str, heads: int) -> Tensor:
        y_sd = self.layer_norm(x_sd, name + ".attention_norm")
        q, kv = self.linear(y_sd, name + ".attention.q"), self.linear(y_sd, name + ".attention.kv")
        everything = torch.ones(len(x_sd), len(x_sd), dtype=torch.bool)
        read = self.softmax(q, *kv.chunk(2, -1), heads, everything)
        x_sd = x_sd + self.linear(read, name + ".attention.out")
        y_sd = self.layer_norm(x_sd, name + ".feed_forward_norm")
        return x_sd + self.linear(F.gelu(self.linear(y_sd, name + ".feed_forward.up")), name + ".feed_forward.down")

    # -- media --------------------------------------------------------------------------------------------------------

    def tokens(self, item: Item) -> Tensor:
        """(S, D) of one medium alone; one that is not present is its modality's missing vector, S times."""
        encoder = self.module.get_submodule(f"{item.modality}_encoder")
        sizes = item.features.shape[1:] if item.modality == "image" else item.features.shape[:1]
        tokens, valid = encoder(item.features[None], torch.tensor([list(sizes)]))
        assert valid.all()
        return tokens[0] if item.present else encoder.missing.expand_as(tokens[0])

    def missing(self, name: str) -> Tensor:
        return self.p[f"{name}_encoder.missing"]

    def lines(self, row: Row) -> dict[str, Tensor]:
        """All tokens of the row's present media, by modality; the missing vector where there is none."""
        items = [part for part in row if isinstance(part, Item) and part.present]
        return {
            name: torch.cat(
                [self.tokens(item) for item in items if item.modality == name] or [self.missing(name)[None]]
            )
            for name in self.c.modalities
        }

    def ids(self, row: Row) -> Tensor:
        """With one placeholder per medium."""
        return torch.tensor([MEDIA_IDS[part.modality] if isinstance(part, Item) else part for part in row])

    def embedded(self, row: Row) -> tuple[Tensor, list[str]]:
        """The row with media in their places, and whose each position is."""
        parts, of = [], []
        for part in row:
            if isinstance(part, Item) and part.modality in self.c.modalities:
                parts.append(self.tokens(part))
                of += [part.modality] * len(parts[-1])
            else:
                number = MEDIA_IDS[part.modality] if isinstance(part, Item) else part
                parts.append(self.p["embedding.weight"][number][None])
                of.append("text")
        return torch.cat(parts), of

    # -- fusions ------------------------------------------------------------------------------------------------------

    def hidden(self, row: Row) -> Tensor:
        """(T, D) after the last norm."""
        hidden: Tensor = getattr(self, self.c.fusion)(row)
        return hidden

    def prefix(self, row: Row) -> Tensor:
        x_td, _ = self.embedded(row)
        for layer in range(self.c.depth):
            x_td = self.block(x_td, layer)
        return self.norm(x_td, "norm")

    def mixture(self, row: Row) -> Tensor:
        x_td, of = self.embedded(row)
        for layer in range(self.c.depth):
            x_td = self.block(x_td, layer, of=of)
        return self.norm(x_td, "norm")

    def cross_attention(self, row: Row) -> Tensor:
        y_td = self.p["embedding.weight"][self.ids(row)]
        for layer in range(self.c.depth):
            if (self.c.depth - 1 - layer) % self.c.cross_attention.every == 0:
                y_td = self.gated(y_td, row, f"fusion.layers.{layer}.")
            y_td = self.block(y_td, layer)
        return self.norm(y_td, "norm")

    def gated(self, y_td: Tensor, row: Row, at: str) -> Tensor:
        q_td = self.linear(self.norm(y_td, at + "norm"), at + "attention.q")
        read = []
        for place in range(len(row)):
            tokens_ld = self.norm(self.seen_at(row, place), at + "media_norm")
            k, v = self.linear(tokens_ld, at + "attention.kv").chunk(2, -1)
            everything = torch.ones(1, len(k), dtype=torch.bool)
            read.append(self.softmax(q_td[place : place + 1], k, v, self.c.heads, everything))
        y_td = y_td + torch.tanh(self.p[at + "attention_gate"]) * self.linear(torch.cat(read), at + "attention.out")
        fed = self.feed(self.norm(y_td, at + "feed_forward_norm"), at + "feed_forward")
        return y_td + torch.tanh(self.p[at + "feed_forward_gate"]) * fed

    def seen_at(self, row: Row, place: int) -> Tensor:
        """The tokens that cross-attention sees at a position, of all modalities."""
        found = []
        for name in self.c.modalities:
            items = [p for p in row[: place + 1] if isinstance(p, Item) and p.modality == name and p.present]
            items = items[-1:] if self.c.cross_attention.attends == "latest" else items
            found += [self.tokens(item) for item in items] or [self.missing(name)[None]]
        return torch.cat(found)

    def late(self, row: Row) -> Tensor:
        x_td = self.p["embedding.weight"][self.ids(row)]
        for layer in range(self.c.depth):
            x_td = self.block(x_td, layer)
        h_td = self.norm(x_td, "norm")
        pooled = [self.norm(line.mean(0), f"fusion.norms.{name}") for name, line in self.lines(row).items()]
        both = torch.cat([h_td, *(one.expand(len(h_td), -1) for one in pooled)], -1)
        return h_td + self.linear(F.gelu(self.linear(both, "fusion.up")), "fusion.down")

    def bottleneck(self, row: Row) -> Tensor:
        return self.bottleneck_streams(row)[0]

    def bottleneck_streams(self, row: Row) -> tuple[Tensor, Tensor]:
        """The text's hidden states, and what a class is read from, (D,); the latter makes sense in classification."""
        text, streams = self.p["embedding.weight"][self.ids(row)], self.lines(row)
        z, reads_text = self.p["fusion.tokens"], self.c.task == "classification"
        count = len(z)
        for layer in range(self.c.depth):
            if layer < self.c.bottleneck.from_layer:
                streams = {n: self.encoder_block(x, f"fusion.streams.{n}.{layer}", 4) for n, x in streams.items()}
                text = self.block(text, layer)
                continue
            found = []
            for name, x in streams.items():
                both = self.encoder_block(torch.cat((x, z)), f"fusion.streams.{name}.{layer}", 4)
                streams[name] = both[: len(x)]
                found.append(both[len(x) :])
            if not reads_text:
                z = sum(found) / len(found)
            seen = torch.ones(count + len(text), count + len(text), dtype=torch.bool).tril()
            if reads_text:
                seen[:count] = True
            both = self.block(torch.cat((z, text)), layer, seen)
            text = both[count:]
            if reads_text:
                found.append(both[:count])
                z = sum(found) / len(found)
        hidden = self.norm(text, "norm")
        if not reads_text:
            return hidden, hidden[-1]
        pooled = [self.norm(x.mean(0), f"fusion.norms.{name}") for name, x in streams.items()]
        return hidden, torch.stack([hidden[-1], *pooled]).mean(0)
