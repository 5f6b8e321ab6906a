"""Arrays as pictures: pixels as they are, spectrograms in colours, low frequencies at the bottom."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

    from glowflow.data.sheets.cards import Medium

__all__ = ["data_uri", "fitted", "medium_picture"]

_GREY = 128  # of what is not a number


def medium_picture(medium: Medium) -> Image:
    """The prepared medium, one point per pixel, or per frame and mel channel."""
    from PIL import Image

    assert medium.array is not None
    if medium.modality == "image":
        pixels = medium.array[:, :, 0] if medium.array.shape[2] == 1 else medium.array
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    return Image.fromarray(_coloured(medium.array))


def _coloured(frames_fm: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(F, M) -> (M, F, 3), from the quietest to the loudest point."""
    values = frames_fm.T[::-1].astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    shades = np.clip((np.where(finite, values, low) - low) / (high - low or 1.0), 0, 1)
    colours = _colours()[np.round(shades * 255).astype(np.int64)]
    colours[~finite] = _GREY
    return colours


@lru_cache(maxsize=1)
def _colours() -> npt.NDArray[np.uint8]:
    """(256, 3), from dark to light."""
    import matplotlib

    colours: npt.NDArray[np.uint8] = matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3]
    return colours


def fitted(picture: Image, width: int, height: int, *, stretch: bool = False) -> Image:
    """As large as the box allows: small ones by whole factors, so that each of their points is seen as a square.

    Args:
        stretch: fill the box, whatever the shape.
    """
    from PIL import Image

    if stretch:
        size = (width, height)
    else:
        scale = min(width / picture.width, height / picture.height)
        scale = int(scale) if scale >= 2 else scale
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smaller = size[0] < picture.width or size[1] < picture.height
    return picture.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)


def data_uri(picture: Image) -> str:
    """The picture as PNG inside a page."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
