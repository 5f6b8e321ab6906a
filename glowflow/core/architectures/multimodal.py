"""A decoder that reads text, pictures and recordings: encoders, a fusion, and a head for the task.

The text decoder is the plain transformer, whose options it has. Each modality has an encoder that is called once in
every pass, on a blank where a batch has no media of it; ``model.fusion`` says how its tokens and the text come together
(``glowflow.core.fusion``). The head scores the vocabulary, or the classes at each sample's last position, or it is two
projections into one space:

    contrastive     s_ij = e^g <t_i, m_j>,  t = W_t h / |W_t h|,  m = W_m v / |W_m v|,  e^g <= 100   (arXiv:2103.00020)

with h the text's state at its last position and v the normalised mean of its media; the loop computes the loss over
the whole global batch. g starts at ln(1 / 0.07).

Legend: B rows, T positions, D width, E joint width, V vocabulary, K classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.architectures.base import Carry, InitSpec, MissingMethodError, ParameterRole
from glowflow.core.architectures.decoder import balance_sum
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.attention.flops import attention_flops
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.spec import AttentionSpec
from glowflow.core.batch import Batch, Modality, ModelOutput
from glowflow.core.encoders.encoder import MediaEncoder, build_encoder, token_role
from glowflow.core.encoders.weights import encoder_state
from glowflow.core.fusion.base import Fused, MediaCache
from glowflow.core.fusion.build import build_fusion
from glowflow.core.fusion.media import Media
from glowflow.core.layers.head import OutputHead
from glowflow.core.layers.moe import MixtureOfExperts

__all__ = ["Multimodal", "blank_modality"]

_START_SCALE, _LARGEST_SCALE = math.log(1 / 0.07), math.log(100.0)
_STAND_IN_CHANNELS = {"image": 3, "audio": 8}


class Multimodal(Transformer):
    """Language model, classifier or pair of towers over text and media, registered as ``multimodal``."""

    config_class: ClassVar[type[ArchitectureConfig]] = MultimodalConfig
    config: MultimodalConfig

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        for name in config.modalities:
            self.add_module(f"{name}_encoder", build_encoder(name, config))
        self.fusion = build_fusion(config)
        own = [self.fusion.build_block(layer) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(block or self.blocks[layer] for layer, block in enumerate(own))
        if config.task == "classification":
            if config.num_classes is None:
                hint = "set it, or name a data set with labels"
                raise ConfigError(Problem("model.num_classes", "must be known to build the model", hint=hint))
            self.head = OutputHead(config.dim, config.num_classes)
        elif config.task == "contrastive":
            del self.head
            self.text_projection = nn.Linear(config.dim, config.embedding_dim, bias=False)
            self.media_projection = nn.Linear(config.dim, config.embedding_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.zeros(1))  # what is added to its start

    # -- a pass -------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        media = self.encode(batch.modalities, len(batch.tokens), batch.tokens.device)
        fused = self.fusion.fuse(self, batch, media)
        if self.config.task == "classification":
            return self._classified(fused, batch, compute_loss), carry
        if self.config.task == "contrastive":
            return self._paired(fused, batch), carry
        return self.output(fused.hidden, batch, fused.balances, compute_loss), carry

    def encode(self, modalities: Mapping[str, Modality], rows: int, device: torch.device) -> list[Media]:
        """The media of all modalities that the model reads, always in the same order.

        Args:
            modalities: by name; one that is not there is a blank.
            rows: B.
        """
        found = []
        for name in self.config.modalities:
            encoder: MediaEncoder = self.get_submodule(f"{name}_encoder")  # type: ignore[assignment]
            batch = modalities.get(name) or blank_modality(name, self.config, rows, device)
            tokens, valid = encoder(batch.features, batch.sizes)
            found.append(Media.of(name, batch, tokens, valid, encoder.missing))
        return found

    def _classified(self, fused: Fused, batch: Batch, compute_loss: bool) -> ModelOutput:
        """Each row's class, at its last position."""
        index_b1 = self._readout(batch)[:, None]
        pooled_bd = fused.pooled if fused.pooled is not None else self._last(fused.hidden, index_b1)
        output = ModelOutput(fused.hidden, pooled=pooled_bd)
        if not compute_loss:
            return output
        weights_b = batch.loss_weights.gather(1, index_b1).squeeze(1)
        targets_b = batch.targets.gather(1, index_b1).squeeze(1)
        if batch.label_draws is not None:
            targets_b = self.head.sample(pooled_bd, batch.label_draws.gather(1, index_b1).squeeze(1))
        output.loss_sum, output.weight_sum = self.head.loss(pooled_bd, targets_b, weights_b)
        with torch.no_grad():
            right_b = self.head(pooled_bd).argmax(-1) == targets_b
            output.correct_sum = (right_b * weights_b).sum()
        output.aux_sum = balance_sum(fused.balances, batch.loss_weights)
        return output

    def _paired(self, fused: Fused, batch: Batch) -> ModelOutput:
        """Unit vectors of texts and media; the loss needs those of all ranks."""
        assert fused.media is not None
        index_b1 = self._readout(batch)[:, None]
        texts_be = self.text_projection(self._last(fused.hidden, index_b1))
        media_be = self.media_projection(fused.media)
        precise = torch.promote_types(texts_be.dtype, torch.float32)
        scale = (self.logit_scale.to(precise) + _START_SCALE).sum()
        # Held below its largest value, where a gradient that lowers it still reaches it.
        scale = scale - (scale - _LARGEST_SCALE).clamp(min=0).detach()
        return ModelOutput(
            fused.hidden,
            aux_sum=balance_sum(fused.balances, batch.loss_weights),
            pairs=(F.normalize(texts_be.to(precise), dim=-1), F.normalize(media_be.to(precise), dim=-1)),
            pair_weights=batch.loss_weights.gather(1, index_b1).squeeze(1),
            logit_scale=scale.exp(),
        )

    def _readout(self, batch: Batch) -> Tensor:
        """(B,) last position of each row."""
        if batch.readout is not None:
            return batch.readout
        return torch.full_like(batch.tokens[:, 0], batch.tokens.shape[1] - 1)

    def _last(self, hidden_btd: Tensor, index_b1: Tensor) -> Tensor:
        return hidden_btd.gather(1, index_b1.unsqueeze(-1).expand(-1, -1, hidden_btd.shape[-1])).squeeze(1)

    # -- what a fusion asks of the decoder ----------------------------------------------------------------------------

    def vectors(self, tokens_bt: Tensor) -> Tensor:
        """(B, T, D) of the token embedding."""
        vectors: Tensor = self.embedding(tokens_bt)
        return vectors

    def dropped(self, x_btd: Tensor) -> Tensor:
        """With the dropout of the embedding."""
        return F.dropout(x_btd, self.config.dropout, self.training) if self.config.dropout else x_btd

    def context_of(self, x_btd: Tensor, batch: Batch | None, cache: DecodeCache | None = None) -> AttentionContext:
        """Masks, positions and kernels of a pass over the positions of ``x_btd``.

        Args:
            batch: whose last positions they are; None while decoding.
            cache: whose next positions they are.
        """
        documents = None if batch is None or batch.single_document else batch.document_ids
        context = self._context(x_btd[..., 0], documents=documents, cache=cache)
        if self.config.moe is None or batch is None or batch.readout is None:
            return context
        # The balance of experts is that of tokens, not of padding, which depends on the company in the batch.
        length, before = x_btd.shape[1], x_btd.shape[1] - batch.tokens.shape[1]
        context.visibility.key_valid = torch.arange(length, device=x_btd.device) - before <= batch.readout[:, None]
        context = replace(context, conditions=replace(context.conditions, padding=True), _chosen={})
        for layer in range(self.config.depth):
            for spec in self.attention_specs(layer, length):
                if spec.kind != "linear":
                    context.kernel(spec)  # chosen here, because choosing logs
        return context

    def softmax_spec(self, layer: int) -> AttentionSpec:
        """What a layer of softmax attention computes."""
        return self.attention_specs(layer, 0)[0]

    def run(self, x_btd: Tensor, context: AttentionContext) -> Fused:
        """Through all blocks and the last norm."""
        balances = []
        for block in self.blocks:
            x_btd, balance_b = block(x_btd, context)
            balances.append(balance_b)
        return Fused(self.norm(x_btd), balances)

    # -- decoding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        media: Mapping[str, Modality] | None = None,
    ) -> MediaCache:
        """An empty decoding cache for rows with these media, which are encoded here.

        Args:
            media: by modality, on the device; their slots are flat positions b * max_length + t. None: there are none.

        Raises:
            ConfigError: the model writes no text, or the media are those of another number of rows.
        """
        self._require_text("new_cache")
        given = media or {}
        for name, one in given.items():
            if len(one.row_items) != batch_size:
                rule = f"must be those of the {batch_size} rows of the cache"
                raise ConfigError(Problem(f"media.{name}", rule, len(one.row_items)))
        extra = [self.fusion.extra_positions(layer) for layer in range(self.config.depth)]
        layers = [
            block.get_submodule("attention").new_cache(batch_size, max_length + more, device, dtype)  # type: ignore[operator]
            for block, more in zip(self.blocks, extra, strict=True)
        ]
        cache = MediaCache(layers, max_length, extra=extra)
        with _evaluating(self):
            self.fusion.open(self, cache, self.encode(given, batch_size, torch.device(device)))
        return cache

    def decode(self, tokens: Tensor, cache: DecodeCache, *, last_only: bool = False) -> Tensor:
        self._require_text("decode")
        assert isinstance(cache, MediaCache)
        cache.require(tokens.shape[1])
        hidden = self.fusion.step(self, tokens, cache)
        cache.advance(tokens.shape[1])
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def _require_text(self, method: str) -> None:
        if self.config.task != "language_modelling":
            rule = f"must be language_modelling to generate text ({method})"
            raise MissingMethodError(Problem("model.task", rule, self.config.task))

    # -- parameters ---------------------------------------------------------------------------------------------------

    def shard_units(self) -> list[nn.Module]:
        encoders = [self.get_submodule(f"{name}_encoder") for name in self.config.modalities]
        units = [unit for encoder in encoders for unit in cast(MediaEncoder, encoder).units()]
        return [*units, *self.fusion.units(list(self.blocks))]

    def parameter_role(self, name: str) -> ParameterRole:
        return token_role(name, self.get_parameter(name).shape) or super().parameter_role(name)

    def init_spec(self, name: str) -> InitSpec:
        """As the decoder; encoders, fusions and projections N(0, 1 / fan-in), learnt tokens N(0, 0.02), gates 0."""
        part, _, rest = name.partition(".")
        if part.endswith("_encoder"):
            return cast(MediaEncoder, self.get_submodule(part)).init_spec(rest, self.config.init_std)
        if part == "fusion":
            return self.fusion.init_spec(rest)
        if part == "logit_scale":
            return InitSpec("zeros")
        if part in ("text_projection", "media_projection"):
            return InitSpec("normal", self.config.dim**-0.5)
        return super().init_spec(name)

    def initial_weights(self) -> Mapping[str, Tensor]:
        return encoder_state(self.config)

    def num_embedding_parameters(self) -> int:
        """The token embedding is multiplied with only where it scores the vocabulary too."""
        if self.config.task == "language_modelling":
            return super().num_embedding_parameters()
        return self.embedding.weight.numel()

    def flops_per_token(self, context: int) -> float:
        """Of a position of the text decoder: 6 N of its weights and the fusion's, and its attention.

        A position goes through the weights of one modality (``mixture``). What encoders and streams of media cost is
        not in it: it depends on the sizes of media, of which the model's config knows nothing. So the MFU of a run
        with media is a lower bound.
        """
        text = [self.norm, *([] if self.config.task == "contrastive" else [self.head]), *self.blocks]
        count = sum(p.numel() for module in text for p in module.parameters())
        twins = [block.get_submodule("twins") for block in self.blocks if hasattr(block, "twins")]
        count -= sum(p.numel() for module in twins for p in module.parameters())
        if self.config.task == "language_modelling" and self.config.tie_embeddings:
            count += self.embedding.weight.numel()
        count += self.fusion.parameters_per_token()
        count -= sum(m.num_idle_parameters() for m in self.modules() if isinstance(m, MixtureOfExperts))
        specs = [spec for layer in range(self.config.depth) for spec in self.attention_specs(layer, context)]
        return 6.0 * count + sum(attention_flops(spec, context) for spec in specs)

    @classmethod
    def small_config(cls, config: MultimodalConfig) -> MultimodalConfig:  # type: ignore[override]
        """Two blocks, a task that scores the vocabulary, and no files: what a derived class is tried with."""
        encoders = {}
        for name in config.modalities:
            section = getattr(config, name)
            known = section.in_channels or _STAND_IN_CHANNELS[name]
            encoders[name] = section.model_copy(update={"checkpoint": None, "in_channels": known})
        depth = min(config.depth, 2)
        layer = min(config.bottleneck.from_layer, depth - 1)
        more = {
            "depth": depth,
            "task": "language_modelling",
            "num_classes": None,
            "bottleneck": config.bottleneck.model_copy(update={"from_layer": layer}),
        }
        return config.model_copy(update={**encoders, **more})


def blank_modality(name: str, config: MultimodalConfig, rows: int, device: torch.device | str) -> Modality:
    """One blank item of no row: what a batch without media of this modality has, so that its encoder is called.

    Args:
        name: the modality.
        config: of the model, with the input channels of its encoders.
        rows: B.
    """
    channels = getattr(config, name).in_channels
    shape = (1, channels, 1, 1) if name == "image" else (1, 1, channels)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    return Modality(
        features=torch.zeros(shape, device=device),
        sizes=torch.ones(1, 2 if name == "image" else 1, dtype=torch.int64, device=device),
        present=torch.zeros(1, dtype=torch.bool, device=device),
        sample_index=number,
        positions=number,
        row_items=torch.ones(rows, 1, dtype=torch.int64, device=device),
        slot_index=number[:0],
        token_index=number[:0],
    )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout; as before afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
