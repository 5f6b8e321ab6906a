"""The mel bank and the spectrogram against Whisper's own: its filters, and its few lines of torch in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from glowflow.config.media import AudioConfig
from glowflow.data.processors import mel
from glowflow.data.processors.mel import log_mel, mel_bank


def written_out_bank(rate: int, n_fft: int, mels: int, fmin: float, fmax: float) -> np.ndarray:
    """Slaney's bank, bin by bin."""

    def to_mel(hertz: float) -> float:
        return 3 * hertz / 200 if hertz <= 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    def to_hertz(mel: float) -> float:
        return 200 * mel / 3 if mel <= 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    low, high = to_mel(fmin), to_mel(fmax)
    edges = [to_hertz(low + (high - low) * i / (mels + 1)) for i in range(mels + 2)]
    bank = np.zeros((mels, n_fft // 2 + 1))
    for m in range(mels):
        left, middle, right = edges[m : m + 3]
        for k in range(n_fft // 2 + 1):
            hertz = k * rate / n_fft
            if left < hertz <= middle:
                bank[m, k] = (hertz - left) / (middle - left)
            elif middle < hertz < right:
                bank[m, k] = (right - hertz) / (right - middle)
            bank[m, k] *= 2 / (right - left)
    return bank


def whisper(samples: np.ndarray, config: AudioConfig) -> np.ndarray:
    """whisper/audio.py's log_mel_spectrogram, in float64, frames first."""
    fmax = config.fmax or config.rate / 2
    bank = torch.from_numpy(written_out_bank(config.rate, config.n_fft, config.mels, config.fmin, fmax))
    window = torch.hann_window(config.n_fft, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(samples).double(), config.n_fft, config.hop, window=window, return_complex=True
    )
    power = bank @ spectrum[..., :-1].abs() ** 2
    levels = torch.clamp(power, min=1e-10).log10()
    levels = torch.maximum(levels, levels.max() - 8.0)
    return ((levels + 4.0) / 4.0).T.numpy()


def noise(length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(length)
    return (0.1 * rng.standard_normal(length) * (time % 997 > 400) + np.sin(time * 0.1)).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_the_bank_is_whispers(mels: int, glowflow_data: Path) -> None:
    path = glowflow_data / "whisper-assets" / "mel_filters.npz"
    if not path.is_file():
        pytest.skip(f"there is no {path.name}")
    with np.load(path) as filters:
        expected = filters[f"mel_{mels}"]
    found = mel_bank(16_000, 400, mels, 0.0, None)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    # The largest weight is below 0.03: relative to it too.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rate", "n_fft", "mels", "fmin", "fmax"),
    [
        (16_000, 400, 80, 0.0, None),
        (8_000, 256, 40, 60.0, 3_800.0),
        (44_100, 1024, 64, 20.0, None),
        (8_000, 25, 5, 0.0, 900.0),
    ],
)
def test_the_bank_is_slaneys_formula(rate: int, n_fft: int, mels: int, fmin: float, fmax: float | None) -> None:
    found = mel_bank(rate, n_fft, mels, fmin, fmax)
    np.testing.assert_allclose(found, written_out_bank(rate, n_fft, mels, fmin, fmax or rate / 2), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mels": 128},
        {"rate": 8000, "n_fft": 256, "hop": 80, "mels": 40, "fmin": 50.0, "fmax": 3500.0},
        {"n_fft": 200, "hop": 200},
    ],
)
@pytest.mark.parametrize("length", [1600, 7777, 16_000])
def test_the_spectrogram_is_whispers(keys: dict, length: int) -> None:
    config = AudioConfig(**keys)
    samples = noise(length)
    found = log_mel(samples, config)
    assert found.dtype == np.float32
    assert found.shape == (length // config.hop, config.mels)
    np.testing.assert_allclose(found, whisper(samples, config), atol=1e-5)


def test_natural_logarithm_mean_and_deviation() -> None:
    samples = noise(4000)
    plain = AudioConfig(log="log")
    bank = written_out_bank(16_000, 400, 80, 0, 8000)
    padded = np.pad(samples.astype(float), 200, mode="reflect")
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    for frame in (0, 3, 24):
        spectrum = np.abs(np.fft.fft(padded[160 * frame : 160 * frame + 400] * window)[:201]) ** 2
        np.testing.assert_allclose(log_mel(samples, plain)[frame], np.log(bank @ spectrum + 1e-6), atol=1e-5)
    scaled = log_mel(samples, AudioConfig(log="log", mean=-3.0, std=2.5))
    np.testing.assert_allclose(scaled, (log_mel(samples, plain) + 3) / 2.5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 100, 159, 160, 161, 319, 320])
@pytest.mark.parametrize("n_fft", [160, 401, 1024])
def test_short_recordings_have_a_frame(length: int, n_fft: int) -> None:
    config = AudioConfig(n_fft=n_fft, mels=10)
    found = log_mel(noise(length), config)
    assert found.shape == (max(1, length // 160), 10)
    assert np.isfinite(found).all()


def test_silence_is_finite() -> None:
    assert (log_mel(np.zeros(800, np.float32), AudioConfig()) == -1.5).all()


def test_long_recordings_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AudioConfig()
    samples = noise(8000)
    whole = log_mel(samples, config)
    monkeypatch.setattr(mel, "_BLOCK", 7)
    assert (log_mel(samples, config) == whole).all()
