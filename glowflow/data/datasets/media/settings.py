"""What decides how the samples of a source with media are read and checked; part of the key of its build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from glowflow.config.media import AudioConfig, ImageConfig
from glowflow.config.schema import DataConfig

__all__ = ["SampleSettings"]


@dataclass(frozen=True)
class SampleSettings:
    """The keys of the data section that a build depends on.

    Args:
        text, image, audio, label, group: ``data.columns``; None: found by their usual names.
        prompt, template: as in the config.
        on_bad: ``data.on_bad_sample``.
        max_pixels, max_file_seconds: what is larger is a bad sample. Other settings of the processors count only when
            samples are read.
    """

    text: str | None = None
    image: str | None = None
    audio: str | None = None
    label: str | None = None
    group: str | None = None
    prompt: str | None = None
    template: str | None = None
    on_bad: str = "error"
    max_pixels: int = 178_956_970
    max_file_seconds: float = 3600.0

    @classmethod
    def from_config(cls, config: DataConfig) -> SampleSettings:
        """The part of a config that counts here."""
        return cls(
            **config.columns.model_dump(),
            prompt=config.prompt,
            template=config.template,
            on_bad=config.on_bad_sample,
            max_pixels=config.image.max_pixels,
            max_file_seconds=config.audio.max_file_seconds,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SampleSettings:
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def columns(self) -> dict[str, str]:
        """The mapped columns, part -> name."""
        parts = ("text", "image", "audio", "label", "group")
        return {part: name for part in parts if (name := getattr(self, part)) is not None}

    @property
    def maps(self) -> bool:
        """Whether the config says anything of columns: then files of plain rows are samples too."""
        return bool(self.columns) or self.prompt is not None or self.template is not None

    def image_config(self) -> ImageConfig:
        """For checking pictures: their limits, and nothing of how they will be prepared."""
        return ImageConfig(max_pixels=self.max_pixels)

    def audio_config(self) -> AudioConfig:
        """For checking recordings."""
        return AudioConfig(max_file_seconds=self.max_file_seconds)
