"""Recordings: bytes in, a log-mel spectrogram out whose length follows from the header and the settings alone.

A pure function of (bytes, settings, random numbers). Files are read in blocks and made mono at once; of a long one no
more is read than is used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from glowflow.config.media import AudioConfig
from glowflow.data.processors.augment import mask_spectrogram
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.mel import log_mel

__all__ = ["AudioProcessor", "audio_facts", "check_audio"]

Samples = npt.NDArray[np.float32]  # (N,)
Features = npt.NDArray[np.float32]  # (F, M)

_RATES = range(100, 384_001)
# Values that are decoded at once, over all channels.
_BLOCK = 1 << 18
# The filter of scipy's resample_poly: Kaiser window with beta 5, ten zero crossings to either side.
_CROSSINGS, _BETA = 10, 5.0
_FINEST = 4096


def audio_facts(data: bytes, max_seconds: float) -> tuple[int, int]:
    """Samples (of one channel) and rate, from the header alone.

    Raises:
        BadSample: of kind ``no_data``, ``audio_header``, ``audio_decode`` (the header promises more than there is),
            ``audio_empty`` or ``audio_too_long``.
    """
    with _opened(data, max_seconds) as file:
        return file.frames, file.samplerate


def check_audio(data: bytes, config: AudioConfig) -> tuple[int, int]:
    """Samples and rate of a recording that decodes to its end.

    Raises:
        BadSample: of any kind of recordings.
    """
    with _opened(data, config.max_file_seconds) as file:
        for _ in _blocks(file, file.frames):
            pass
        return file.frames, file.samplerate


class AudioProcessor:
    """Prepares recordings by the keys under ``data.audio``."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config

    def features(self, data: bytes, rng: np.random.Generator | None = None) -> Features:
        """The prepared spectrogram, float32 (F, M) with F == config.num_frames(*audio_facts(data)).

        Args:
            data: the file.
            rng: source of SpecAugment; None: the spectrogram as it is.

        Raises:
            BadSample: the recording can not be decoded.
        """
        features = log_mel(self.samples(data), self.config)
        if rng is not None and self.config.augment.active:
            mask_spectrogram(features, self.config.augment, rng)
        return features

    def samples(self, data: bytes) -> Samples:
        """The recording at ``config.rate``, mono, trimmed, cut and padded: float32 (config.num_samples(*facts),)."""
        config = self.config
        with _opened(data, config.max_file_seconds) as file:
            rate, total = file.samplerate, file.frames
            most = _needed(config.max_samples, config.rate, rate)
            if config.trim_db is None:
                samples = _read(file, 0, min(total, most))
            else:
                first, last = _loud_part(file, max(1, round(config.hop * rate / config.rate)), config.trim_db)
        if config.trim_db is not None:
            # Decoded once more, rather than held: only now is known what is used.
            with _opened(data, config.max_file_seconds) as file:
                samples = _read(file, first, min(last, first + most))
        length = config.num_samples(total, rate)
        prepared = _resampled(samples, config.rate, rate)[:length]
        if not np.isfinite(prepared).all():
            raise BadSample("audio_not_finite", "has samples that are too large to be resampled")
        return np.pad(prepared, (0, length - len(prepared)))

    def blank(self, frames: int) -> Features:
        """A spectrogram that says nothing, float32 (frames, M)."""
        return np.zeros((frames, self.config.mels), np.float32)


