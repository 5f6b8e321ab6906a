"""How pictures and sounds are prepared: the keys under ``data.image`` and ``data.audio``. No torch here.

What is prepared has a size that follows from the raw facts in the manifest (height and width, samples and rate) and
these keys alone, so that the lengths of sequences are known before anything is decoded.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glowflow.config.base import StrictModel
from glowflow.config.errors import Problem, RuleError

__all__ = ["MODALITIES", "PLACEHOLDERS", "AudioConfig", "ImageConfig", "ModalityWeights"]

MODALITIES = ("image", "audio")
PLACEHOLDERS = {"image": "<image>", "audio": "<audio>"}
"""What stands in a text where a picture or a sound belongs."""


class ImageAugmentConfig(StrictModel):
    """Changes of pictures in training, drawn from (seed, epoch, sample)."""

    flip: float = Field(0.0, ge=0, le=1, description="Probability of a mirror image.")
    rotate: float = Field(0.0, ge=0, le=180, description="Largest turn in degrees, either way.")
    shift: float = Field(0.0, ge=0, lt=1, description="Largest shift along each axis, as a share of the side.")
    scale: tuple[float, float] = Field(
        (1.0, 1.0), description="Smallest and largest share of the area that a random crop keeps before resizing."
    )
    brightness: float = Field(0.0, ge=0, lt=1, description="Brightness is multiplied by 1 - b to 1 + b.")
    contrast: float = Field(0.0, ge=0, lt=1, description="Contrast is multiplied by 1 - c to 1 + c.")
    erase: float = Field(0.0, ge=0, le=1, description="Probability of a random grey rectangle (arXiv:1708.04896).")

    @model_validator(mode="after")
    def _scale_in_order(self) -> ImageAugmentConfig:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise RuleError(
                Problem("scale", "must be two shares of the area in order, 0 < low <= high <= 1", self.scale)
            )
        return self

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self != ImageAugmentConfig()


class ImageConfig(StrictModel):
    """From the bytes of a picture to its pixels."""

    size: int | tuple[int, int] | None = Field(
        224,
        description="Side, or height and width, in pixels; null: each keeps its own size, and `fit` does not count.",
    )
    fit: Literal["resize", "crop", "pad"] = Field(
        "resize",
        description=(
            "`resize`: stretched to the size; `crop`: the shorter side fits, the middle of the longer is kept; `pad`: "
            "the longer side fits, the rest is filled with the mean."
        ),
    )
    longest: int | None = Field(
        None, ge=1, description="With `size: null`, larger pictures are reduced until no side is longer than this."
    )
    multiple: int = Field(
        1, ge=1, description="With `size: null`, sides are rounded to multiples of this, for example the patch."
    )
    color: Literal["rgb", "gray"] = Field("rgb", description="Colour mode; transparency is laid over white.")
    mean: list[float] = Field(
        default_factory=lambda: [0.5], description="Subtracted from pixels in 0..1: one number, or one per channel."
    )
    std: list[float] = Field(default_factory=lambda: [0.5], description="Pixels are then divided by it, as `mean`.")
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="Larger pictures are bad samples; read from the header, before anything is decoded.",
    )
    augment: ImageAugmentConfig = Field(default_factory=ImageAugmentConfig, description="Changes in training.")

    @model_validator(mode="after")
    def _sizes(self) -> ImageConfig:
        problems = []
        sides = (self.size,) if isinstance(self.size, int) else self.size or ()
        if any(side < 1 for side in sides):
            problems.append(Problem("size", "must be at least 1", self.size))
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) not in (1, self.channels):
                rule = f"must have 1 or {self.channels} numbers for color {self.color}"
                problems.append(Problem(key, rule, values, related=("color",)))
        if any(value <= 0 for value in self.std):
            problems.append(Problem("std", "must be greater than 0", self.std))
        if self.size is not None:
            for key, default in (("longest", None), ("multiple", 1)):
                if getattr(self, key) != default:
                    rule = "has no effect where `size` is given"
                    problems.append(Problem(key, rule, getattr(self, key), "set size: null", related=("size",)))
        if problems:
            raise RuleError(problems)
        return self

    @property
    def channels(self) -> int:
        """Channels of the pixels."""
        return 3 if self.color == "rgb" else 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the prepared picture, from those of the file (orientation applied)."""
        if isinstance(self.size, int):
            return self.size, self.size
        if self.size is not None:
            return self.size
        shrink = min(1.0, self.longest / max(height, width)) if self.longest else 1.0
        sides = (max(1, round(side * shrink / self.multiple)) * self.multiple for side in (height, width))
        if self.longest:
            most = max(self.multiple, self.longest // self.multiple * self.multiple)
            sides = (min(side, most) for side in sides)
        out_height, out_width = sides
        return out_height, out_width


class SpecAugmentConfig(StrictModel):
    """SpecAugment (arXiv:1904.08779): bands of the spectrogram are blanked in training."""

    time_masks: int = Field(0, ge=0, description="Blanked stretches of time.")
    time_width: int = Field(10, ge=1, description="Longest stretch in frames.")
    frequency_masks: int = Field(0, ge=0, description="Blanked bands of frequency.")
    frequency_width: int = Field(8, ge=1, description="Widest band in mel channels.")

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.time_masks or self.frequency_masks)


