"""Pictures: bytes in, pixels out whose size follows from the header and the settings alone.

A pure function of (bytes, settings, random numbers). Large pictures are made small while they are decoded (JPEG) or
tile by tile right after it (all others): what becomes anything else than 8-bit pixels is never larger than a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.media import ImageConfig
from glowflow.data.processors.augment import Box, ImageDraw
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.pictures import OpenedPicture, bad_picture, open_picture

__all__ = ["ImageProcessor", "check_image", "image_facts"]

Pixels = npt.NDArray[np.uint8]  # (H, W, C)

# So many times finer than the result a reduced picture stays: then bicubic resizing sees no difference (Pillow's
# `reducing_gap`), nor does it after the scaled inverse transform of JPEG, as Pillow's own thumbnails are made.
_GAP, _JPEG_GAP = 3.0, 2.0
# Side of the tiles in which large pictures change their colour mode, and most by which they are reduced there.
_TILE, _LARGEST_FACTOR = 2048, 256
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def image_facts(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width after EXIF orientation, from the header alone.

    Raises:
        BadSample: of kind ``no_data``, ``image_header`` or ``image_too_large``.
    """
    opened = open_picture(data, max_pixels)
    return opened.height, opened.width


def check_image(data: bytes, config: ImageConfig) -> tuple[int, int]:
    """Height and width of a picture that decodes to its end, as small as its format allows.

    Raises:
        BadSample: of any kind of pictures.
    """
    opened = open_picture(data, config.max_pixels)
    _decoded(opened, (0.0, 0.0, 1.0, 1.0), (1, 1), "RGB" if config.color == "rgb" else "L")
    return opened.height, opened.width


