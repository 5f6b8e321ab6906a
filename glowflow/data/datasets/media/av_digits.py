"""``av-digits``: a handwritten and a spoken digit that are the same, both degraded as in AV-MNIST.

AV-MNIST is described by Vielzeuf et al., CentralNet: a Multilayer Approach for Multimodal Fusion (ECCV workshops 2018).

Pictures of MNIST keep four principal components (about a quarter of the energy), fitted on the 60,000 training
pictures; recordings of FSDD get white noise of four times their power (-6 dB). Train: 6,000 pairs of the pictures
0-54,999 and the recordings of index 10-49; validation: 1,000 of the pictures 55,000-59,999 and index 5-9; test: 2,000
of the test pictures and index 0-4. Every digit has as many pairs as another; no picture is used twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.media import fsdd, idx, mnist
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.encoding import decode_wav, encode_png, encode_wav
from glowflow.data.datasets.media.samples import Medium, RawSample
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts, row_hash
from glowflow.data.processors.bad import BadSample

__all__ = [
    "COLUMNS",
    "NUM_COMPONENTS",
    "SNR_DB",
    "add_noise",
    "degrade",
    "layout",
    "pairs",
    "principal_components",
    "read",
]

COLUMNS = ("text", "label", "digit", "word", "speaker")
NUM_COMPONENTS = 4
SNR_DB = -6.0
_NUM_PAIRS = {"train": 6000, "validation": 1000, "test": 2000}
_VERSION = 1  # raise it when the samples become others
_BYTES = 8000  # of a pair, about
_PAIRS_PER_EXTENT = 1000  # each reads the file of pictures from its beginning
_EXACT_SUM = 256  # products of two bytes: their sum stays below 2^24
_SEPARATOR = "\n"  # between the two folders in an extent's path


def layout(folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """The files of both sets, and extents of pairs per split."""
    pictures, _ = mnist.layout(folders)
    recipe = FileFacts("", "recipe", "samples", 0, f"av-digits {_VERSION} {NUM_COMPONENTS} {SNR_DB}")
    files = [*pictures, fsdd.recordings_facts(folders["fsdd"]), recipe]
    path = _SEPARATOR.join(str(folders[name]) for name in ("mnist", "fsdd"))
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for split in _NUM_PAIRS:
        count = len(pairs(path, split))
        splits[split] = []
        for start in range(0, count, _PAIRS_PER_EXTENT):
            end = min(start + _PAIRS_PER_EXTENT, count)
            place = (document_id + start, (end - start) * _BYTES)
            splits[split].append(Extent(path, split, "samples", start, end, *place, reader="av-digits"))
        document_id += count
    return files, splits


@lru_cache(maxsize=4)
def pairs(path: str, split: str) -> list[tuple[int, str]]:
    """(number of the picture in its file, name of the recording) of a split, in an order that mixes the digits.

    Raises:
        DataError: there are too few pictures or recordings of a digit.
    """
    folders = [Path(part) for part in path.split(_SEPARATOR)]
    file = mnist.picture_files(folders[0])["test" if split == "test" else "train"]
    labels_path = idx.labels_beside(file)
    labels = idx.read_labels(labels_path) if labels_path is not None else np.empty(0, np.uint8)
    cut = len(labels) - mnist.NUM_VALIDATION
    low, high = {"train": (0, cut), "validation": (cut, len(labels)), "test": (0, len(labels))}[split]
    names = fsdd.recordings(folders[1])[split]
    found = []
    for digit in range(10):
        pictures = sorted(
            (low + np.flatnonzero(labels[low:high] == digit)).tolist(), key=lambda n: _rank("mnist", split, n)
        )
        spoken = sorted((name for name in names if name[0] == str(digit)), key=lambda name: _rank("fsdd", split, name))
        wanted = _NUM_PAIRS[split] // 10
        if len(pictures) < wanted or not spoken:
            rule = f"need {wanted} pictures and some recordings of the digit {digit} for the split {split}"
            raise DataError(Problem("data.dataset", f"av-digits: MNIST and FSDD {rule}", (len(pictures), len(spoken))))
        found += [(number, spoken[index % len(spoken)]) for index, number in enumerate(pictures[:wanted])]
    return sorted(found, key=lambda pair: _rank("pair", split, pair[0]))


def _rank(*key: object) -> int:
    return row_hash("av-digits:" + ":".join(map(str, key)))


@lru_cache(maxsize=1)
def principal_components(path: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean (D,) and the first components (K, D) of the training pictures of MNIST in a folder.

    Sums of products of bytes are whole numbers, exact in any order: in float32 over 256 pictures, in float64 over all.
    What the eigenvalue solver leaves to chance is rounded off. So every machine draws the same pictures.
    """
    total, products, count = np.zeros(1), np.zeros((1, 1)), 0
    for block in _blocks(mnist.picture_files(Path(path))["train"]):
        flat = block.reshape(len(block), -1).astype(np.float32)
        total = total + flat.sum(0, dtype=np.float64)
        products = products + flat.T @ flat
        count += len(block)
    mean = total / count
    covariance = products / count - np.outer(mean, mean)
    _, vectors = np.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :NUM_COMPONENTS].T
    signs = np.sign(components[np.arange(NUM_COMPONENTS), np.abs(components).argmax(1)])
    return mean, np.round(components * signs[:, None], 8)


