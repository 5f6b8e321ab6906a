"""Prepared samples of several steps in one buffer: what an item of a Ray stream carries.

Ragged arrays lie one after the other with their lengths beside them, pixels as bytes and spectrograms as float32, so
that taking an item apart copies no medium.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.config.media import MODALITIES
from glowflow.data.payload import pack, unpack
from glowflow.data.samples.sample import PreparedItem, PreparedSample

__all__ = ["pack_samples", "unpack_samples"]

_NUMBERS = ("sample_id", "document_id", "label", "num_prompt")
_TEXTS = ("name", "group", "bad")
_RAGGED = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
_FEATURES = {"image": np.uint8, "audio": np.float32}


def pack_samples(steps: Sequence[Sequence[PreparedSample]], global_weights: NDArray[np.float64]) -> bytes:
    """Pack the rows of some steps, and the weight of each global batch."""
    samples = [sample for step in steps for sample in step]
    items = [(row, item) for row, sample in enumerate(samples) for item in sample.items]
    arrays: dict[str, NDArray[Any]] = {
        "global_weight": np.asarray(global_weights, np.float64),
        "rows": np.array([len(step) for step in steps], np.int64),
        "lengths": np.array([len(sample.tokens) for sample in samples], np.int64),
        "texts": _text_bytes([[getattr(sample, name) for sample in samples] for name in _TEXTS]),
    }
    arrays |= {name: np.array([getattr(sample, name) for sample in samples], np.int64) for name in _NUMBERS}
    arrays |= {name: _joined([getattr(sample, name) for sample in samples], dtype) for name, dtype in _RAGGED.items()}
    columns = [
        (row, MODALITIES.index(item.modality), item.position, item.slots, item.present, *_shape(item))
        for row, item in items
    ]
    arrays["items"] = np.array(columns, np.int64).reshape(-1, 8)
    for name, dtype in _FEATURES.items():
        arrays[name] = _joined([item.features.reshape(-1) for _, item in items if item.modality == name], dtype)
    return pack(arrays)


def unpack_samples(buffer: Any) -> Iterator[tuple[list[PreparedSample], float]]:
    """The rows of each step, and the weight of its global batch; arrays are read-only views where types allow it."""
    arrays = unpack(buffer)
    samples = _samples(arrays)
    _give_media(samples, arrays)
    at = 0
    for rows, weight in zip(arrays["rows"].tolist(), arrays["global_weight"].tolist(), strict=True):
        yield samples[at : at + rows], float(weight)
        at += rows


def _samples(arrays: dict[str, NDArray[Any]]) -> list[PreparedSample]:
    edges = np.cumsum(arrays["lengths"].astype(np.int64))[:-1]
    columns: dict[str, list[Any]] = {
        **{name: np.split(arrays[name].astype(dtype), edges) for name, dtype in _RAGGED.items()},
        **{name: arrays[name].tolist() for name in _NUMBERS},
        **dict(zip(_TEXTS, json.loads(arrays["texts"].tobytes()), strict=True)),
    }
    return [PreparedSample(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _give_media(samples: list[PreparedSample], arrays: dict[str, NDArray[Any]]) -> None:
    flat = {name: arrays[name].astype(dtype, copy=False) for name, dtype in _FEATURES.items()}
    at = dict.fromkeys(MODALITIES, 0)
    for row, modality, position, slots, present, *sides in arrays["items"].tolist():
        name = MODALITIES[modality]
        shape = tuple(sides) if name == "image" else tuple(sides[:2])
        size = int(np.prod(shape))
        features = flat[name][at[name] : at[name] + size].reshape(shape)
        at[name] += size
        samples[row].items.append(PreparedItem(name, features, position, slots, bool(present)))


def _shape(item: PreparedItem) -> tuple[int, int, int]:
    """Three sides: (H, W, C), or (F, M, 1)."""
    first, second, *rest = item.features.shape
    return first, second, rest[0] if rest else 1


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _text_bytes(content: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)
