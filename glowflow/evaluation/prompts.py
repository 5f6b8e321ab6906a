"""Prompts with pictures and recordings: prepared and collated as the samples of an evaluation are.

A placeholder of the prompt stands for the next file of its modality; a prompt without any placeholder gets them in
front, pictures first. Each medium then takes as many places as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import ConfigError, DataError, Problem
from glowflow.config.media import MODALITIES, PLACEHOLDERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.data.order import LRU
from glowflow.data.processors.audio import AudioProcessor, audio_facts
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.image import ImageProcessor, image_facts
from glowflow.data.processors.media_text import MediaTokenizer, count_placeholders
from glowflow.data.processors.text import Tokenizer
from glowflow.data.samples.collate import collate
from glowflow.data.samples.sample import PreparedItem, PreparedSample
from glowflow.data.samples.sequence import Place, Sequencer
from glowflow.data.samples.view import media_view

if TYPE_CHECKING:
    from glowflow.core.batch import Batch

__all__ = ["Media", "MediaPrompt", "MediaPrompts", "require_writing"]

File: TypeAlias = "str | Path | bytes"
_SHOWN = 10  # problems of many prompts
_MOST_BYTES = 1 << 30  # of one file
_KEPT_BYTES = 1 << 28  # of prepared media that are not prepared again
_WHOLE = 1 << 40  # a context in which nothing is cut off
_NAMES = {"image": ("picture", "pictures"), "audio": ("recording", "recordings")}
_KEYS = {"image": "images", "audio": "audio"}


@dataclass(frozen=True)
class Media:
    """The files of one prompt, in the order of its placeholders: paths, or a file's bytes."""

    images: Sequence[File] | File = ()
    audio: Sequence[File] | File = ()

    def of(self, modality: str) -> list[File]:
        """Those of ``image`` or ``audio``."""
        files = self.images if modality == "image" else self.audio
        return [files] if isinstance(files, (str, Path, bytes)) else list(files)

    def __bool__(self) -> bool:
        return any(self.of(modality) for modality in MODALITIES)


@dataclass(frozen=True)
class _Item:
    """A file and its place in the prompt."""

    name: str
    file: File
    place: Place


@dataclass(frozen=True)
class MediaPrompt:
    """A prompt as the model reads it: ``ids`` with all places of its media; no two have the same ``number``."""

    number: int
    ids: list[int]
    items: tuple[_Item, ...]


def require_writing(config: GlowFlowConfig) -> None:
    """Refuse a model that does not write.

    Raises:
        ConfigError: it classifies, or compares texts with media.
    """
    task = getattr(config.model, "task", "language_modelling")
    if task != "language_modelling":
        rule = f"the model was trained for {task}: there is nothing to generate"
        raise ConfigError(Problem("model.task", rule, hint="measure it with `glowflow eval`"))