class _Source(io.BytesIO):
    """Bytes for libsndfile's callbacks, in which an error would be printed and forgotten: seeking never fails."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        start = (0, self.tell(), len(self.getbuffer()))[whence]
        return super().seek(max(0, start + offset))


@contextmanager
def _opened(data: bytes, max_seconds: float) -> Iterator[Any]:
    """A soundfile whose header holds; errors inside the ``with`` become bad samples.

    Raises:
        BadSample: as ``audio_facts`` says, and ``audio_decode``.
    """
    import soundfile

    name = _format_of(data)
    try:
        file = soundfile.SoundFile(_Source(data))
    except Exception as error:  # beside its own kind: ValueError, TypeError, OverflowError, MemoryError
        raise BadSample("audio_header", f"{name}: {_reason_of(error)}") from error
    with file:
        if file.samplerate not in _RATES:
            raise BadSample("audio_header", f"{name} of {file.samplerate:,} samples per second")
        if name == "WAV":
            _check_wav(data)
        if file.frames < 1:
            raise BadSample("audio_empty", f"{name} without samples")
        if file.frames > max_seconds * file.samplerate:
            seconds = f"{file.frames / file.samplerate:,.1f} s; at most {max_seconds:g} s are decoded"
            raise BadSample("audio_too_long", f"{name} of {seconds}")
        try:
            yield file
        except BadSample:
            raise
        except Exception as error:
            raise BadSample("audio_decode", f"{name}: {_reason_of(error)}") from error


def _reason_of(error: BaseException) -> str:
    """What libsndfile says, without the name of the object that stands for the file."""
    text = str(getattr(error, "error_string", "") or error).strip()
    return text or type(error).__name__


def _format_of(data: bytes) -> str:
    """The format by the first bytes; names of files are not looked at."""
    if not data:
        raise BadSample("no_data", "the file is empty")
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        return "WAV"
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    for name, mark in (("FLAC", b"fLaC"), ("OGG", b"OggS"), ("AU", b".snd"), ("MP3", b"ID3")):
        if data.startswith(mark):
            return name
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2:  # eleven bits of synchronisation, layer III
        return "MP3"
    raise BadSample("audio_header", "begins like none of WAV, FLAC, OGG, MP3, AIFF, AU")


def _check_wav(data: bytes) -> None:
    """Refuse a data chunk that is longer than the file: libsndfile would silently read what is there.

    Programs that write into a pipe put the largest number there, since they do not know the length: that is no lie.
    """
    order: Literal["big", "little"] = "big" if data[:4] == b"RIFX" else "little"
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], order)
        if data[at : at + 4] == b"data":
            there = len(data) - at - 8
            if there < size != 0xFFFFFFFF:
                raise BadSample("audio_decode", f"false header: {size:,} bytes of samples promised, {there:,} there")
            return
        at += 8 + size + size % 2


def _blocks(file: Any, count: int, size: int = 0) -> Iterator[Samples]:
    """The first ``count`` samples of a file, mono, in pieces of ``size``; 0: of a good size."""
    size, read = size or max(1, _BLOCK // file.channels), 0
    while read < count:
        block = file.read(min(size, count - read), dtype="float32", always_2d=True)
        if not len(block):
            raise BadSample("audio_decode", f"ends after {read:,} of {file.frames:,} samples")
        if not np.isfinite(block).all():
            raise BadSample("audio_not_finite", "has samples that are no finite numbers")
        read += len(block)
        yield block[:, 0] if file.channels == 1 else block.mean(1, dtype=np.float64).astype(np.float32)


def _read(file: Any, start: int, stop: int) -> Samples:
    """Samples ``start`` to ``stop`` (exclusive), mono; those before are decoded too, since seeking may be inexact."""
    samples, at = np.empty(stop - start, np.float32), -start
    for block in _blocks(file, stop):
        part = block[max(0, -at) :]
        samples[max(0, at) : max(0, at) + len(part)] = part
        at += len(block)
    return samples


def _loud_part(file: Any, width: int, decibels: float) -> tuple[int, int]:
    """First and last sample (exclusive) of a file without the quiet frames of ``width`` samples at both ends."""
    size = max(1, _BLOCK // file.channels // width) * width
    powers = []
    for block in _blocks(file, file.frames, size):
        starts = np.arange(0, len(block), width)
        sums = np.add.reduceat(np.square(block, dtype=np.float64), starts)
        powers.append(sums / np.minimum(width, len(block) - starts))
    power = np.concatenate(powers)
    loud = np.flatnonzero(power >= power.max() * 10 ** (-decibels / 10))
    return int(loud[0]) * width, min(file.frames, (int(loud[-1]) + 1) * width)


def _needed(wanted: int, rate: int, file_rate: int) -> int:
    """Samples of the file that the first ``wanted`` ones at ``rate`` depend on."""
    common = math.gcd(rate, file_rate)
    up, down = rate // common, file_rate // common
    return -(-(wanted * down + _CROSSINGS * max(up, down)) // up) + 1


def _resampled(samples: Samples, rate: int, file_rate: int) -> Samples:
    """All samples at another rate: ceil(N * rate / file_rate) of them."""
    if rate == file_rate:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, file_rate)
    up, down = rate // common, file_rate // common
    return np.asarray(resample_poly(samples, up, down, window=_low_pass(max(up, down))), np.float32)


def _low_pass(most: int) -> npt.NDArray[np.float32]:
    """The filter that ``resample_poly`` would design anew at each call, for the larger number of a ratio.

    Where that is large (rates without a common divisor, up to millions of values), the same curve is read off the
    finest one that is designed: that takes a small part of the time, and nothing large is kept.
    """
    if most <= _FINEST:
        return _designed(most)
    curve = _designed(_FINEST)
    places = np.linspace(0, len(curve) - 1, 2 * _CROSSINGS * most + 1)
    return np.interp(places, np.arange(len(curve)), curve * (_FINEST / most)).astype(np.float32)


@lru_cache(maxsize=16)
def _designed(most: int) -> npt.NDArray[np.float32]:
    from scipy.signal import firwin

    return np.asarray(firwin(2 * _CROSSINGS * most + 1, 1 / most, window=("kaiser", _BETA)), np.float32)
