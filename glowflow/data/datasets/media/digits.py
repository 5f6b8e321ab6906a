"""``digits``: pictures of handwritten digits, each with a second, independent digit as the telephone's tone pair.

The pictures are scikit-learn's copy of the UCI test set (8 x 8, by 43 writers who are not told apart); the tones are
made here. A sample's text names both digits and their sum, so that neither modality alone gives the answer and the
prompt, which is always the same, gives nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.encoding import encode_png, encode_wav
from glowflow.data.datasets.media.samples import Medium, RawSample
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts, row_hash

__all__ = ["COLUMNS", "DEFAULT_PROMPT", "RATE", "layout", "read", "tone"]

COLUMNS = ("text", "label", "picture", "tone", "sum")
DEFAULT_PROMPT = "<image> <audio> "
RATE = 8000
_VERSION = 1  # raise it when the samples become others
_NUM_PICTURES = 1797
_HELD_OUT = 180  # pictures for validation, and as many for the test
_TONES = {"train": 8, "validation": 4, "test": 4}  # samples of one picture, with different tones
_SAMPLES = 1280  # 0.16 s
_PICTURES_PER_EXTENT = 64
_SCALE = 3
_ROW_HZ, _COLUMN_HZ = (697, 770, 852, 941), (1209, 1336, 1477)  # (ITU-T Q.23)


def layout(_folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """What there is (made here, so it has no file), and extents of pictures per split."""
    images, labels = _pictures()
    digest = hashlib.sha256(images.tobytes() + labels.tobytes() + f"version {_VERSION}".encode()).hexdigest()
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for split, tones in _TONES.items():
        numbers = range(len(_split_pictures()[split]))
        for start in numbers[::_PICTURES_PER_EXTENT]:
            end = min(start + _PICTURES_PER_EXTENT, len(numbers))
            size = (end - start) * tones * (2 * _SAMPLES + 200)
            extent = Extent("", split, "samples", start, end, document_id, size, reader="digits")
            splits.setdefault(split, []).append(extent)
            document_id += (end - start) * tones
    size = sum(extent.size for extents in splits.values() for extent in extents)
    return [FileFacts("", "digits", "samples", size, digest, rows=document_id)], splits


@lru_cache(maxsize=1)
def _pictures() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pictures (N, 8, 8) with values 0 to 16, and digits (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


@lru_cache(maxsize=1)
def _split_pictures() -> dict[str, list[int]]:
    """Split -> numbers of its pictures; by the order of hashes, so that each split has all digits and writers."""
    order = sorted(range(_NUM_PICTURES), key=lambda number: row_hash(f"digits:{number}"))
    held = {"validation": order[:_HELD_OUT], "test": order[_HELD_OUT : 2 * _HELD_OUT]}
    return {"train": order[2 * _HELD_OUT :], **held}


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of some pictures of a split."""
    images, digits = _pictures()
    document_id = extent.document_id
    for number in _split_pictures()[extent.name][extent.start : extent.end]:
        group = f"digits/{number:04d}"
        pixels = np.kron((images[number].astype(np.float64) * 255 / 16).round(), np.ones((_SCALE, _SCALE)))
        picture = Medium(encode_png(pixels.astype(np.uint8)), f"{group}.png") if media else None
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_VERSION, number])))
        # A permutation of all ten, cut off: every tone is as likely as another beside any picture.
        for second in rng.permutation(10)[: _TONES[extent.name]].tolist():
            name = f"{group}-{second}"
            sample = RawSample(document_id, name, group, group=group)
            if picture is not None:
                recording = Medium(encode_wav(tone(second, rng), RATE), f"{name}.wav")
                sample = replace(sample, images=(picture,), audio=(recording,))
            yield compose_known(_record(int(digits[number]), second), settings, sample, prompt=DEFAULT_PROMPT)
            document_id += 1


def _record(first: int, second: int) -> dict[str, object]:
    text = f"picture {first} tone {second} sum {first + second}"
    return {"text": text, "label": first + second, "picture": first, "tone": second, "sum": first + second}


def tone(digit: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """The tone pair of a digit as a telephone sends it, (N,): with another level, phase, length and noise each time."""
    row, column = (3, 1) if digit == 0 else divmod(digit - 1, 3)
    length = int(rng.integers(700, 1100))
    offset = int(rng.integers(0, _SAMPLES - length))
    seconds = np.arange(length) / RATE
    samples = rng.normal(0.0, rng.uniform(0.005, 0.02), _SAMPLES)
    for frequency in (_ROW_HZ[row], _COLUMN_HZ[column]):
        phase = rng.uniform(0, 2 * np.pi)
        samples[offset : offset + length] += rng.uniform(0.15, 0.4) * np.sin(2 * np.pi * frequency * seconds + phase)
    return samples
