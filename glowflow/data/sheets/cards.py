"""What stands on a contact sheet, before it is drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

__all__ = ["Card", "Medium", "Run", "Sheet", "Style", "runs"]

Style = Literal["prompt", "text", "image", "audio"]
Run = tuple[str, Style]
_MODALITY = {"<image>": "image", "<audio>": "audio"}
_HIDDEN = str.maketrans({**dict.fromkeys(range(32), "�"), 9: "→", 10: "\n", 13: "\u240d", 127: "\ufffd"})


@dataclass(frozen=True)
class Medium:
    """One picture or recording.

    Args:
        modality: image or audio.
        raw: of the file: ``375 × 500``, or ``0.43 s at 8 kHz``.
        prepared: what the model gets: ``64 × 64``, or ``26 frames × 80 mels``.
        array: pixels (H, W, C) uint8, or a log-mel spectrogram (F, M) float32; None where it cannot be prepared.
        seconds: of the prepared recording.
        hertz: lowest and highest frequency of the spectrogram.
        slots: tokens that it takes in the sequence.
        reason: why it cannot be prepared, or is not read.
    """

    modality: str
    raw: str
    prepared: str = ""
    array: npt.NDArray[Any] | None = None
    seconds: float = 0.0
    hertz: tuple[float, float] = (0.0, 0.0)
    slots: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Card:
    """One sample.

    Args:
        number: its document id.
        source: file and place that it came from.
        prompt: the beginning, on which there is no loss.
        text: the rest; both hold placeholders.
        tokens: of the row, with one token per placeholder; ``length`` with all slots of the media.
        bad: why the sample is a blank.
    """

    number: int
    source: str
    prompt: str
    text: str
    label: str | None
    group: str | None
    tokens: int
    length: int
    media: tuple[Medium, ...]
    bad: str = ""

    @property
    def facts(self) -> tuple[str, ...]:
        """Label, group and counts, each in a few words."""
        told = [f"label {self.label}"] if self.label is not None else []
        told += [f"group {self.group}"] if self.group is not None else []
        longer = f", {self.length:,} with media" if self.length != self.tokens else ""
        return (*told, f"{self.tokens:,} tokens{longer}")


@dataclass(frozen=True)
class Sheet:
    """A heading, lines that say how the samples were prepared, and the samples."""

    title: str
    notes: tuple[str, ...]
    cards: tuple[Card, ...]


def runs(card: Card, placeholders: Sequence[str] = tuple(_MODALITY)) -> list[Run]:
    """The text in pieces of one style; characters that print nothing are made visible."""
    found: list[Run] = []
    pattern = re.compile("|".join(re.escape(name) for name in placeholders))
    styled: tuple[Run, ...] = ((card.prompt, "prompt"), (card.text, "text"))
    for text, style in styled:
        end = 0
        for match in pattern.finditer(text):
            found.append((text[end : match.start()], style))
            found.append((match.group(), "image" if _MODALITY[match.group()] == "image" else "audio"))
            end = match.end()
        found.append((text[end:], style))
    return [(text.translate(_HIDDEN), style) for text, style in found if text]
