"""From the rows of a split to the cards of a sheet: media through the processors, texts decoded from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES, AudioConfig, ImageConfig
from glowflow.data.manifest import Manifest
from glowflow.data.order import permutation
from glowflow.data.shards import read_rows
from glowflow.data.sheets.cards import Card, Medium, Sheet

if TYPE_CHECKING:
    from glowflow.config.schema import GlowFlowConfig
    from glowflow.data.processors.text import Tokenizer

__all__ = ["SheetOptions", "sheet_of"]

_TEXT_COLUMNS = ["document_id", "tokens", "num_prompt", "source", "label", "group", "bad"]
_MEDIA_COLUMNS = {"image": ("images", "image_sizes"), "audio": ("audio", "audio_lengths")}
_PREVIEW = ImageConfig(size=None, longest=192)  # without a config: pictures keep their shape


@dataclass(frozen=True)
class SheetOptions:
    """What is shown.

    Args:
        samples: how many, drawn at random, but always the same ones.
        split: of the data set; None: ``data.train_split``, or the first there is.
        augment: change pictures and recordings as in the first epoch of training.
    """

    samples: int = 12
    split: str | None = None
    augment: bool = False


def sheet_of(manifest: Manifest, options: SheetOptions, config: GlowFlowConfig | None = None) -> Sheet:
    """Read and prepare some samples of a split.

    Args:
        config: whose ``data.image`` and ``data.audio`` prepare them, and whose encoders give their slots; None: the
            defaults, but pictures in their own shape.

    Raises:
        DataError: the data set has no media, no such split, or a shard cannot be read.
    """
    if not manifest.media:
        raise DataError(Problem(str(manifest.path), "holds text alone: a contact sheet needs pictures or recordings"))
    split = options.split or _first_split(manifest, config)
    rows = manifest.split(split).rows
    shown = min(options.samples, rows)
    preparing = _Preparing.of(config, options.augment)
    tokenizer = manifest.tokenizer()
    cards = tuple(_card(row, tokenizer, preparing) for row in _rows(manifest, split, shown))
    title = f"{manifest.name}: {shown:,} of {rows:,} samples of the split {split}"
    return Sheet(title, preparing.notes(), cards)


def _first_split(manifest: Manifest, config: GlowFlowConfig | None) -> str:
    wanted = config.data.train_split if config is not None else "train"
    return wanted if wanted in manifest.splits else next(iter(manifest.splits))


def _rows(manifest: Manifest, split: str, count: int) -> Iterator[dict[str, Any]]:
    """``count`` rows drawn at random, in their order; only the row groups that hold them are opened."""
    wanted = sorted(permutation(manifest.splits[split].rows, 0)[:count].tolist())
    columns = [*_TEXT_COLUMNS, *(column for pair in _MEDIA_COLUMNS.values() for column in pair)]
    start = 0
    for index, shard in enumerate(manifest.splits[split].shards):
        for group, info in enumerate(shard.row_groups):
            here = [row - start for row in wanted if start <= row < start + info.rows]
            start += info.rows
            if here:
                yield from read_rows(manifest, split, index, group, columns).take(here).to_pylist()


@dataclass(frozen=True)
class _Preparing:
    """How media are prepared and how many tokens each takes."""

    image: ImageConfig
    audio: AudioConfig
    modalities: tuple[str, ...]
    slots: Callable[[str, tuple[int, int]], int]
    augment: bool
    seed: int

    @classmethod
    def of(cls, config: GlowFlowConfig | None, augment: bool) -> _Preparing:
        from glowflow.data.samples.view import MediaView, media_view

        if config is None:
            return cls(_PREVIEW, AudioConfig(), MODALITIES, MediaView().slots, augment, 0)
        view, data, seed = media_view(config, training=augment), config.data, config.training.seed
        if not view.modalities:  # a model of text alone
            return cls(data.image, data.audio, MODALITIES, view.slots, augment, seed)
        return cls(view.image, view.audio, view.modalities, view.slots, augment, seed)

    def notes(self) -> tuple[str, ...]:
        """The settings, in a line each."""
        image, audio = self.image, self.audio
        if image.size is None:
            size = f"at most {image.longest} a side" if image.longest else "their own size"
        else:
            height, width = (image.size, image.size) if isinstance(image.size, int) else image.size
            size = f"{height} × {width}, {image.fit}"
        mel = f"{audio.mels} mels, a frame every {1000 * audio.hop / audio.rate:g} ms"
        changed = "changed as in training" if self.augment else "without the changes of training"
        return (
            f"pictures: {size}, {image.color}; recordings: {_kilohertz(audio.rate)}, {mel}; {changed}",
            "text as decoded from its tokens; grey: the prompt, on which there is no loss",
        )


def _card(row: dict[str, Any], tokenizer: Tokenizer, preparing: _Preparing) -> Card:
    tokens, prompt = row["tokens"], row["num_prompt"]
    end = len(tokens) - (len(tokens) > prompt and tokens[-1] in (tokenizer.eos_id, tokenizer.bos_id))
    media = tuple(_media(row, preparing))
    before, whole = tokenizer.decode(tokens[1:prompt]), tokenizer.decode(tokens[1:end])
    return Card(
        number=row["document_id"],
        source=row["source"] or "",
        prompt=before,
        # Cut from the whole: between words there may be a space that belongs to none of them.
        text=whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens[prompt:end]),
        label=row["label"],
        group=row["group"],
        tokens=len(tokens),
        length=len(tokens) + sum(medium.slots - 1 for medium in media),
        media=media,
        bad=row["bad"] or "",
    )


def _media(row: dict[str, Any], preparing: _Preparing) -> Iterator[Medium]:
    from glowflow.data.processors.bad import BadSample

    for modality, (column, facts_column) in _MEDIA_COLUMNS.items():
        for number, (file, facts) in enumerate(zip(row[column], row[facts_column], strict=True)):
            prepare = _picture if modality == "image" else _recording
            try:
                if file["bytes"] is None:
                    raise BadSample("no_data", "the shard has no bytes of it")
                yield prepare(file["bytes"], tuple(facts.values()), preparing, (row["document_id"], number))
            except BadSample as bad:
                yield Medium(modality, _raw(modality, tuple(facts.values())), reason=f"{bad.kind}: {bad.reason}")


def _picture(content: bytes, facts: tuple[int, int], preparing: _Preparing, key: tuple[int, int]) -> Medium:
    from glowflow.data.processors.image import ImageProcessor

    pixels = ImageProcessor(preparing.image).pixels(content, _generator(preparing, key))
    return Medium(
        "image",
        _raw("image", facts),
        f"{pixels.shape[0]} × {pixels.shape[1]}",
        pixels,
        slots=preparing.slots("image", facts),
        reason="" if "image" in preparing.modalities else "not read by the model",
    )


def _recording(content: bytes, facts: tuple[int, int], preparing: _Preparing, key: tuple[int, int]) -> Medium:
    from glowflow.data.processors.audio import AudioProcessor

    audio = preparing.audio
    frames = AudioProcessor(audio).features(content, _generator(preparing, key))
    return Medium(
        "audio",
        _raw("audio", facts),
        f"{frames.shape[0]} × {frames.shape[1]}",
        frames,
        seconds=frames.shape[0] * audio.hop / audio.rate,
        hertz=(audio.fmin, audio.fmax or audio.rate / 2),
        slots=preparing.slots("audio", facts),
        reason="" if "audio" in preparing.modalities else "not read by the model",
    )


def _generator(preparing: _Preparing, key: tuple[int, int]) -> np.random.Generator | None:
    if not preparing.augment:
        return None
    from glowflow.data.order import generator

    document, number = key
    return generator(preparing.seed, 0, 0, document, number)


def _raw(modality: str, facts: tuple[int, int]) -> str:
    first, second = facts
    return f"{first} × {second}" if modality == "image" else f"{first / second:.2f} s at {_kilohertz(second)}"


def _kilohertz(rate: int) -> str:
    return f"{rate / 1000:g} kHz"
