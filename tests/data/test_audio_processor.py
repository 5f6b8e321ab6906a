"""Recordings become spectrograms of the promised length: cut, padded, trimmed, resampled, mono; by examples and
properties."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from glowflow.config.media import AudioConfig, SpecAugmentConfig
from glowflow.data.processors import audio
from glowflow.data.processors.audio import AudioProcessor, audio_facts, check_audio
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.mel import log_mel

LIMIT = 3600.0


def waves(length: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(length)[:, None]
    return 0.3 * np.sin(time * rng.uniform(0.01, 0.3, channels)) + 0.05 * rng.standard_normal((length, channels))


def encode(samples: np.ndarray, rate: int = 8000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, subtype, format=kind)
    return stream.getvalue()


def prepare(data: bytes, seed: int | None = None, **keys: Any) -> np.ndarray:
    config = AudioConfig(**keys)
    rng = None if seed is None else np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    features = AudioProcessor(config).features(data, rng)
    assert features.dtype == np.float32
    assert features.shape == (config.num_frames(*audio_facts(data, LIMIT)), config.mels)
    assert np.isfinite(features).all()
    return features


def samples_of(data: bytes, **keys: Any) -> np.ndarray:
    config = AudioConfig(**keys)
    samples = AudioProcessor(config).samples(data)
    assert samples.dtype == np.float32
    assert samples.shape == (config.num_samples(*audio_facts(data, LIMIT)),)
    return samples


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 3e-2),
        ("WAVEX", "PCM_16", 1e-4),
        ("RF64", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("AIFF", "PCM_16", 1e-4),
        ("AU", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.2),
    ],
)
def test_formats(kind: str, subtype: str, error: float) -> None:
    wave = waves(3000)
    data = encode(wave, kind=kind, subtype=subtype)
    assert audio_facts(data, LIMIT) == check_audio(data, AudioConfig()) == (3000, 8000)
    np.testing.assert_allclose(samples_of(data, rate=8000), wave[:, 0], atol=error)


def test_mp3_where_it_can_be_read() -> None:
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    data = encode(waves(16_000), 16_000, "MP3")
    assert data[:3] == b"ID3" or data[0] == 0xFF
    samples, rate = check_audio(data, AudioConfig())
    assert rate == 16_000
    assert prepare(data).shape == (samples // 160, 80)


def test_channels_are_averaged() -> None:
    wave = waves(2000, 3)
    data = encode(wave, subtype="FLOAT")
    assert audio_facts(data, LIMIT) == (2000, 8000)
    np.testing.assert_allclose(samples_of(data, rate=8000), wave.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "wanted"),
    [(8000, 16_000), (44_100, 16_000), (16_000, 8000), (22_050, 8000), (1000, 999), (44_101, 16_000)],
)
@pytest.mark.parametrize("length", [1, 2, 997, 5000])
def test_resampling_is_scipys(rate: int, wanted: int, length: int) -> None:
    wave = waves(length)
    found = samples_of(encode(wave, rate, subtype="FLOAT"), rate=wanted)
    expected = resample_poly(wave[:, 0].astype(np.float32).astype(float), wanted, rate)
    assert len(found) == math.ceil(length * wanted / rate) == len(expected)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("rate", [8000, 16_000, 11_025, 47_999])
def test_of_a_long_recording_only_the_beginning_is_read(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = waves(4 * rate)
    data = encode(wave, rate, subtype="FLOAT")
    whole = samples_of(data, max_seconds=5.0)
    reads: list[int] = []
    read = soundfile.SoundFile.read

    def counted(self: Any, frames: int = -1, *args: Any, **keys: Any) -> Any:
        reads.append(frames)
        return read(self, frames, *args, **keys)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    found = samples_of(data, max_seconds=1.0)
    assert len(found) == 16_000
    np.testing.assert_allclose(found, whole[:16_000], atol=1e-6)
    assert sum(reads) < 1.1 * rate


def test_reading_in_blocks_is_reading_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(waves(5000, 2), subtype="FLOAT")
    keys: dict[str, Any] = {"rate": 8000, "trim_db": 30.0}
    whole = samples_of(data, **keys)
    monkeypatch.setattr(audio, "_BLOCK", 300)
    assert (samples_of(data, **keys) == whole).all()


def test_padding_with_silence() -> None:
    wave = waves(1000)
    found = samples_of(encode(wave, subtype="FLOAT"), rate=8000, pad=True, max_seconds=0.5)
    assert len(found) == 4000
    np.testing.assert_allclose(found[:1000], wave[:, 0], atol=1e-6)
    assert (found[1000:] == 0).all()
    assert prepare(encode(wave), pad=True, max_seconds=30).shape == (3000, 80)


def test_trimming_moves_the_sound_to_the_start() -> None:
    wave = np.concatenate([1e-4 * waves(1600), waves(2400), 1e-4 * waves(800)])
    data = encode(wave, subtype="FLOAT")
    keys: dict[str, Any] = {"rate": 8000, "hop": 80, "n_fft": 256}
    found = samples_of(data, trim_db=40.0, **keys)
    np.testing.assert_allclose(found[:2400], wave[1600:4000, 0], atol=1e-6)
    assert (found[2400:] == 0).all()
    # What is above the limit stays, and so does everything where nothing is louder than anything else.
    np.testing.assert_allclose(samples_of(data, trim_db=120.0, **keys), wave[:, 0], atol=1e-6)
    assert (samples_of(encode(np.zeros(999)), trim_db=20.0, **keys) == 0).all()
    # Sound that begins after `max_seconds` is found.
    assert np.abs(samples_of(data, trim_db=40.0, max_seconds=0.1, **keys)).max() > 0.2


def test_features_are_the_spectrogram_of_the_samples() -> None:
    data = encode(waves(4000, 2), 22_050)
    config = AudioConfig(mels=40, log="log", mean=-2.0, std=3.0)
    processor = AudioProcessor(config)
    assert (processor.features(data) == log_mel(processor.samples(data), config)).all()
    assert processor.blank(7).shape == (7, 40)


def test_masks_hold_the_mean() -> None:
    data = encode(waves(8000))
    keys: dict[str, Any] = {"rate": 8000, "hop": 80, "n_fft": 256, "mels": 40}
    plain = prepare(data, **keys)
    assert (prepare(data, 1, **keys) == plain).all()
    augment = {"time_masks": 2, "time_width": 10, "frequency_masks": 1, "frequency_width": 5}
    assert (prepare(data, None, augment=augment, **keys) == plain).all()
    masked_frames, masked_mels = [], []
    for seed in range(60):
        found = prepare(data, seed, augment=augment, **keys)
        changed = found != plain
        frames, mels = changed.all(1), changed.all(0)
        assert (changed == (frames[:, None] | mels)).all()
        np.testing.assert_allclose(found[changed], plain.mean(), atol=1e-6)
        masked_frames.append(int(frames.sum()))
        masked_mels.append(int(mels.sum()))
    assert min(masked_frames) < 4
    assert 14 < max(masked_frames) <= 20
    assert {0, 1, 2, 3, 4, 5} == set(masked_mels)


def test_masks_wider_than_the_recording() -> None:
    augment = {"time_masks": 3, "time_width": 1000, "frequency_masks": 3, "frequency_width": 1000}
    for seed in range(20):
        prepare(encode(waves(300)), seed, augment=augment)


@settings(max_examples=80)
@given(
    length=st.integers(1, 3000),
    rate=st.sampled_from([100, 4000, 8000, 11_025, 44_100, 96_000, 12_347]),
    channels=st.integers(1, 3),
    subtype=st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "FLOAT"]),
    wanted=st.sampled_from([500, 8000, 16_000, 7919]),
    n_fft=st.integers(16, 300),
    hop=st.integers(1, 300),
    mels=st.integers(1, 40),
    seconds=st.sampled_from([0.001, 0.05, 0.3]),
    pad=st.booleans(),
    trim=st.sampled_from([None, 0.5, 40.0]),
    log=st.sampled_from(["whisper", "log"]),
    masks=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_a_pure_function_of_bytes_settings_and_seed(
    length: int,
    rate: int,
    channels: int,
    subtype: str,
    wanted: int,
    n_fft: int,
    hop: int,
    mels: int,
    seconds: float,
    pad: bool,
    trim: float | None,
    log: Any,
    masks: int,
    seed: int,
) -> None:
    data = encode(waves(length, channels, seed % 97), rate, subtype=subtype)
    augment = SpecAugmentConfig(time_masks=masks, frequency_masks=masks)
    keys: dict[str, Any] = {
        "rate": wanted,
        "n_fft": n_fft,
        "hop": min(hop, n_fft),
        "mels": mels,
        "max_seconds": seconds,
    }
    keys |= {"pad": pad, "trim_db": trim, "log": log, "augment": augment}
    assert audio_facts(data, LIMIT) == (length, rate)
    assert (prepare(data, seed, **keys) == prepare(bytes(bytearray(data)), seed, **keys)).all()
    samples_of(data, **keys)


def test_length_is_limited_by_the_header() -> None:
    data = encode(waves(8000))
    assert audio_facts(data, 1.0) == (8000, 8000)
    with pytest.raises(BadSample, match=r"audio_too_long: WAV of 1\.0 s; at most 0\.9 s"):
        audio_facts(data, 0.9)
    with pytest.raises(BadSample, match="audio_too_long"):
        AudioProcessor(AudioConfig(max_file_seconds=0.9)).features(data)


def test_samples_as_large_as_they_get() -> None:
    loud = np.full(3000, np.finfo(np.float32).max)
    loud[::7] *= -1
    prepare(encode(loud, 16_000, subtype="FLOAT"))
    with pytest.raises(BadSample, match=r"audio_not_finite: .*too large"):
        prepare(encode(loud, 44_100, subtype="FLOAT"))
