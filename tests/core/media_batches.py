"""Small batches with media, made without any data: what a collate function would give.

A row is a list of token ids and ``Item``s; an item stands where its placeholder would. Fusions that place media get
one slot for each token of an item, the others one placeholder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, Modality

__all__ = ["CHANNELS", "VOCABULARY", "Item", "Row", "media_batch", "media_config", "media_rows", "picture", "sound"]

VOCABULARY = 37
MEDIA_IDS = {"image": 35, "audio": 36}
CHANNELS = {"image": 3, "audio": 6}
SMALL: dict[str, Any] = {"arch": "multimodal", "dim": 32, "depth": 2, "heads": 4, "ffn_dim": 40}
IMAGE: dict[str, Any] = {"encoder": "vit", "patch": 4, "depth": 1, "heads": 2}
AUDIO: dict[str, Any] = {"encoder": "conv", "channels": [8, 12], "depth": 1, "heads": 2}


@dataclass(frozen=True)
class Item:
    """One medium: (C, H, W) pixels or (F, M) frames."""

    modality: str
    features: Tensor
    present: bool = True


Row = list[int | Item]


def media_config(**model: Any) -> GlowFlowConfig:
    """A small model with both modalities; ``image=None`` or ``audio=None`` leaves one out."""
    section = {**SMALL, "vocab_size": VOCABULARY, "image": IMAGE, "audio": AUDIO, **model}
    if section.get("task") == "classification":
        section.setdefault("num_classes", 5)
    return GlowFlowConfig(model=section, data={"context": 64, "audio": {"mels": CHANNELS["audio"]}})


def picture(seed: int, height: int = 8, width: int = 8, present: bool = True) -> Item:
    """Random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Item("image", torch.randn(CHANNELS["image"], height, width, generator=generator), present)