class MediaPrompts:
    """Prepares prompts for one model.

    Args:
        config: the whole config that it was trained with.
        tokenizer: its tokenizer.
    """

    def __init__(self, config: GlowFlowConfig, tokenizer: Tokenizer) -> None:
        self.view = media_view(config, training=False)
        self.tokenizer = tokenizer
        self.arch, self.context = config.model.arch, config.data.context
        self._pictures, self._recordings = ImageProcessor(self.view.image), AudioProcessor(self.view.audio)
        media_ids = tokenizer.media_ids if isinstance(tokenizer, MediaTokenizer) else {}
        placeholders = {name: media_ids.get(PLACEHOLDERS[name], -1) for name in MODALITIES}
        self._sequencer = Sequencer(self.view, _WHOLE, placeholders)
        self._numbers = count()
        self._kept: LRU[int, PreparedSample] = LRU(_KEPT_BYTES, lambda sample: sample.nbytes)

    def concern(self, prompts: Sequence[str], media: Sequence[Media | None] | None) -> bool:
        """Whether there are media at all, or placeholders that a model of media would take for some."""
        if any(media or ()):
            return True
        knows = isinstance(self.tokenizer, MediaTokenizer)
        return knows and any(any(count_placeholders(text).values()) for text in prompts)

    def prepare(self, prompts: Sequence[str], media: Sequence[Media | None]) -> list[MediaPrompt]:
        """Put the media into their places.

        Args:
            prompts: texts.
            media: the files of each.

        Raises:
            ConfigError: the model does not read a modality, numbers of placeholders and files differ, or a prompt is
                longer than the context. DataError: a file cannot be read or prepared.
        """
        asked = [(text, own or Media()) for text, own in zip(prompts, media, strict=True)]
        self._raise(ConfigError, [p for i, one in enumerate(asked) for p in self._mismatches(_key(i, asked), *one)])
        found: list[MediaPrompt] = []
        problems: list[Problem] = []
        for number, (text, own) in enumerate(asked):
            try:
                found.append(self._placed(text, own, _key(number, asked)))
            except DataError as error:
                problems += error.problems
        self._raise(DataError, problems)
        self._raise(ConfigError, [p for i, one in enumerate(found) for p in self._too_long(_key(i, asked), one)])
        return found

    def batch(self, prompts: Sequence[MediaPrompt]) -> Batch:
        """The prompts with their media, collated as an evaluation does it."""
        return collate([self._sample(prompt) for prompt in prompts], self.view)

    def _raise(self, kind: type[ConfigError] | type[DataError], problems: list[Problem]) -> None:
        if problems:
            raise kind(problems[:_SHOWN])

    def _mismatches(self, key: str, text: str, media: Media) -> list[Problem]:
        """What the prompt, its files and the model say against each other."""
        problems, counts = [], count_placeholders(text)
        for modality in MODALITIES:
            one, several = _NAMES[modality]
            given, wanted = len(media.of(modality)), counts[modality]
            reads = modality in self.view.modalities and isinstance(self.tokenizer, MediaTokenizer)
            if given and not reads:
                problems.append(Problem(_KEYS[modality], f"the model reads no {several}: {self._why_not(modality)}"))
            elif reads and given != wanted and any(counts.values()):
                files = f"{given} {one if given == 1 else several}"
                rule = f"has {wanted} {PLACEHOLDERS[modality]}, but {files} {'is' if given == 1 else 'are'} given"
                problems.append(Problem(key, rule, hint="they must be as many"))
        return problems

    def _why_not(self, modality: str) -> str:
        if not self.view.modalities:
            return f"its architecture, {self.arch}, reads text alone"
        return "it was trained on text alone" if modality in self.view.modalities else f"it has no model.{modality}"

    def _placed(self, text: str, media: Media, key: str) -> MediaPrompt:
        """The ids with a place for every token of a medium, and where each medium stands."""
        if not any(count_placeholders(text).values()):
            text = "".join(PLACEHOLDERS[name] * len(media.of(name)) for name in MODALITIES) + text
        assert isinstance(self.tokenizer, MediaTokenizer)
        slots, problems = {name: [1] * number for name, number in count_placeholders(text).items()}, []
        names = {
            (modality, number): f"{_NAMES[modality][0]} {number + 1} of the {key}"
            if isinstance(file, bytes)
            else str(file)
            for modality in MODALITIES
            for number, file in enumerate(media.of(modality))
        }
        for (modality, number), name in names.items():
            try:
                content = _content(media.of(modality)[number])
                slots[modality][number] = self.view.slots(modality, self._facts(modality, content))
                self._features(modality, content)  # what cannot be decoded is told before anything is written
            except BadSample as bad:
                problems.append(Problem(name, str(bad)))
        if problems:
            raise DataError(problems)
        tokens = np.array([self.tokenizer.bos_id, *self.tokenizer.encode_sample(text)], np.int64)
        expanded, *_ = self._sequencer.expand(tokens, 1, slots)
        items = tuple(
            _Item(names[place.modality, place.number], media.of(place.modality)[place.number], place)
            for place in self._sequencer.places(tokens, slots, len(expanded))
        )
        return MediaPrompt(next(self._numbers), expanded.tolist(), items)

    def _too_long(self, key: str, prompt: MediaPrompt) -> list[Problem]:
        if len(prompt.ids) <= self.context:
            return []
        places = sum(item.place.slots for item in prompt.items)
        told = f", {places:,} of them places of media" if places else ""
        rule = f"has {len(prompt.ids):,} tokens{told}, but the model reads at most {self.context:,} (data.context)"
        return [Problem(key, rule)]

    def _facts(self, modality: str, content: bytes) -> tuple[int, int]:
        if modality == "image":
            return image_facts(content, self.view.image.max_pixels)
        return audio_facts(content, self.view.audio.max_file_seconds)

    def _sample(self, prompt: MediaPrompt) -> PreparedSample:
        sample = self._kept.get(prompt.number)
        if sample is None:
            ids = np.array(prompt.ids, np.int32)
            items = [self._item(item) for item in prompt.items]
            sample = PreparedSample(ids, np.zeros_like(ids), np.zeros(len(ids), np.float32), prompt.number, 0)
            sample.items.extend(items)
            self._kept.put(prompt.number, sample)
        return sample

    def _item(self, item: _Item) -> PreparedItem:
        place = item.place
        try:
            features = self._features(place.modality, _content(item.file))
        except BadSample as bad:
            raise DataError(Problem(item.name, str(bad))) from bad
        present = place.modality not in self.view.without
        return PreparedItem(place.modality, features, place.position, place.slots, present)

    def _features(self, modality: str, content: bytes) -> NDArray[Any]:
        if modality == "image":
            return self._pictures.pixels(content, None)
        return self._recordings.features(content, None)


def _key(number: int, prompts: Sequence[object]) -> str:
    return "prompt" if len(prompts) == 1 else f"prompt {number + 1}"


def _content(file: File) -> bytes:
    """The bytes of a file.

    Raises:
        BadSample: it is not there or cannot be read, or is larger than any picture or recording.
    """
    if isinstance(file, bytes):
        return file
    path = Path(file).expanduser()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadSample("no_data", f"has {path.stat().st_size:,} bytes; at most {_MOST_BYTES:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadSample("missing_file", f"cannot be read: {reason}") from error
