"""Writes the media of data sets that come as arrays: PNG and WAV, the same bytes for the same array."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["decode_wav", "encode_png", "encode_wav"]

_FULL_SCALE = 32_767


def encode_png(pixels_hw: npt.NDArray[np.uint8]) -> bytes:
    """A greyscale picture, (H, W) uint8, as PNG."""
    height, width = pixels_hw.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = pixels_hw
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encode_wav(samples: npt.NDArray[Any], rate: int) -> bytes:
    """A mono recording, floats in -1..1, as WAV of 16 bits; louder ones are scaled down, not clipped."""
    peak = float(np.abs(samples).max(initial=0.0))
    scaled = samples / peak if peak > 1 else samples
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(scaled * _FULL_SCALE).astype("<i2").tobytes())
    return buffer.getvalue()


def decode_wav(data: bytes) -> tuple[npt.NDArray[np.float64], int]:
    """Samples in -1..1 and rate of a mono WAV of 16 bits.

    Raises:
        ValueError: it is another kind of file.
    """
    try:
        with wave.open(io.BytesIO(data), "rb") as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise ValueError("is no mono recording of 16 bits")
            content = file.readframes(file.getnframes())
            return np.frombuffer(content, "<i2").astype(np.float64) / _FULL_SCALE, file.getframerate()
    except (wave.Error, EOFError) as error:
        raise ValueError(str(error)) from error
