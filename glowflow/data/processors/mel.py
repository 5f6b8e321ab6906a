"""Log-mel spectrograms: Slaney's mel bank, a Hann window, frames centred on their samples, as Whisper has them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.media import AudioConfig

__all__ = ["log_mel", "mel_bank"]

# Slaney's scale: linear below 1000 Hz (15 mels), then 27 mels to each factor of 6.4.
_HERTZ_PER_MEL, _LINEAR_MELS, _LOG_STEP = 200 / 3, 15.0, np.log(6.4) / 27
# Frames that are transformed at once: bounds the memory of long recordings.
_BLOCK = 1024


def _hertz(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mels < _LINEAR_MELS, mels * _HERTZ_PER_MEL, 1000 * np.exp((mels - _LINEAR_MELS) * _LOG_STEP))


def _mels(hertz: float) -> float:
    return hertz / _HERTZ_PER_MEL if hertz < 1000 else _LINEAR_MELS + float(np.log(hertz / 1000) / _LOG_STEP)


def mel_bank(rate: int, n_fft: int, mels: int, fmin: float, fmax: float | None) -> npt.NDArray[np.float32]:
    """Triangles of equal area, evenly spaced on Slaney's mel scale (Auditory Toolbox, 1998).

    Args:
        rate: samples per second.
        n_fft: samples of a window.
        mels: number of triangles M; triangle m rises from edge m to m + 1 and falls to m + 2.
        fmin: lowest edge in Hz.
        fmax: highest edge in Hz; None: half the rate.

    Returns:
        float32 (M, n_fft // 2 + 1), by which a power spectrum is multiplied.
    """
    edges = _hertz(np.linspace(_mels(fmin), _mels(rate / 2 if fmax is None else fmax), mels + 2))
    bins = np.arange(n_fft // 2 + 1) * (rate / n_fft)
    away = edges[:, None] - bins
    widths = np.diff(edges)[:, None]
    bank = np.maximum(0, np.minimum(-away[:-2] / widths[:-1], away[2:] / widths[1:]))
    return (bank * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


@lru_cache(maxsize=16)
def _tables(rate: int, n_fft: int, mels: int, fmin: float, fmax: float | None) -> tuple[npt.NDArray[np.float64], Any]:
    """The window (n_fft,), and the bank as a sparse matrix (bins, M): each bin is in two triangles at most."""
    from scipy.sparse import csr_array

    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return window, csr_array(mel_bank(rate, n_fft, mels, fmin, fmax).astype(np.float64).T)


def log_mel(samples: npt.NDArray[np.float32], config: AudioConfig) -> npt.NDArray[np.float32]:
    """The log-mel spectrogram of prepared samples (N,) at ``config.rate``: float32 (max(1, N // hop), M).

    Frame f is centred on sample f * hop; both ends are mirrored. Computed in float64.
    """
    window, bank = _tables(config.rate, config.n_fft, config.mels, config.fmin, config.fmax)
    frames = max(1, len(samples) // config.hop)
    padded = np.pad(samples.astype(np.float64), config.n_fft // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft)[:: config.hop]
    power = np.empty((frames, config.mels))
    for first in range(0, frames, _BLOCK):
        last = min(first + _BLOCK, frames)
        spectrum = np.fft.rfft(windows[first:last] * window)
        power[first:last] = (spectrum.real**2 + spectrum.imag**2) @ bank
    if config.log == "whisper":
        levels = np.log10(np.maximum(power, 1e-10))
        levels = (np.maximum(levels, levels.max() - 8) + 4) / 4
    else:
        levels = np.log(power + 1e-6)
    return ((levels - config.mean) / config.std).astype(np.float32)
