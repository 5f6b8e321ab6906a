"""The view: what a model sees of a sample, as far as the data decide it.

Which modalities are read, how their media are prepared and how many places each takes in the sequence, what is
predicted and with which weights, what becomes of bad and long samples. It is made from a config, is plain data, and
is part of the plan. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES, AudioConfig, ImageConfig, ModalityWeights
from glowflow.config.multimodal import AudioEncoderConfig, ImageEncoderConfig, MultimodalConfig, Task
from glowflow.config.schema import GlowFlowConfig

__all__ = ["MediaView", "media_view"]

_TOKENS = ("encoder", "patch", "channels", "tokens")  # of an encoder: all that the number of its tokens depends on
# What changes no batch, so that a run may go on with another value.
_NOT_IN_PLAN = ("on_bad_sample", "max_bad_fraction", "on_long_sample")


@dataclass(frozen=True)
class MediaView:
    """See the module. Made by ``media_view``; the default is text alone.

    Args:
        modalities: those that the model reads, in the order of ``MODALITIES``.
        places: media stand in the sequence itself, in the places of their placeholders.
        task: what is predicted.
        image, audio: how media are prepared; without augmentation unless ``training``.
        image_encoder, audio_encoder: of the encoders, what the number of tokens depends on.
        loss_weights: weights of targets by what is predicted (language modelling).
        prompt_loss: the prompt counts too.
        modality_dropout: probability that a sample loses a modality; 0 unless ``training``.
        without: modalities that are left out of every sample; their places stay.
        pairing: ``shuffled``: each sample has the media of another one.
        training: augmentation and dropout are on.
        on_bad_sample, max_bad_fraction, on_long_sample: as in ``data``; not in the fingerprint of the plan.
    """

    modalities: tuple[str, ...] = ()
    places: bool = False
    task: Task = "language_modelling"
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    audio_encoder: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    loss_weights: ModalityWeights = field(default_factory=ModalityWeights)
    prompt_loss: bool = False
    modality_dropout: float = 0.0
    without: tuple[str, ...] = ()
    pairing: Literal["matched", "shuffled"] = "matched"
    training: bool = False
    on_bad_sample: Literal["error", "skip", "blank"] = "error"
    max_bad_fraction: float = 0.01
    on_long_sample: Literal["error", "truncate"] = "error"

    def size(self, modality: str, facts: Sequence[int]) -> tuple[int, ...]:
        """Size of a prepared medium: (height, width), or (frames,).

        Args:
            modality: ``image`` or ``audio``.
            facts: of the file: height and width with its orientation applied, or samples and rate.
        """
        if modality == "image":
            return self.image.output_size(int(facts[0]), int(facts[1]))
        return (self.audio.num_frames(int(facts[0]), int(facts[1])),)

    def num_tokens(self, modality: str, size: Sequence[int]) -> int:
        """Tokens that the encoder makes of a prepared medium of this size."""
        if modality == "image":
            return self.image_encoder.num_tokens(size[0], size[1])
        return self.audio_encoder.num_tokens(size[0])

    def slots(self, modality: str, facts: Sequence[int]) -> int:
        """Places that a medium takes in the sequence; 1, its placeholder, where the model places no media there."""
        if not self.places or modality not in self.modalities:
            return 1
        return self.num_tokens(modality, self.size(modality, facts))

    def blank_size(self, modality: str) -> tuple[int, ...]:
        """Size of what stands for a medium that is left out: one that the encoder makes one token of."""
        if modality == "image":
            encoder = self.image_encoder
            side = 2 ** len(encoder.channels) if encoder.encoder == "conv" else encoder.patch
            return side, side
        sound = self.audio_encoder
        return (2 ** (len(sound.channels) - 1) if sound.encoder == "conv" else sound.patch,)

    def feature_shape(self, modality: str, size: Sequence[int]) -> tuple[int, ...]:
        """Shape of prepared features: (H, W, C) of pixels, (F, M) of a spectrogram."""
        return (*size, self.image.channels) if modality == "image" else (*size, self.audio.mels)

    def feature_bytes(self, modality: str, size: Sequence[int]) -> int:
        """Bytes of prepared features: pixels as bytes, spectrograms as float32."""
        count = 1 if modality == "image" else 4
        for side in self.feature_shape(modality, size):
            count *= side
        return count

    def plain(self) -> dict[str, Any]:
        """All of it for JSON; ``from_plain`` undoes it."""
        values = {**vars(self), "modalities": list(self.modalities), "without": list(self.without)}
        for name in ("image", "audio", "loss_weights"):
            values[name] = values[name].model_dump(mode="json")
        for name in MODALITIES:
            values[f"{name}_encoder"] = getattr(self, f"{name}_encoder").model_dump(mode="json", include=set(_TOKENS))
        return values

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> MediaView:
        """Rebuild it from ``plain``."""
        made = {**values, "modalities": tuple(values["modalities"]), "without": tuple(values["without"])}
        types = {"image": ImageConfig, "audio": AudioConfig, "loss_weights": ModalityWeights}
        types |= {"image_encoder": ImageEncoderConfig, "audio_encoder": AudioEncoderConfig}
        made |= {name: model(**values[name]) for name, model in types.items()}
        return cls(**made)

    def identity(self) -> dict[str, Any]:
        """What enters the fingerprint of the plan: all that can change a batch, and no more."""
        values = self.plain()
        for name in _NOT_IN_PLAN:
            del values[name]
        for name in MODALITIES:
            if name not in self.modalities:
                del values[name], values[f"{name}_encoder"]
        return values


def media_view(
    config: GlowFlowConfig,
    *,
    training: bool,
    without: Sequence[str] = (),
    pairing: Literal["matched", "shuffled"] | None = None,
) -> MediaView:
    """The view of an experiment; of an architecture that reads no media, text alone.

    Args:
        config: the whole config.
        training: with augmentation and modality dropout.
        without: modalities to leave out, beside those of ``data.without``.
        pairing: instead of ``data.pairing``.

    Raises:
        DataError: the task needs a modality that is left out.
    """
    data = config.data
    left_out = {*data.without, *without}
    view = MediaView(
        loss_weights=data.loss_weights,
        prompt_loss=data.prompt_loss,
        training=training,
        on_bad_sample=data.on_bad_sample,
        max_bad_fraction=data.max_bad_fraction,
        on_long_sample=data.on_long_sample,
    )
    model = config.model
    if not isinstance(model, MultimodalConfig):
        return view
    image, audio = data.image, data.audio
    if not training:
        image = image.model_copy(update={"augment": type(image.augment)()})
        audio = audio.model_copy(update={"augment": type(audio.augment)()})
    if model.task == "contrastive" and left_out & set(model.modalities):
        rule = f"task contrastive has no pairs without {', '.join(sorted(left_out & set(model.modalities)))}"
        raise DataError(Problem("data.without", rule, sorted(left_out)))
    return replace(
        view,
        modalities=model.modalities,
        places=model.places_media,
        task=model.task,
        image=image,
        audio=audio,
        image_encoder=ImageEncoderConfig(**_of(model.image)),
        audio_encoder=AudioEncoderConfig(**_of(model.audio)),
        # A pair that lacks one of its two sides teaches nothing.
        modality_dropout=data.modality_dropout if training and model.task != "contrastive" else 0.0,
        without=tuple(name for name in model.modalities if name in left_out),
        pairing=pairing or data.pairing,
    )


def _of(encoder: ImageEncoderConfig | AudioEncoderConfig | None) -> dict[str, Any]:
    return {} if encoder is None else {key: getattr(encoder, key) for key in _TOKENS}
