"""From a row of a window to a prepared sample: its sequence, and its media decoded.

Whatever is random is seeded by (seed, epoch, source, document), so a sample is the same whoever prepares it. A medium
that turns out to be bad makes its sample a blank: all places stay, nothing of it weighs anything. Where nothing is
random, the latest prepared media are kept: a picture with five captions is decoded once, and small sets once a run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.data.order import LRU, generator
from glowflow.data.samples.arrange import Arranged
from glowflow.data.samples.reading import File
from glowflow.data.samples.sample import PreparedItem, PreparedSample
from glowflow.data.samples.sequence import Place, Sequencer
from glowflow.data.samples.view import MediaView

__all__ = ["Planned", "Preparer"]

_DROPOUT_STREAM = 9  # distinguishes this use of the seed from the others, see arrange.py

_KEPT_BYTES = 64 << 20  # of prepared media

Files = Mapping[str, Sequence[File]]


@dataclass(frozen=True)
class Planned:
    """A sample to prepare: where it lies, and its sequence as planned. Its media are read and decoded later."""

    sample: PreparedSample  # without media
    source: int
    epoch: int
    window: int
    row: int  # in the window, of the one whose media it gets
    places: list[Place]
    facts: dict[str, NDArray[np.int64]]  # by modality, of its media
    absent: frozenset[str]  # modalities that it goes without

    @property
    def wanted(self) -> list[str]:
        """Modalities whose files must be read."""
        return sorted({place.modality for place in self.places} - self.absent)


class Preparer:
    """Prepares samples by a view.

    Args:
        sequencer: with the view.
        seed: of the run.
        names: name of each source's data set.
    """

    def __init__(self, sequencer: Sequencer, seed: int, names: Sequence[str]) -> None:
        self._sequencer, self._seed, self._names = sequencer, seed, names
        self._processors: dict[str, Any] = {}
        self._kept: LRU[tuple[int, int, str, int], NDArray[Any]] = LRU(_KEPT_BYTES, lambda array: array.nbytes)
        self._lock = threading.Lock()

    @property
    def view(self) -> MediaView:
        return self._sequencer.view

    def planned(self, arranged: Arranged, row: int, sample_id: int, source: int, epoch: int, window: int) -> Planned:
        """What is known of a row of a window without its media.

        Raises:
            DataError: it was found bad when the data set was built, and ``on_bad_sample`` is ``error``.
        """
        rows, sequencer, view = arranged.rows, self._sequencer, self.view
        partner = int(arranged.partner[row])
        tokens = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]]
        facts = {name: rows.media_of(name, partner if name in view.modalities else row) for name in MODALITIES}
        slots = {name: [view.slots(name, one) for one in facts[name].tolist()] for name in MODALITIES}
        expanded, kinds, num_prompt = sequencer.expand(tokens, int(rows.num_prompt[row]), slots)
        length = int(arranged.lengths[row])
        places = sequencer.places(tokens, slots, length)
        label = int(rows.labels[row])
        inputs, targets, weights = sequencer.targets(expanded, kinds, label, paired=bool(places))
        document = int(rows.document_ids[row])
        sample = PreparedSample(
            inputs,
            targets,
            weights,
            sample_id,
            document,
            label=label,
            name=self._name(source, rows.names[row], document),
            group=rows.groups[row] or "",
            num_prompt=min(num_prompt, length),
        )
        reason = rows.bad.get(row)
        if reason:
            self._spoil(sample, reason)
        absent = self._absent(sorted({place.modality for place in places}), epoch, source, document)
        return Planned(sample, source, epoch, window, partner, places, facts, absent)

    def finish(self, planned: Planned, files: Files) -> PreparedSample:
        """Decode the media of a sample.

        Args:
            planned: what to prepare.
            files: by modality (those of ``planned.wanted``) the contents of its files.

        Raises:
            DataError: one is bad, and ``on_bad_sample`` is ``error``.
        """
        from glowflow.data.processors.bad import BadSample

        sample = planned.sample
        try:
            sample.items = [self._item(planned, place, files) for place in planned.places]
        except BadSample as bad:
            self._spoil(sample, str(bad))
            sample.items = [self._blank(place) for place in planned.places]
        return sample

    def _item(self, planned: Planned, place: Place, files: Files) -> PreparedItem:
        if place.modality in planned.absent:
            return self._blank(place)
        facts = planned.facts[place.modality][place.number].tolist()
        key = (self._seed, planned.epoch, planned.source, planned.sample.document_id, place.number)
        features = self._features(place.modality, files[place.modality][place.number], facts, key)
        return PreparedItem(place.modality, features, place.position, place.slots)

    def _features(self, modality: str, file: File, facts: list[int], key: tuple[int, ...]) -> NDArray[Any]:
        from glowflow.data.processors.bad import BadSample

        config = self.view.image if modality == "image" else self.view.audio
        if config.augment.active:
            features = self._decoded(modality, file, generator(*key))
        else:
            with self._lock:
                kept = self._kept.get(file.key)
            features = self._decoded(modality, file, None) if kept is None else kept
            if kept is None:
                with self._lock:
                    self._kept.put(file.key, features)
        expected = self.view.feature_shape(modality, self.view.size(modality, facts))
        if features.shape != expected:
            rule = f"{modality} of shape {features.shape} where the manifest promises {expected}"
            raise BadSample(f"{modality}_decode", rule)
        return features

    def _decoded(self, modality: str, file: File, rng: np.random.Generator | None) -> NDArray[Any]:
        from glowflow.data.processors.bad import BadSample

        if file.content is None:
            raise BadSample("no_data", "the shard has no bytes of it")
        processor = self._processor(modality)
        features = processor.pixels(file.content, rng) if modality == "image" else processor.features(file.content, rng)
        return np.asarray(features)

    def _processor(self, modality: str) -> Any:
        if modality not in self._processors:
            from glowflow.data.processors.audio import AudioProcessor
            from glowflow.data.processors.image import ImageProcessor

            view = self.view
            made = ImageProcessor(view.image) if modality == "image" else AudioProcessor(view.audio)
            self._processors[modality] = made
        return self._processors[modality]

    def _blank(self, place: Place) -> PreparedItem:
        shape = self.view.feature_shape(place.modality, self.view.blank_size(place.modality))
        features = np.zeros(shape, np.uint8 if place.modality == "image" else np.float32)
        return PreparedItem(place.modality, features, place.position, place.slots, present=False)

    def _spoil(self, sample: PreparedSample, reason: str) -> None:
        """Make it a blank, or stop."""
        if self.view.on_bad_sample == "error":
            hint = "mend it, or set data.on_bad_sample=blank (or skip, which leaves it out when the data set is built)"
            raise DataError(Problem(sample.name, f"the sample cannot be used: {reason}", hint=hint))
        sample.bad = reason
        sample.targets, sample.weights = np.zeros_like(sample.targets), np.zeros_like(sample.weights)

    def _absent(self, modalities: list[str], epoch: int, source: int, document: int) -> frozenset[str]:
        """Modalities that a sample goes without: those of ``without``, and in training some at random.

        Each is dropped with the probability ``modality_dropout`` of its own; where all of several would be, the one
        with the largest draw stays.
        """
        view = self.view
        absent = set(view.without)
        left = [name for name in modalities if name not in absent]
        if view.modality_dropout and left:
            draws = generator(self._seed, _DROPOUT_STREAM, epoch, source, document).random(len(left))
            dropped = {name for name, draw in zip(left, draws, strict=True) if draw < view.modality_dropout}
            if len(left) > 1 and len(dropped) == len(left):
                dropped.discard(left[int(np.argmax(draws))])
            absent |= dropped
        return frozenset(absent)

    def _name(self, source: int, file: str | None, document: int) -> str:
        return f"{file} (document {document})" if file else f"{self._names[source]}, document {document}"
