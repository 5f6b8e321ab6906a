"""Batches of the shapes that a config leads to, without any content: for estimates of memory.

A row is as long as ``data.context`` and has one medium of each modality that the model reads, prepared at its largest
size. What a real batch holds is mostly less; a sample of many media is more.
"""

from __future__ import annotations

from typing import Any

import torch

from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, Modality

__all__ = ["ASSUMED_SIDE", "fake_batch", "media_sizes"]

ASSUMED_SIDE = 512
"""Side of a picture that keeps its own size, where ``data.image.longest`` sets no limit."""


def media_sizes(config: GlowFlowConfig) -> dict[str, tuple[int, ...]]:
    """Largest size of a prepared medium of each modality that the model reads: (height, width), or (frames,)."""
    model, data = config.model, config.data
    if not isinstance(model, MultimodalConfig):
        return {}
    side = data.image.longest or ASSUMED_SIDE
    sizes = {
        "image": data.image.output_size(side, side),
        "audio": (data.audio.num_frames(data.audio.max_samples, data.audio.rate),),
    }
    return {name: sizes[name] for name in model.modalities}


def fake_batch(config: GlowFlowConfig, rows: int) -> Batch:
    """A micro-batch of that many rows."""
    length = config.data.context
    integers: dict[str, Any] = {
        name: torch.zeros(rows, length, dtype=torch.int64)
        for name in ("tokens", "targets", "positions", "document_ids")
    }
    batch = Batch(
        **integers,
        loss_weights=torch.ones(rows, length, dtype=torch.float32),
        sample_ids=torch.zeros(rows, dtype=torch.int64),
        reset=torch.zeros(rows, dtype=torch.bool),
        single_document=not config.data.document_mask,
    )
    if isinstance(config.model, MultimodalConfig):
        _add_media(batch, config, config.model)
    return batch


def _add_media(batch: Batch, config: GlowFlowConfig, model: MultimodalConfig) -> None:
    """One medium of each modality in each row, placed while there is room in the row."""
    rows, length = batch.tokens.shape
    free = length - 1
    channels = {"image": config.data.image.channels, "audio": config.data.audio.mels}
    for name, size in media_sizes(config).items():
        slots = min(getattr(model, name).num_tokens(*size), free) if model.places_media else 0
        free -= slots
        shape = (channels[name], *size) if name == "image" else (*size, channels[name])
        numbers = torch.zeros(rows, dtype=torch.int64)
        batch.modalities[name] = Modality(
            features=torch.zeros(rows, *shape, dtype=torch.float32),
            sizes=torch.ones(rows, len(size), dtype=torch.int64),
            present=torch.ones(rows, dtype=torch.bool),
            sample_index=numbers,
            positions=numbers,
            row_items=numbers[:, None],
            slot_index=torch.zeros(rows * slots, dtype=torch.int64),
            token_index=torch.zeros(rows * slots, dtype=torch.int64),
        )
    batch.single_document = True
    batch.readout = torch.full((rows,), length - 1)
    batch.text_index = torch.zeros(rows * (free + 1), dtype=torch.int64)