class AudioConfig(StrictModel):
    """From the bytes of a recording to a log-mel spectrogram."""

    rate: int = Field(16_000, ge=1, description="Samples per second; recordings are resampled to it and made mono.")
    n_fft: int = Field(400, ge=16, description="Samples of one window of the Fourier transform (Hann).")
    hop: int = Field(160, ge=1, description="Samples from one frame to the next.")
    mels: int = Field(80, ge=1, description="Channels of the mel bank (Slaney's scale and norm).")
    fmin: float = Field(0.0, ge=0, description="Lowest frequency in Hz.")
    fmax: float | None = Field(None, gt=0, description="Highest frequency in Hz; default: half the rate.")
    max_seconds: float = Field(30.0, gt=0, description="Longer recordings are cut.")
    pad: bool = Field(False, description="Fill shorter recordings with silence up to `max_seconds`.")
    trim_db: float | None = Field(
        None,
        gt=0,
        description="Cut off both ends while they are this many dB below the loudest frame; silence is added behind.",
    )
    log: Literal["whisper", "log"] = Field(
        "whisper",
        description=(
            "`whisper`: log10, at most 8 below the loudest, then (x + 4) / 4 (arXiv:2212.04356); `log`: natural "
            "logarithm of power + 1e-6."
        ),
    )
    mean: float = Field(0.0, description="Subtracted from the spectrogram.")
    std: float = Field(1.0, gt=0, description="The spectrogram is then divided by it.")
    max_file_seconds: float = Field(
        3600.0, gt=0, description="Longer files are bad samples; read from the header, before anything is decoded."
    )
    augment: SpecAugmentConfig = Field(default_factory=SpecAugmentConfig, description="SpecAugment in training.")

    @model_validator(mode="after")
    def _frequencies(self) -> AudioConfig:
        problems = []
        if self.fmax is not None and self.fmax > self.rate / 2:
            rule = f"must be at most half of data.audio.rate, {self.rate / 2:g}"
            problems.append(Problem("fmax", rule, self.fmax, related=("rate",)))
        if self.fmin >= (self.fmax or self.rate / 2):
            problems.append(Problem("fmin", "must be below the highest frequency", self.fmin, related=("fmax", "rate")))
        if self.hop > self.n_fft:
            rule = f"must be at most data.audio.n_fft ({self.n_fft}): samples between windows would not be heard"
            problems.append(Problem("hop", rule, self.hop, related=("n_fft",)))
        if problems:
            raise RuleError(problems)
        return self

    @property
    def max_samples(self) -> int:
        """Samples at `rate` after which a recording is cut."""
        return max(self.hop, round(self.max_seconds * self.rate))

    def num_samples(self, samples: int, rate: int) -> int:
        """Samples of the prepared recording at `rate`, from those of the file."""
        resampled = -(-samples * self.rate // rate)
        return self.max_samples if self.pad else min(resampled, self.max_samples)

    def num_frames(self, samples: int, rate: int) -> int:
        """Frames of the spectrogram of a file of so many samples at this rate; at least 1."""
        return max(1, self.num_samples(samples, rate) // self.hop)


class ModalityWeights(StrictModel):
    """Weights of the loss by what is predicted."""

    text: float = Field(1.0, ge=0, description="Tokens of text.")
    image: float = Field(0.0, ge=0, description="That a picture comes here: its placeholder.")
    audio: float = Field(0.0, ge=0, description="That a recording comes here: its placeholder.")
