"""The body that the decoder-only architectures share: a block, and the way from tokens to a loss around the blocks.

A block is attention and feed-forward, each with its norm, added to the residual stream; which attention is the
architecture's business, and so are positions and memory. ``Decoder`` owns what is the same everywhere: embedding,
blocks, last norm, output head, how parameters start, what a token costs.

Legend: B batch, T positions, M remembered positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import DecoderConfig
from glowflow.core.architectures.base import BaseArchitecture, InitSpec, ParameterRole
from glowflow.core.attention.build import layer_spec
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.flops import attention_flops
from glowflow.core.attention.layer import AttentionContext, SelfAttention
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.layers.feed_forward import build_feed_forward
from glowflow.core.layers.head import OutputHead
from glowflow.core.layers.moe import MixtureOfExperts
from glowflow.core.layers.norm import build_norm

__all__ = ["Decoder", "DecoderBlock"]


class DecoderBlock(nn.Module):
    """Attention, then feed-forward (or both at once), in the residual stream.

    ``pre``: x + f(norm(x)) (arXiv:2002.04745); ``post``: norm(x + f(x)) (arXiv:1706.03762); ``sandwich``:
    x + norm(f(norm(x))) (arXiv:2105.13290). With ``parallel_block`` (arXiv:2204.02311) y = norm(x) feeds both
    branches: x + f(y) + g(y), or x + norm(f(y)) + norm(g(y)).

    Args:
        config: ``model`` of the experiment.
        layer: index of the block, from 0.
        attention: ``attention(x_btd, context)``, and ``attention(x_btd, context, memory_bmd)`` where the architecture
            calls the block with a memory; its projection into the residual stream is ``attention.out``.
    """

    def __init__(self, config: DecoderConfig, layer: int, attention: nn.Module) -> None:
        super().__init__()
        self.dropout, self.placement, self.parallel = config.dropout, config.norm_placement, config.parallel_block
        self.attention_norm = _norm(config)
        self.attention = attention
        if not self.parallel:
            self.feed_forward_norm = _norm(config)
        if self.placement == "sandwich":
            self.attention_out_norm = _norm(config)
            self.feed_forward_out_norm = _norm(config)
        mixture = config.moe if config.is_mixture(layer) else None
        if mixture is None:
            self.feed_forward = build_feed_forward(config.dim, config.hidden_dim, config.ffn, config.bias is True)
        else:
            self.feed_forward = MixtureOfExperts(config.dim, mixture.ffn_dim or config.hidden_dim, config.ffn, mixture)

    def forward(
        self, x_btd: Tensor, context: AttentionContext, memory_bmd: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x_btd: the residual stream.
            context: what all layers of the pass share.
            memory_bmd: earlier inputs of this block that its attention may look at too; normalised here as x is.

        Returns:
            The residual stream (B, T, D), and the balance loss of each sequence (B,), None for a block without a
            mixture and where no gradients are recorded.
        """
        if self.parallel:
            return self._both_at_once(x_btd, context, memory_bmd)
        pre = self.placement != "post"
        y_btd = self._attend(self.attention_norm(x_btd) if pre else x_btd, context, memory_bmd)
        x_btd = x_btd + self._drop(y_btd)
        x_btd = x_btd if pre else self.attention_norm(x_btd)
        y_btd, balance_b = self._feed(self.feed_forward_norm(x_btd) if pre else x_btd, context)
        x_btd = x_btd + self._drop(y_btd)
        return x_btd if pre else self.feed_forward_norm(x_btd), balance_b

    def _both_at_once(
        self, x_btd: Tensor, context: AttentionContext, memory_bmd: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y_btd = self.attention_norm(x_btd)
        fed_btd, balance_b = self._feed(y_btd, context)
        return x_btd + self._drop(self._attend(y_btd, context, memory_bmd)) + self._drop(fed_btd), balance_b

    def _attend(self, y_btd: Tensor, context: AttentionContext, memory_bmd: Tensor | None) -> Tensor:
        if memory_bmd is None:
            y_btd = self.attention(y_btd, context)
        else:
            memory_bmd = memory_bmd if self.placement == "post" else self.attention_norm(memory_bmd)
            y_btd = self.attention(y_btd, context, memory_bmd)
        return self.attention_out_norm(y_btd) if self.placement == "sandwich" else y_btd

    def _feed(self, y_btd: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        balance_b = None
        if isinstance(self.feed_forward, MixtureOfExperts):
            valid_bs = context.visibility.key_valid  # the last T of S keys are those of this pass
            y_btd, balance_b = self.feed_forward(y_btd, None if valid_bs is None else valid_bs[:, -y_btd.shape[1] :])
        else:
            y_btd = self.feed_forward(y_btd)
        return (self.feed_forward_out_norm(y_btd) if self.placement == "sandwich" else y_btd), balance_b

    def _drop(self, x_btd: Tensor) -> Tensor:
        return F.dropout(x_btd, self.dropout, self.training) if self.dropout else x_btd


class Decoder(BaseArchitecture):
    """Embedding, blocks, last norm and output head; a subclass says how a batch goes through the blocks.

    Args:
        config: ``model`` of the experiment, with ``vocab_size``.
        attentions: the attention module of each layer.
    """

    samples_labels: ClassVar[bool] = True
    config: DecoderConfig
    head: OutputHead

    def __init__(self, config: DecoderConfig, attentions: Iterable[nn.Module]) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(self.vocab_size, config.dim)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer, module) for layer, module in enumerate(attentions))
        # With post-norm the last block's output is normalised already.
        post = config.norm_placement == "post"
        self.norm: nn.Module = nn.Identity() if post else _norm(config)
        tied_to = self.embedding if config.tie_embeddings else None
        self.head = OutputHead(config.dim, self.vocab_size, tied_to, config.logit_softcap, 1.0 / config.width_ratio)

    def embed(self, tokens_bt: Tensor, added_btd: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, D), with dropout; ``added_btd`` is what the architecture adds to the tokens' vectors."""
        x_btd: Tensor = self.embedding(tokens_bt)
        if added_btd is not None:
            x_btd = x_btd + added_btd
        return F.dropout(x_btd, self.config.dropout, self.training) if self.config.dropout else x_btd

    def output(self, hidden: Tensor, batch: Batch, balances: list[Tensor | None], compute_loss: bool) -> ModelOutput:
        """The output record of a forward pass.

        Args:
            hidden: (B, T, D) after the last norm.
            balances: what the blocks gave back: (B,) each, or None.
        """
        if not compute_loss:
            return ModelOutput(hidden)
        drawn = batch.label_draws
        targets = batch.targets if drawn is None else self.head.sample(hidden, drawn)
        loss_sum, weight_sum = self.head.loss(hidden, targets, batch.loss_weights)
        return ModelOutput(hidden, loss_sum, weight_sum, balance_sum(balances, batch.loss_weights))

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def second_order_reasons(self) -> list[str]:
        mixtures = any(isinstance(module, MixtureOfExperts) for module in self.modules())
        return ["a mixture of experts (model.moe) has no second derivative"] if mixtures else []

    def parameter_role(self, name: str) -> ParameterRole:
        if name.endswith("convolution.weight"):  # one short filter per channel: no matrix
            return ParameterRole("vector")
        role = super().parameter_role(name)
        return replace(role, width_ratio=self.config.width_ratio) if role.kind == "hidden" else role

    def init_spec(self, name: str) -> InitSpec:
        """Matrices N(0, init_std), those that write into the residual stream over sqrt(2 depth); gains 1, biases 0.

        Hidden matrices are divided by the root of the width ratio too (maximal-update parametrisation).
        The attention module of a block is asked first: its ``init_spec(name)``, with the name inside it, may answer.
        """
        parts = name.split(".")
        if parts[0] == "blocks" and parts[2] == "attention":
            ask: Any = getattr(self.blocks[int(parts[1])].attention, "init_spec", None)
            given: InitSpec | None = None if ask is None else ask(".".join(parts[3:]))
            if given is not None:
                return given
        if name.endswith(".bias"):
            return InitSpec("zeros")
        if "norm" in name:
            return InitSpec("ones")
        writes_residual = name.endswith("attention.out.weight") or (
            "feed_forward." in name and name.endswith("down.weight")
        )
        depth_factor = 1 / math.sqrt(2 * self.config.depth) if writes_residual else 1.0
        width_factor = 1 / math.sqrt(self.parameter_role(name).width_ratio)
        return InitSpec("normal", self.config.init_std * depth_factor * width_factor)

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DecodeCache:
        attentions: list[Any] = [block.get_submodule("attention") for block in self.blocks]
        return DecodeCache([layer.new_cache(batch_size, max_length, device, dtype) for layer in attentions], max_length)

    def num_embedding_parameters(self) -> int:
        return 0 if self.config.tie_embeddings else self.embedding.weight.numel()

    def num_active_parameters(self) -> int:
        """Parameters that one token is multiplied with: of a mixture the experts that it goes through."""
        idle = sum(m.num_idle_parameters() for m in self.modules() if isinstance(m, MixtureOfExperts))
        return self.num_parameters() - self.num_embedding_parameters() - idle

    def attention_specs(self, layer: int, length: int) -> list[AttentionSpec]:
        """What this layer computes for sequences of this length; two where it mixes a window and linear attention."""
        attention, kind = self.blocks[layer].attention, self.config.attention.layer_kind(layer)
        if isinstance(attention, SelfAttention):
            return [attention.spec_at(length)]
        return [layer_spec(self.config, each) for each in ((kind, "linear") if kind == "gated" else (kind,))]

    def flops_per_token(self, context: int) -> float:
        """6 N of the parameters that count for a token, and each layer's attention (PaLM, appendix B)."""
        specs = [spec for layer in range(self.config.depth) for spec in self.attention_specs(layer, context)]
        return 6.0 * self.num_active_parameters() + sum(attention_flops(spec, context) for spec in specs)


def _norm(config: DecoderConfig) -> nn.Module:
    """One norm over the width, as the config wants it."""
    return build_norm(config.norm, config.dim, config.norm_eps, config.bias is True)


def balance_sum(balances: list[Tensor | None], weights_bt: Tensor) -> Tensor | None:
    """The balance losses as ``loss_sum`` is normalised: each sequence's, summed over layers, times its weight."""
    given = [balance_b for balance_b in balances if balance_b is not None]
    return (torch.stack(given).sum(0) * weights_bt.sum(1)).sum() if given else None