def sound(seed: int, frames: int = 7, present: bool = True) -> Item:
    """Random frames."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return Item("audio", torch.randn(frames, CHANNELS["audio"], generator=generator), present)


def media_rows() -> list[Row]:
    """Every subset of the modalities, several media in a row, another order, and some that are not present."""
    return [
        [1, picture(0), 2, 3, sound(0), 4, 5, 6],
        [1, 7, 8, 9, 10],
        [1, sound(1, frames=4), 11, 12],
        [1, 13, picture(1, height=12, width=5), 14, picture(2), 15],
        [1, picture(3, present=False), sound(2), 16, 17],
        [1, sound(3, present=False), 18, picture(4, height=4), sound(4, frames=5), 19],
    ]


def media_batch(
    config: MultimodalConfig, rows: Sequence[Row], *, length: int | None = None, blanks: int = 0, seed: int = 0
) -> Batch:
    """One micro-batch.

    Args:
        config: of the model, for slots, modalities and task.
        rows: the samples. A modality that the model does not read keeps its placeholder.
        length: T; default: the longest row, rounded up to a multiple of 8.
        blanks: blank items of no row beside those that are needed.
        seed: of targets and weights.
    """
    expanded = [_expanded(config, row) for row in rows]
    length = length or max(8, -(-max(len(ids) for ids, _ in expanded) // 8) * 8)
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in expanded])
    lengths = torch.tensor([len(ids) for ids, _ in expanded])
    modalities = {
        name: _modality(config, name, [places for _, places in expanded], length, blanks) for name in config.modalities
    }
    is_text = torch.ones(tokens.numel(), dtype=torch.bool)
    for modality in modalities.values():
        is_text[modality.slot_index] = False
    targets, weights = _targets(config, tokens, lengths, seed)
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=weights,
        positions=torch.arange(length).expand_as(tokens),
        document_ids=torch.zeros_like(tokens),
        sample_ids=torch.arange(len(rows)),
        reset=torch.zeros(len(rows), dtype=torch.bool),
        single_document=True,
        modalities=modalities,
        readout=lengths - 1,
        text_index=is_text.nonzero().squeeze(1),
    )


def _expanded(config: MultimodalConfig, row: Row) -> tuple[list[int], list[tuple[int, Item]]]:
    """Token ids with one id per slot, and the items with the position of each."""
    ids: list[int] = []
    places = []
    for part in row:
        if isinstance(part, Item):
            if part.modality in config.modalities:
                places.append((len(ids), part))
            ids += [MEDIA_IDS[part.modality]] * _slots(config, part)
        else:
            ids.append(part)
    return ids, places


def _slots(config: MultimodalConfig, item: Item) -> int:
    if not config.places_media or item.modality not in config.modalities:
        return 1
    shape = item.features.shape
    encoder = getattr(config, item.modality)
    return int(encoder.num_tokens(*(shape[1:] if item.modality == "image" else shape[:1])))


def _modality(
    config: MultimodalConfig, name: str, places: list[list[tuple[int, Item]]], length: int, blanks: int
) -> Modality:
    found = [(row, place, item) for row, one in enumerate(places) for place, item in one if item.modality == name]
    shape = (CHANNELS[name], 1, 1) if name == "image" else (1, CHANNELS[name])
    blank = Item(name, torch.zeros(shape), present=False)
    items = [item for _, _, item in found] + [blank] * (blanks + (not found))
    features, sizes = _padded(name, items)
    padded = features.shape[2:] if name == "image" else features.shape[1:2]
    tokens = getattr(config, name).num_tokens(*padded)
    slots, sources = [], []
    for number, (row, place, item) in enumerate(found):
        count = _slots(config, item) if config.places_media else 0
        slots += [row * length + place + slot for slot in range(count)]
        sources += [number * tokens + slot for slot in range(count)]
    of_rows = [[number for number, (row, _, _) in enumerate(found) if row == index] for index in range(len(places))]
    widest = max(1, *(len(one) for one in of_rows))
    none = [0] * (len(items) - len(found))
    return Modality(
        features=features,
        sizes=sizes,
        present=torch.tensor([item.present for item in items]),
        sample_index=torch.tensor([row for row, _, _ in found] + none),
        positions=torch.tensor([place for _, place, _ in found] + none),
        row_items=torch.tensor([one + [len(items)] * (widest - len(one)) for one in of_rows]),
        slot_index=torch.tensor(slots, dtype=torch.int64),
        token_index=torch.tensor(sources, dtype=torch.int64),
    )


def _padded(name: str, items: list[Item]) -> tuple[Tensor, Tensor]:
    parts = [item.features for item in items]
    largest = [max(part.shape[dim] for part in parts) for dim in range(parts[0].ndim)]
    features = torch.zeros(len(parts), *largest)
    for whole, part in zip(features, parts, strict=True):
        whole[tuple(slice(size) for size in part.shape)] = part
    dims = (1, 2) if name == "image" else (0,)
    return features, torch.tensor([[part.shape[dim] for dim in dims] for part in parts])


def _targets(config: MultimodalConfig, tokens: Tensor, lengths: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Next tokens with random weights, or a class or a pair at the last position."""
    generator, rows = torch.Generator().manual_seed(seed), len(tokens)
    weights, targets = torch.zeros(tokens.shape), torch.zeros_like(tokens)
    if config.task == "language_modelling":
        targets[:, :-1] = tokens[:, 1:]
        inside = torch.arange(tokens.shape[1]) < lengths[:, None] - 1
        is_text = targets < min(MEDIA_IDS.values())
        drawn = torch.rand(rows, 128, generator=generator)[:, : tokens.shape[1]]  # the same with more padding
        return targets, (inside & is_text) * (0.5 + drawn)
    last = (torch.arange(rows), lengths - 1)
    weights[last] = 1.0
    if config.task == "classification":
        targets[last] = torch.randint(config.num_classes or 2, (rows,), generator=generator)
    return targets, weights
