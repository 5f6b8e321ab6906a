"""Opening pictures from untrusted bytes: formats known by their content, sizes and orientation from the header.

Pillow's readers are called directly, not through ``Image.open``: its warning and error on large pictures come from a
global of the process, while the limit here is a setting. Only formats on the list below are read, and of a PNG only
what pixels need: comments, colour profiles and further frames stay unread, however large they claim to be.
"""

from __future__ import annotations

import importlib
import io
import struct
from dataclasses import dataclass
from typing import Any

from glowflow.data.processors.bad import BadSample

__all__ = ["FORMATS", "OpenedPicture", "bad_picture", "open_picture"]

# Format: first bytes of its files, Pillow's module and class. WebP is told apart by hand: RIFF is also wav's beginning.
_READERS: dict[str, tuple[tuple[bytes, ...], str, str]] = {
    "JPEG": ((b"\xff\xd8\xff",), "JpegImagePlugin", "JpegImageFile"),
    "PNG": ((b"\x89PNG\r\n\x1a\n",), "PngImagePlugin", "PngImageFile"),
    "WEBP": ((), "WebPImagePlugin", "WebPImageFile"),
    "GIF": ((b"GIF87a", b"GIF89a"), "GifImagePlugin", "GifImageFile"),
    "BMP": ((b"BM",), "BmpImagePlugin", "BmpImageFile"),
    "TIFF": ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TiffImagePlugin", "TiffImageFile"),
    "PPM": ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), "PpmImagePlugin", "PpmImageFile"),
}
FORMATS = tuple(_READERS)

# Chunks of a PNG that pixels and orientation depend on.
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
# libwebp and Pillow hold a WebP picture four times, at 4 bytes a pixel; other formats need 4 to 12 bytes a pixel.
_WEBP_MOST_PIXELS = 100_000_000
# Each scan of a progressive JPEG is a pass over the whole picture; cameras and programs write about ten.
_JPEG_MOST_SCANS = 500
_ORIENTATION = 0x0112


@dataclass
class OpenedPicture:
    """A picture whose header has been read, and nothing more.

    Args:
        image: Pillow's lazy picture, in the orientation in which it is stored.
        format: one of ``FORMATS``.
        orientation: EXIF orientation that is still to be applied, 1 to 8.
        height: rows after that orientation.
        width: columns after that orientation.
    """

    image: Any
    format: str
    orientation: int
    height: int
    width: int


def open_picture(data: bytes, max_pixels: int) -> OpenedPicture:
    """Read the header of a picture; nothing is decoded.

    Raises:
        BadSample: of kind ``no_data``, ``image_header`` or ``image_too_large``.
    """
    name = _format_of(data)
    try:
        if name == "WEBP":  # its reader sets memory aside for all pixels at once
            _check_size(*_webp_size(data), min(max_pixels, _WEBP_MOST_PIXELS), name)
        if name == "JPEG" and (scans := data.count(b"\xff\xda")) > _JPEG_MOST_SCANS:
            raise BadSample("image_decode", f"JPEG of {scans} scans; at most {_JPEG_MOST_SCANS} are read")
        if name == "PNG":
            data = _plain_png(data)
        _, module, reader = _READERS[name]
        image = getattr(importlib.import_module(f"PIL.{module}"), reader)(io.BytesIO(data))
        width, height = image.size
        _check_size(height, width, max_pixels, name)
        # The TIFF reader applies the orientation itself, to the size as well.
        turn = 1 if name == "TIFF" else _orientation(image.info.get("exif"))
    except BadSample:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise bad_picture("image_header", name, error) from error
    if turn >= 5:
        height, width = width, height
    return OpenedPicture(image, name, turn, height, width)


def bad_picture(kind: str, name: str, error: Exception) -> BadSample:
    """The bad sample that an error of Pillow's stands for.

    Its readers of TIFF, GIF and WebP have a limit of their own, the default of ``data.image.max_pixels``.
    """
    from PIL.Image import DecompressionBombError

    kind = "image_too_large" if isinstance(error, DecompressionBombError) else kind
    return BadSample(kind, f"{name}: {str(error).strip() or type(error).__name__}")


def _format_of(data: bytes) -> str:
    """The format by the first bytes; names of files are not looked at."""
    if not data:
        raise BadSample("no_data", "the file is empty")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for name, (marks, _, _) in _READERS.items():
        if data.startswith(marks):
            return name
    raise BadSample("image_header", f"begins like none of {', '.join(FORMATS)}")


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height < 1 or width < 1:
        raise BadSample("image_header", f"{name} of {width} x {height} pixels")
    if height * width > max_pixels:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise BadSample("image_too_large", f"{name} of {size}; at most {max_pixels:,} are decoded")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Height and width from the first chunk."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise BadSample("image_header", "WEBP: its first chunk is no picture")


def _plain_png(data: bytes) -> bytes:
    """The file without comments, profiles and frames of an animation; the same object when it has none."""
    kept, start, at = [], 0, 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind not in _PNG_KEPT:
            kept.append((start, at))
            start = min(end, len(data))
        elif kind == b"IEND":
            break
        at = end
    if not kept:
        return data
    view = memoryview(data)
    return b"".join([*(view[first:last] for first, last in kept), view[start:]])


def _orientation(exif: Any) -> int:
    """The orientation in an EXIF block, 1 to 8; 1 where there is none or the block is damaged."""
    if not isinstance(exif, bytes):
        return 1
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, at)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, at + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
