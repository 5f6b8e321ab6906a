"""An encoder: stem, transformer blocks, perhaps a resampler, and a projection to the model's width.

    x = norm(blocks(stem(features)))        tokens of the encoder's own width
    z = resampler(x)                        with `tokens`: so many, whatever the size
    tokens = projection(z or x)

The projection is drawn such that tokens of media start with the size of the token embedding's vectors. An encoder has
one more parameter, ``missing``: the vector that stands where a medium of its modality is not present.

Legend: N items, S tokens, D the model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.multimodal import AudioEncoderConfig, ImageEncoderConfig, MultimodalConfig
from glowflow.core.architectures.base import InitSpec, ParameterRole
from glowflow.core.encoders.blocks import EncoderBlock, Resampler
from glowflow.core.encoders.stems import AudioConvolutions, AudioPatches, ImageConvolutions, ImagePatches, Stem
from glowflow.core.layers.norm import LayerNorm

__all__ = ["MediaEncoder", "build_encoder", "init_by_fan_in", "token_role"]

_EPS = 1e-6
TOKEN_STD = 0.02
"""Of learnt tokens: latents, bottleneck tokens and what stands for a missing medium."""


class MediaEncoder(nn.Module):
    """Encoder of one modality: ``encoder(features, sizes) -> (tokens_nsd, valid_ns)``.

    S is what the config's ``num_tokens`` says of the padded size; token s of an item is its s-th valid one.

    Args:
        config: the modality's section of ``model``.
        stem: from features to tokens of the encoder's width.
        width: the encoder's width.
        dim: the model's width D.
    """

    def __init__(self, config: ImageEncoderConfig | AudioEncoderConfig, stem: Stem, width: int, dim: int) -> None:
        super().__init__()
        self.frozen = config.frozen
        depth = 0 if config.encoder == "linear" else config.depth
        dropout = 0.0 if config.frozen else config.dropout
        self.stem = stem
        self.blocks = nn.ModuleList(EncoderBlock(width, config.heads, dropout) for _ in range(depth))
        self.norm = LayerNorm(width, _EPS)
        self.resampler = (
            None if config.tokens is None else Resampler(width, config.tokens, config.resampler_depth, config.heads)
        )
        self.projection = nn.Linear(width, dim)
        self.missing = nn.Parameter(torch.empty(dim))
        if config.frozen:
            for part in (self.stem, self.blocks, self.norm):
                part.requires_grad_(False)

    def forward(self, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, S, D), and which of them are valid, (N, S) bool; the first of each item always is.

        Args:
            features: (N, C, H, W) pixels, or (N, F, M) log-mel frames.
            sizes: (N, 2) valid height and width, or (N, 1) valid frames.
        """
        x_nsd, valid_ns = self.stem(features.to(self.projection.weight.dtype), sizes.clamp(min=1))
        for block in self.blocks:
            x_nsd = block(x_nsd, valid_ns)
        x_nsd = self.norm(x_nsd)
        if self.resampler is not None:
            x_nsd = self.resampler(x_nsd, valid_ns)
            valid_ns = valid_ns.new_ones(x_nsd.shape[:2])
        return self.projection(x_nsd), valid_ns

    def units(self) -> list[nn.Module]:
        """Blocks and the resampler's layers, in order of execution."""
        return [*self.blocks, *([] if self.resampler is None else self.resampler.layers)]

    def init_spec(self, name: str, embedding_std: float) -> InitSpec:
        """How the parameter with this name inside the encoder starts.

        Args:
            embedding_std: standard deviation of the model's token embedding.
        """
        if name == "missing":
            return InitSpec("normal", TOKEN_STD)
        spec = init_by_fan_in(self, name, 2 * len(self.blocks))
        return InitSpec("normal", spec.std * embedding_std) if name == "projection.weight" else spec


def build_encoder(name: str, config: MultimodalConfig) -> MediaEncoder:
    """The encoder of a modality.

    Raises:
        ConfigError: the number of input channels is not known.
    """
    section = getattr(config, name)
    if section.in_channels is None:
        hint = "build the model from a whole config, or set it"
        raise ConfigError(Problem(f"model.{name}.in_channels", "must be known to build the model", hint=hint))
    width = section.dim or config.dim
    return MediaEncoder(section, _stem(section, section.in_channels, width), width, config.dim)


def _stem(section: ImageEncoderConfig | AudioEncoderConfig, in_channels: int, width: int) -> Stem:
    if isinstance(section, ImageEncoderConfig):
        if section.encoder == "conv":
            return ImageConvolutions(in_channels, section.channels, width)
        return ImagePatches(in_channels, section.patch, width)
    if section.encoder == "conv":
        return AudioConvolutions(in_channels, section.channels, width)
    return AudioPatches(in_channels, section.patch, width)


def init_by_fan_in(module: nn.Module, name: str, residual_branches: int = 0) -> InitSpec:
    """Matrices and filters N(0, 1 / fan-in), those that write into a residual stream over its branches too.

    Gains start as ones, biases as zeros, learnt tokens (two dimensions, and no layer's weight) as N(0, 0.02).

    Args:
        name: of the parameter inside the module.
        residual_branches: number of branches that write into the stream; 0: there is none.
    """
    shape = module.get_parameter(name).shape
    if name.endswith("bias"):
        return InitSpec("zeros")
    if "norm" in name:
        return InitSpec("ones")
    if not name.endswith("weight"):
        return InitSpec("normal", TOKEN_STD)
    std = shape[1:].numel() ** -0.5
    if residual_branches and name.endswith(("attention.out.weight", "feed_forward.down.weight")):
        std *= residual_branches**-0.5
    return InitSpec("normal", std)


def token_role(name: str, shape: torch.Size) -> ParameterRole | None:
    """Learnt tokens are looked up, not multiplied with: no matrix, and nothing that decays. None: another parameter."""
    learnt = len(shape) == 2 and not name.endswith("weight")
    return ParameterRole("vector") if learnt else None