def _blocks(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    block: list[npt.NDArray[np.uint8]] = []
    for pixels in idx.read_pictures(path):
        if isinstance(pixels, BadSample):
            raise DataError(Problem(str(path), pixels.reason, hint="fetch it again"))
        block.append(pixels)
        if len(block) == _EXACT_SUM:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def degrade(pixels_hw: npt.NDArray[np.uint8], basis: tuple[npt.NDArray[np.float64], ...]) -> npt.NDArray[np.uint8]:
    """A picture with only the components of the basis left."""
    mean, components = basis
    coefficients = (components * (pixels_hw.reshape(-1) - mean)).sum(1)
    kept = mean + (coefficients[:, None] * components).sum(0)
    return np.clip(np.round(kept), 0, 255).astype(np.uint8).reshape(pixels_hw.shape)


def add_noise(samples: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """A recording with white noise at -6 dB, drawn from the name of its pair."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_VERSION, row_hash(name)])))
    power = float(np.mean(samples**2)) * 10 ** (-SNR_DB / 10)
    return samples + rng.normal(0.0, np.sqrt(power), len(samples))


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of pairs."""
    folders = [Path(part) for part in extent.path.split(_SEPARATOR)]
    chosen = pairs(extent.path, extent.name)[extent.start : extent.end]
    pictures = _pictures(folders[0], extent.name, [number for number, _ in chosen]) if media else {}
    for index, (number, recording) in enumerate(chosen):
        name = f"av-digits/{extent.name}-{number:05d}-{recording.removesuffix('.wav')}"
        sample = RawSample(extent.document_id + index, name, name, group=recording)
        if media:
            try:
                sample = _with_media(sample, pictures[number], folders[1] / "recordings" / recording)
            except (OSError, ValueError) as error:
                yield replace(sample, bad=BadSample("audio_decode", f"{recording}: {error}"))
                continue
        digit, speaker = int(recording[0]), recording.split("_")[1]
        record = {"text": "", "label": digit, "digit": digit, "word": mnist.WORDS[digit], "speaker": speaker}
        yield compose_known(record, settings, sample)


def _pictures(folder: Path, split: str, numbers: list[int]) -> dict[int, npt.NDArray[np.uint8]]:
    """The degraded pictures of some numbers."""
    basis = principal_components(str(folder))
    wanted, found = set(numbers), {}
    file = mnist.picture_files(folder)["test" if split == "test" else "train"]
    for number, pixels in enumerate(idx.read_pictures(file, 0, max(numbers) + 1)):
        if number in wanted and not isinstance(pixels, BadSample):
            found[number] = degrade(pixels, basis)
    return found


def _with_media(sample: RawSample, pixels: npt.NDArray[np.uint8], recording: Path) -> RawSample:
    samples, rate = decode_wav(recording.read_bytes())
    noisy: npt.NDArray[Any] = add_noise(samples, sample.name)
    picture = Medium(encode_png(pixels), f"{sample.name}.png")
    return replace(sample, images=(picture,), audio=(Medium(encode_wav(noisy, rate), f"{sample.name}.wav"),))