class ImageProcessor:
    """Prepares pictures by the keys under ``data.image``."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self.mode = "RGB" if config.color == "rgb" else "L"
        mean, std = (np.broadcast_to(np.asarray(v, np.float64), config.channels) for v in (config.mean, config.std))
        self._fill = tuple(int(level) for level in np.clip(np.round(mean * 255), 0, 255))
        self._factor = (1 / (255 * std)).astype(np.float32)[:, None, None]
        self._offset = (mean / std).astype(np.float32)[:, None, None]

    def pixels(self, data: bytes, rng: np.random.Generator | None = None) -> Pixels:
        """The prepared picture, uint8 (H, W, C) with (H, W) == config.output_size(*image_facts(data)).

        Args:
            data: the file.
            rng: source of the changes of training; None: the picture as it is.

        Raises:
            BadSample: the picture can not be decoded.
        """
        config = self.config
        opened = open_picture(data, config.max_pixels)
        height, width = config.output_size(opened.height, opened.width)
        draw = ImageDraw(config.augment, rng) if rng is not None and config.augment.active else None
        scaled, box = self._geometry(opened, height, width)
        picture = _decoded(opened, draw.crop(box) if draw else box, scaled, self.mode)
        if scaled != (height, width):
            picture = self._padded(picture, height, width)
        if draw:
            picture = draw.change(picture, self._fill)
        return np.array(picture, np.uint8).reshape(height, width, config.channels)

    def normalize(self, pixels_nhwc: Pixels) -> npt.NDArray[np.float32]:
        """Pixels (N, H, W, C) as what a model reads: (value / 255 - mean) / std, float32 (N, C, H, W)."""
        values = np.ascontiguousarray(pixels_nhwc.transpose(0, 3, 1, 2)).astype(np.float32)
        values *= self._factor
        values -= self._offset
        return values

    def blank(self, height: int, width: int) -> Pixels:
        """A picture of the mean colour, uint8 (H, W, C), of a prepared size."""
        return np.broadcast_to(np.array(self._fill, np.uint8), (height, width, self.config.channels)).copy()

    def _geometry(self, opened: OpenedPicture, height: int, width: int) -> tuple[tuple[int, int], Box]:
        """The size to which the picture is scaled, and the part of it that is kept, in shares of its sides."""
        fit = self.config.fit if self.config.size is not None else "resize"
        down, across = height / opened.height, width / opened.width
        if fit == "pad":
            scale = min(down, across)
            rows = min(height, max(1, round(opened.height * scale)))
            return (rows, min(width, max(1, round(opened.width * scale)))), (0.0, 0.0, 1.0, 1.0)
        if fit == "crop":
            tall, wide = down / max(down, across), across / max(down, across)
            return (height, width), ((1 - wide) / 2, (1 - tall) / 2, (1 + wide) / 2, (1 + tall) / 2)
        return (height, width), (0.0, 0.0, 1.0, 1.0)

    def _padded(self, picture: Any, height: int, width: int) -> Any:
        """In the middle of a picture of the mean colour."""
        from PIL import Image

        fill = self._fill if self.mode == "RGB" else self._fill[0]
        whole = Image.new(self.mode, (width, height), fill)
        whole.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        return whole


def _decoded(opened: OpenedPicture, box: Box, size: tuple[int, int], mode: str) -> Any:
    """Part of a picture in shares of its sides, decoded, opaque, in a colour mode, scaled to (height, width), upright.

    Raises:
        BadSample: of kind ``image_decode``.
    """
    from PIL import Image

    try:
        # Pixels are turned last, when they are few. Boxes need no turning: they are in the middle or anywhere.
        sideways = opened.orientation >= 5
        height, width = size[::-1] if sideways else size
        left, top, right, bottom = (box[1], box[0], box[3], box[2]) if sideways else box
        image = opened.image
        full_width, full_height = map(float, image.size)
        finer = (right - left) * full_width / width, (bottom - top) * full_height / height
        if opened.format == "JPEG":
            full_width, full_height = _draft(image, min(finer) / _JPEG_GAP, mode)
            finer = (right - left) * full_width / width, (bottom - top) * full_height / height
        factor = _whole(finer[0] / _GAP), _whole(finer[1] / _GAP)
        image.load()
        if image.mode != mode or image.has_transparency_data:
            image, reduced = _opaque(image, mode, factor)
            full_width, full_height = full_width / reduced[0], full_height / reduced[1]
        edges = (left * full_width, top * full_height, right * full_width, bottom * full_height)
        if edges != (0, 0, *image.size) or image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC, edges, _GAP)
        return image if opened.orientation == 1 else image.transpose(_turn(opened.orientation))
    except BadSample:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise bad_picture("image_decode", opened.format, error) from error


def _whole(factor: float) -> int:
    return max(1, min(_LARGEST_FACTOR, int(factor)))


def _turn(orientation: int) -> Any:
    """What makes a picture of an EXIF orientation of 2 to 8 upright."""
    from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    return turns[orientation - 2]


def _draft(image: Any, finer: float, mode: str) -> tuple[float, float]:
    """Have a JPEG decoded at 1, 1/2, 1/4 or 1/8 of its size, for grey its brightness alone.

    Returns its width and height then, which need not be whole.
    """
    width, height = image.size
    scale = next((scale for scale in (8, 4, 2) if scale <= finer), 1)
    # A side of 10 pixels at 1/8 has two, of which the second is seen by a quarter.
    image.draft(mode, (max(1, width // scale), max(1, height // scale)))
    return width / scale, height / scale


def _opaque(image: Any, mode: str, factor: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
    """A decoded picture in the colour mode, over white, and the factors by which it was reduced.

    Large pictures are converted and reduced tile by tile, so that no second one of their size ever exists.
    """
    from PIL import Image

    limits = _limits(image) if image.mode in _DEEP else (0.0, 255.0)
    if max(image.size) <= _TILE:
        return _tile_opaque(image, mode, limits), (1, 1)
    (width, height), (across, down) = image.size, factor
    whole = Image.new(mode, (-(-width // across), -(-height // down)))
    step_x, step_y = (_TILE // part * part for part in factor)
    for top in range(0, height, step_y):
        for left in range(0, width, step_x):
            tile = image.crop((left, top, min(left + step_x, width), min(top + step_y, height)))
            tile = _tile_opaque(tile, mode, limits)
            whole.paste(tile if factor == (1, 1) else tile.reduce(factor), (left // across, top // down))
    return whole, factor


def _tile_opaque(image: Any, mode: str, limits: tuple[float, float]) -> Any:
    from PIL import Image

    if image.mode in _DEEP:
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise BadSample("image_decode", "has pixels that are no finite numbers")
        low, high = limits
        levels = np.round((values - low) * (255 / (high - low))).astype(np.uint8)
        return Image.fromarray(levels).convert(mode)
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(clear, mask=clear)
    if image.mode == mode:
        return image
    return image.convert("RGB").convert(mode)


def _limits(image: Any) -> tuple[float, float]:
    """The levels of black and white of pixels of more than 8 bits.

    Whole numbers within 16 bits and fractions within 0..1 or 0..255 are taken for what they look like; others are
    stretched from the darkest to the brightest.
    """
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = (float(value) for value in image.getextrema())
    if not np.isfinite([low, high]).all():
        raise BadSample("image_decode", "has pixels that are no finite numbers")
    for most in (1.0, 255.0) if image.mode == "F" else (65535.0,):
        if low >= 0 and high <= most:
            return 0.0, most
    return low, high if high > low else low + 1
