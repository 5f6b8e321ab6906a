"""Random changes of pictures and spectrograms in training, drawn from one generator per sample.

Only the generator's raw 64-bit stream is used: numpy promises no other to stay the same (NEP 19). Each change has its
own draw at a fixed place, so that turning one on does not alter the others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.media import ImageAugmentConfig, SpecAugmentConfig

__all__ = ["ImageDraw", "mask_spectrogram"]

Box = tuple[float, float, float, float]


def _uniforms(rng: np.random.Generator, count: int) -> list[float]:
    """Numbers in [0, 1) with 53 random bits each."""
    raw = np.asarray(rng.bit_generator.random_raw(count), np.uint64)
    return [float(value) for value in (raw >> np.uint64(11)) * 2.0**-53]


class ImageDraw:
    """The changes of one picture."""

    def __init__(self, config: ImageAugmentConfig, rng: np.random.Generator) -> None:
        self.config = config
        self._crop = _uniforms(rng, 3)
        self._flip, *self._turn = _uniforms(rng, 4)
        self._light = _uniforms(rng, 2)
        self._erase, *self._patch = _uniforms(rng, 6)

    def crop(self, box: Box) -> Box:
        """A random part of a box (left, top, right, bottom) with the same aspect."""
        low, high = self.config.scale
        if low == 1:
            return box
        share, across, down = self._crop
        side = math.sqrt(low + (high - low) * share)
        left, top, right, bottom = box
        width, height = (right - left) * side, (bottom - top) * side
        left += across * (right - left - width)
        top += down * (bottom - top - height)
        return left, top, min(right, left + width), min(bottom, top + height)

    def change(self, picture: Any, fill: tuple[int, ...]) -> Any:
        """The prepared picture (Pillow, ``RGB`` or ``L``) after all other changes; ``fill`` is the mean colour."""
        from PIL import Image

        if self._flip < self.config.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.config.rotate or self.config.shift:
            picture = self._turned(picture, fill)
        if self.config.brightness or self.config.contrast:
            picture = self._lit(picture)
        if self._erase < self.config.erase:
            self._erased(picture)
        return picture

    def _turned(self, picture: Any, fill: tuple[int, ...]) -> Any:
        """Turned about the middle, then shifted; what comes in from outside has the mean colour."""
        from PIL import Image

        angle, across, down = (2 * draw - 1 for draw in self._turn)
        angle = math.radians(angle * self.config.rotate)
        width, height = picture.size
        cos, sin = math.cos(angle), math.sin(angle)
        middle_x, middle_y = width / 2, height / 2
        # From a place in the result back to the place in the picture that is seen there.
        x, y = middle_x + across * self.config.shift * width, middle_y + down * self.config.shift * height
        affine = (cos, -sin, middle_x - cos * x + sin * y, sin, cos, middle_y - sin * x - cos * y)
        colour = fill if len(fill) > 1 else fill[0]
        return picture.transform(
            picture.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=colour
        )

    def _lit(self, picture: Any) -> Any:
        """Brightness, then contrast about the mean level, as one table of 256 levels."""
        brighter, stronger = (2 * draw - 1 for draw in self._light)
        levels = np.clip(np.arange(256) * (1 + brighter * self.config.brightness), 0, 255)
        counts = np.asarray(picture.histogram(), np.float64).reshape(-1, 256).sum(0)
        mean = float(levels @ counts) / float(counts.sum())
        levels = np.clip(mean + (levels - mean) * (1 + stronger * self.config.contrast), 0, 255)
        return picture.point(np.round(levels).astype(np.uint8).tolist() * len(picture.getbands()))

    def _erased(self, picture: Any) -> None:
        """One rectangle of 2 to 33 % of the area, sides 0.3 to 3.3, becomes one level of grey (arXiv:1708.04896)."""
        area, aspect, across, down, level = self._patch
        width, height = picture.size
        pixels = (0.02 + 0.31 * area) * width * height
        ratio = math.exp((2 * aspect - 1) * math.log(3.3))
        patch_width = min(width, max(1, round(math.sqrt(pixels * ratio))))
        patch_height = min(height, max(1, round(math.sqrt(pixels / ratio))))
        left, top = int(across * (width - patch_width + 1)), int(down * (height - patch_height + 1))
        grey = int(level * 256)
        box = (left, top, left + patch_width, top + patch_height)
        picture.paste(grey if picture.mode == "L" else (grey,) * 3, box)


def mask_spectrogram(features: npt.NDArray[np.float32], config: SpecAugmentConfig, rng: np.random.Generator) -> None:
    """SpecAugment in place: stretches of time and bands of frequency of (F, M) become the mean of the spectrogram."""
    frames, mels = features.shape
    mean = features.mean(dtype=np.float64)
    for _ in range(config.time_masks):
        first, last = _stretch(frames, config.time_width, rng)
        features[first:last] = mean
    for _ in range(config.frequency_masks):
        first, last = _stretch(mels, config.frequency_width, rng)
        features[:, first:last] = mean


def _stretch(length: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    """First and last (exclusive) of a stretch of 0 to ``widest`` places."""
    width, start = _uniforms(rng, 2)
    size = int(width * (min(widest, length) + 1))
    first = int(start * (length - size + 1))
    return first, first + size
