"""Schema of the architecture ``multimodal``: encoders, fusion and task under ``model:``. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glowflow.config.architectures import TransformerConfig
from glowflow.config.base import StrictModel
from glowflow.config.errors import ConfigError, Problem, RuleError

__all__ = [
    "AudioEncoderConfig",
    "BottleneckConfig",
    "CrossAttentionConfig",
    "ImageEncoderConfig",
    "LateConfig",
    "MultimodalConfig",
    "Task",
]

Task = Literal["language_modelling", "classification", "contrastive"]


class EncoderConfig(StrictModel):
    """Keys that the encoders of all modalities have."""

    dim: int | None = Field(None, ge=1, description="Width; default: the model's. A projection leads to the model's.")
    depth: int = Field(2, ge=0, description="Transformer blocks (not of `linear`).")
    heads: int = Field(4, ge=1, description="Attention heads of these blocks and of the resampler.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on both residual branches of these blocks.")
    channels: list[int] = Field(
        default_factory=lambda: [32, 64, 128],
        description="Of a convolution stem: channels of its layers, each with stride 2.",
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="A Perceiver resampler (arXiv:2204.14198) gives so many tokens, whatever the size; null: none.",
    )
    resampler_depth: int = Field(1, ge=1, description="Layers of the resampler.")
    frozen: bool = Field(
        False, description="The encoder's weights stay as they are; its resampler and projection are trained."
    )
    checkpoint: str | None = Field(
        None,
        description="File (.safetensors or .pt) of an encoder's weights to start from, also a whole model's of ours.",
    )

    @model_validator(mode="after")
    def _some_channels(self) -> EncoderConfig:
        if not self.channels or any(c < 1 for c in self.channels):
            raise RuleError(Problem("channels", "must be a list of at least one positive number", self.channels))
        return self


class ImageEncoderConfig(EncoderConfig):
    """Encoder of pictures."""

    encoder: Literal["vit", "conv", "linear"] = Field(
        "vit",
        description=(
            "`vit`: patches, 2-D positions, transformer blocks (arXiv:2010.11929); `conv`: a convolution stem, then "
            "`depth` blocks; `linear`: patches, one projection (Fuyu)."
        ),
    )
    patch: int = Field(16, ge=1, description="Side of a patch in pixels (`vit`, `linear`).")
    in_channels: int | None = Field(
        None, ge=1, description="Channels of the pixels; those of `data.image.color` when left out."
    )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens before the resampler, for a prepared picture of this size."""
        step = 2 ** len(self.channels) if self.encoder == "conv" else self.patch
        return -(-height // step), -(-width // step)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of a prepared picture of this size."""
        rows, columns = self.grid(height, width)
        return self.tokens or rows * columns


class AudioEncoderConfig(EncoderConfig):
    """Encoder of log-mel spectrograms."""

    encoder: Literal["conv", "linear"] = Field(
        "conv",
        description=(
            "`conv`: a convolution stem over time, each layer after the first with stride 2, then `depth` blocks "
            "(arXiv:2212.04356); `linear`: `patch` frames at a time, one projection."
        ),
    )
    patch: int = Field(4, ge=1, description="Frames of a patch (`linear`).")
    in_channels: int | None = Field(None, ge=1, description="Mel channels; `data.audio.mels` when left out.")

    def num_frames(self, frames: int) -> int:
        """Tokens before the resampler."""
        step = 2 ** (len(self.channels) - 1) if self.encoder == "conv" else self.patch
        return -(-frames // step)

    def num_tokens(self, frames: int) -> int:
        """Tokens of a spectrogram of so many frames."""
        return self.tokens or self.num_frames(frames)


class CrossAttentionConfig(StrictModel):
    """Of `fusion: cross_attention`."""

    every: int = Field(
        1, ge=1, description="Gated cross-attention stands before every n-th block, the last among them."
    )
    attends: Literal["all", "latest"] = Field(
        "all",
        description="A position of text sees all media before it, or only the latest of each modality (Flamingo).",
    )


class BottleneckConfig(StrictModel):
    """Of `fusion: bottleneck`."""

    tokens: int = Field(4, ge=1, description="Bottleneck tokens.")
    from_layer: int = Field(
        0, ge=0, description="First block that exchanges them; the modalities are apart before. Below `depth`."
    )


class LateConfig(StrictModel):
    """Of `fusion: late`."""

    hidden: int | None = Field(
        None, ge=1, description="Hidden width where the towers are combined; default: the model's."
    )


class MultimodalConfig(TransformerConfig):
    """A decoder that reads text, pictures and recordings; how they come together is one key, `fusion`.

    The keys of other fusions than the chosen one have no effect, so that a sweep need only change `fusion`.
    """

    arch: str = Field("multimodal", description="Registered name, or `module:Class` of a custom architecture.")
    fusion: Literal["prefix", "cross_attention", "bottleneck", "late", "mixture"] = Field(
        "prefix",
        description=(
            "`prefix`: tokens of media take the placeholders' places (arXiv:2304.08485); `cross_attention`: gated, "
            "between the blocks (arXiv:2204.14198); `bottleneck`: a transformer per modality, joined by a few tokens "
            "(arXiv:2107.00135); `late`: towers that meet at the head; `mixture`: one sequence, weights of each "
            "modality (arXiv:2411.04996)."
        ),
    )
    image: ImageEncoderConfig | None = Field(None, description="Encoder of pictures; null: the model reads none.")
    audio: AudioEncoderConfig | None = Field(None, description="Encoder of recordings; null: the model reads none.")
    cross_attention: CrossAttentionConfig = Field(
        default_factory=CrossAttentionConfig, description="Of `fusion: cross_attention`."
    )
    bottleneck: BottleneckConfig = Field(default_factory=BottleneckConfig, description="Of `fusion: bottleneck`.")
    late: LateConfig = Field(default_factory=LateConfig, description="Of `fusion: late`.")
    task: Task = Field(
        "language_modelling",
        description=(
            "`language_modelling`: the text, given media; `classification`: the sample's label, by a linear head; "
            "`contrastive`: which medium belongs to which text (arXiv:2103.00020)."
        ),
    )
    num_classes: int | None = Field(
        None, ge=2, description="Of `task: classification`; taken from the data set when left out."
    )
    embedding_dim: int = Field(128, ge=1, description="Of `task: contrastive`: width of the joint space.")

    @property
    def layout(self) -> Literal["packed", "lanes", "bucketed"]:
        """One sample, with its media, is one sequence."""
        return "bucketed"

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model has an encoder for."""
        return tuple(name for name in ("image", "audio") if getattr(self, name) is not None)

    @property
    def places_media(self) -> bool:
        """Whether tokens of media stand in the sequence itself, in place of their placeholders."""
        return self.fusion in ("prefix", "mixture")

    def reading(self, **channels: int) -> MultimodalConfig:
        """The same with the number of input channels of each encoder, where it is not given.

        Args:
            channels: of the prepared media, by modality.

        Raises:
            ConfigError: it is given, and another one.
        """
        known, problems = {}, []
        keys = {"image": "data.image.color", "audio": "data.audio.mels"}
        for name in self.modalities:
            encoder, count = getattr(self, name), channels[name]
            if encoder.in_channels is None:
                known[name] = encoder.model_copy(update={"in_channels": count})
            elif encoder.in_channels != count:
                rule = f"must be {count}, as {keys[name]} has it"
                problems.append(Problem(f"model.{name}.in_channels", rule, encoder.in_channels, "leave it out"))
        if problems:
            raise ConfigError(problems)
        return self.model_copy(update=known) if known else self

    @model_validator(mode="after")
    def _encoders_and_task(self) -> MultimodalConfig:
        problems = []
        for name in self.modalities:
            encoder = getattr(self, name)
            width = encoder.dim or self.dim
            if width % encoder.heads:
                rule = f"must divide the encoder's width: {width} % {encoder.heads} = {width % encoder.heads}"
                problems.append(Problem(f"{name}.heads", rule, encoder.heads, related=("dim",)))
        if self.bottleneck.from_layer >= self.depth and self.fusion == "bottleneck":
            rule = f"must be below model.depth ({self.depth})"
            problems.append(Problem("bottleneck.from_layer", rule, self.bottleneck.from_layer, related=("depth",)))
        if self.task == "contrastive":
            if len(self.modalities) != 1:
                rule = "contrasts text with one modality: give model.image or model.audio, not both"
                problems.append(Problem("task", rule, self.task, related=("image", "audio")))
            if self.fusion != "late":
                hint = "set model.fusion: late"
                problems.append(
                    Problem(
                        "fusion",
                        "must be late for task contrastive, whose towers stay apart",
                        self.fusion,
                        hint,
                        ("task",),
                    )
                )
        if self.num_classes is not None and self.task != "classification":
            problems.append(Problem("num_classes", "has no effect without task classification", self.num_classes))
        if self.position in ("learned",):
            problems.append(
                Problem("position", "must be rope, alibi or none: media make sequences of any length", self.position)
            )
        problems += self._trunk_problems() + self._attention_problems()
        if problems:
            raise RuleError(problems)
        return self

    def _trunk_problems(self) -> list[Problem]:
        """What the fusion cannot do with the blocks that were asked for."""
        problems = []
        if self.mup:
            rule = "must be false: how the weights of encoders and fusions transfer over widths is not known"
            problems.append(Problem("mup", rule, self.mup))
        if self.moe is not None and self.fusion == "mixture":
            rule = "must be null for fusion mixture, whose feed-forwards are already one per modality"
            problems.append(Problem("moe", rule, related=("fusion",)))
        return problems

    def _attention_problems(self) -> list[Problem]:
        """What the fusion cannot do with the attention that was asked for."""
        if self.fusion == "bottleneck":
            kinds = self.attention.layer_kinds()
            if kinds - {"dense"}:
                rule = (
                    "must be dense for fusion bottleneck: every position has to see the bottleneck tokens at the start"
                )
                return [Problem("attention.kind", rule, self.attention.kind, related=("fusion",))]
            if self.position == "alibi":
                rule = "must be rope or none for fusion bottleneck: alibi would hide its tokens from far positions"
                return [Problem("position", rule, self.position, related=("fusion",))]
        return []
