"""Samples of a micro-batch as one ``Batch``: rows padded behind their end, media of each modality in one padded stack.

Legend: B rows, T positions, N media of a modality, S tokens of each, H height, W width, C channels, F frames, M mels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glowflow.core.batch import Batch, Modality
from glowflow.data.samples.sample import PreparedItem, PreparedSample
from glowflow.data.samples.view import MediaView

__all__ = ["collate"]

_MULTIPLE = 8  # rows are as long as a multiple of this, which attention kernels like


def collate(samples: Sequence[PreparedSample], view: MediaView) -> Batch:
    """Join samples, at least one, to a batch; T is the longest row, rounded up to a multiple of 8.

    Args:
        samples: rows in order.
        view: how they were prepared. Each of its modalities has an entry, with a blank where no row has a medium.
    """
    lengths = [len(sample.tokens) for sample in samples]
    shape = (len(samples), -(-max(lengths) // _MULTIPLE) * _MULTIPLE)
    tokens, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        tokens[row, :length], targets[row, :length] = sample.tokens, sample.targets
        weights[row, :length] = sample.weights
    modalities = {name: _modality(samples, name, view, shape[1]) for name in view.modalities}
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        loss_weights=torch.from_numpy(weights),
        positions=torch.arange(shape[1]).expand(shape).contiguous(),
        document_ids=torch.zeros(shape, dtype=torch.int64),
        sample_ids=_int64([sample.sample_id for sample in samples]),
        reset=torch.ones(len(samples), dtype=torch.bool),
        single_document=True,
        modalities=modalities,
        readout=_int64([length - 1 for length in lengths]),
        text_index=_text_index(shape, modalities),
    )


def _text_index(shape: tuple[int, int], modalities: dict[str, Modality]) -> Tensor:
    free = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    for modality in modalities.values():
        free[modality.slot_index] = False
    return free.nonzero().squeeze(1)


def _modality(samples: Sequence[PreparedSample], name: str, view: MediaView, length: int) -> Modality:
    """All media of a modality. An item that is not present gives every one of its places its first token."""
    rows = [[item for item in sample.items if item.modality == name] for sample in samples]
    items = [item for row in rows for item in row]
    row_items = np.full((len(samples), max(1, *map(len, rows))), len(items) or 1, np.int64)
    number = 0
    for row, own in enumerate(rows):
        row_items[row, : len(own)] = number + np.arange(len(own))
        number += len(own)
    features, sizes = _features(items, name, view)
    each = view.num_tokens(name, sizes.max(axis=0).tolist())
    slot_index, token_index = _places(rows, each, length)
    return Modality(
        features=features,
        sizes=torch.from_numpy(sizes),
        present=torch.tensor([item.present for item in items] or [False]),
        sample_index=_int64([row for row, own in enumerate(rows) for _ in own] or [0]),
        positions=_int64([item.position for item in items] or [0]),
        row_items=torch.from_numpy(row_items),
        slot_index=slot_index,
        token_index=token_index,
    )


def _places(rows: list[list[PreparedItem]], each: int, length: int) -> tuple[Tensor, Tensor]:
    """Flat positions that hold a token of a medium, and which token of the N * S it is."""
    where, which, number = [], [], 0
    for row, own in enumerate(rows):
        for item in own:
            within = np.arange(item.slots)
            where.append(row * length + item.position + within)
            which.append(number * each + (within if item.present else 0 * within))
            number += 1
    return tuple(_int64(np.concatenate(part) if part else []) for part in (where, which))  # type: ignore[return-value]


def _features(items: list[PreparedItem], name: str, view: MediaView) -> tuple[Tensor, NDArray[np.int64]]:
    """Features float32 of all items, padded with 0 to the largest, and their sizes, (N, 2) or (N, 1)."""
    blank = view.blank_size(name)
    dims = len(blank)
    sizes = np.array([item.features.shape[:dims] if item.present else blank for item in items] or [blank], np.int64)
    shape = view.feature_shape(name, sizes.max(axis=0).tolist())
    present = [(index, item.features) for index, item in enumerate(items) if item.present]
    if name == "audio":
        frames = np.zeros((len(sizes), *shape), np.float32)
        for index, one in present:
            frames[index, : len(one)] = one
        return torch.from_numpy(frames), sizes
    return torch.from_numpy(_pixels(present, len(sizes), shape, view)), sizes


def _pixels(
    present: list[tuple[int, NDArray[Any]]], count: int, shape: tuple[int, ...], view: MediaView
) -> NDArray[np.float32]:
    """Normalised pixels (N, C, H, W); behind the edges of a smaller picture, and for blanks, 0."""
    from glowflow.data.processors.image import ImageProcessor

    processor = ImageProcessor(view.image)
    height, width, channels = shape
    if len(present) == count and all(one.shape == shape for _, one in present):
        return processor.normalize(np.stack([one for _, one in present]))
    pixels = np.zeros((count, channels, height, width), np.float32)
    for index, one in present:
        pixels[index, :, : one.shape[0], : one.shape[1]] = processor.normalize(one[None])[0]
    return pixels


def _int64(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64))
