"""One unit of a build of samples with media: read, check, tokenise, write; bad samples go by the policy.

Every picture and recording is decoded once here, as small as its format allows, so that what a data set holds can be
used; only raw facts are kept of that. The settings of the processors count when samples are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import PLACEHOLDERS
from glowflow.data.datasets.media.samples import Medium, RawSample, plain, read_samples
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Source, row_hash
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.media_text import MediaTokenizer, count_placeholders, split_placeholders
from glowflow.data.sample_shards import SampleRow, SampleWriter
from glowflow.data.shards import MAX_ROW_TOKENS
from glowflow.data.units import STATE_DIR, Unit, publish

__all__ = ["check_bad_share", "make_sample_shard", "media_facts", "sample_texts"]

_NAMED = 10  # bad samples that are told by name, and as many are never too many
_LARGEST_SAMPLE = 1 << 30
_SHOWN_PROBLEMS = 50
COMBINATIONS = ("text", "image", "audio", "image+audio")


def make_sample_shard(out: Path, unit: Unit, tokenizer: MediaTokenizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Make one shard.

    Returns:
        The unit's result.

    Raises:
        DataError: samples are bad and the policy is ``error``; all of the unit are named.
    """
    settings = SampleSettings.from_dict(state["samples"])
    partial = out / STATE_DIR / f"{unit.shard}.{os.getpid()}.partial"
    writer = SampleWriter(partial, tokenizer.dtype, state["row_group_tokens"])
    tally = _Tally()
    try:
        for row in _rows(unit, tokenizer, settings, tally):
            writer.add(row)
            tally.count(row)
        writer.close()
        if tally.bad and settings.on_bad == "error":
            raise DataError(tally.problems())
        result = {"index": unit.index, "split": unit.split, "documents": tally.rows, "text_bytes": tally.text_bytes}
        return {**result, "media": tally.facts(settings.on_bad), **publish(out, unit, partial, writer)}
    finally:
        partial.unlink(missing_ok=True)


def _rows(unit: Unit, tokenizer: MediaTokenizer, settings: SampleSettings, tally: _Tally) -> Iterator[SampleRow]:
    check = _Check(settings)
    for extent in unit.extents:
        for sample in read_samples(extent, settings):
            try:
                yield _row(sample, tokenizer, check)
            except BadSample as bad:
                tally.bad.append((plain(sample.name), bad.kind, bad.reason))
                if settings.on_bad == "blank":
                    ends = np.array([tokenizer.bos_id, tokenizer.eos_id], tokenizer.dtype)
                    yield SampleRow(sample.document_id, plain(sample.name), "", ends, 1, bad=str(bad))


def _row(sample: RawSample, tokenizer: MediaTokenizer, check: _Check) -> SampleRow:
    """The row of a sample.

    Raises:
        BadSample: it can not be used.
    """
    if sample.bad is not None:
        raise sample.bad
    prompt, text = with_placeholders(sample)
    if sum(len(medium.data) for medium in (*sample.images, *sample.audio)) > _LARGEST_SAMPLE:
        raise BadSample("no_data", f"has more than {_LARGEST_SAMPLE} bytes of media")
    sizes = tuple(check.image(medium) for medium in sample.images)
    lengths = tuple(check.audio(medium) for medium in sample.audio)
    before, after = tokenizer.encode_sample(prompt), tokenizer.encode_sample(text)
    ends = [np.array([one], tokenizer.dtype) for one in (tokenizer.bos_id, tokenizer.eos_id)]
    tokens = np.concatenate([ends[0], before, after, ends[1]])
    if len(tokens) == 2:
        raise BadSample("no_data", "has neither text nor media")
    if len(tokens) > MAX_ROW_TOKENS:
        raise BadSample("text", f"has {len(tokens)} tokens; a sample holds {MAX_ROW_TOKENS}")
    return SampleRow(
        document_id=sample.document_id,
        source=plain(sample.name),
        text=prompt + text,
        tokens=tokens,
        num_prompt=1 + len(before),
        images=sample.images,
        audio=sample.audio,
        image_sizes=sizes,
        audio_lengths=lengths,
        label=sample.label,
        group=sample.group,
    )


def with_placeholders(sample: RawSample) -> tuple[str, str]:
    """Prompt and text of a sample; where neither says where its media belong, they come first, without loss.

    Raises:
        BadSample: they say so, and for another number of media.
    """
    prompt, text = sample.prompt or "", sample.text
    media = {"image": len(sample.images), "audio": len(sample.audio)}
    counts = count_placeholders(prompt), count_placeholders(text)
    found = {name: sum(count[name] for count in counts) for name in media}
    if not any(found.values()):
        return "".join(PLACEHOLDERS[name] * count for name, count in media.items()) + prompt, text
    for name, count in media.items():
        if found[name] != count:
            have = f"{found[name]} {PLACEHOLDERS[name]} in its text, and {count} media of that kind"
            raise BadSample("placeholders", f"has {have}")
    return prompt, text


class _Check:
    """Decodes media to see that they can be used; equal bytes one after another are decoded once."""

    def __init__(self, settings: SampleSettings) -> None:
        self._image_config = settings.image_config()
        self._audio_config = settings.audio_config()
        self._last: dict[str, tuple[bytes, tuple[int, int] | BadSample]] = {}

    def image(self, medium: Medium) -> tuple[int, int]:
        """Height and width."""
        from glowflow.data.processors.image import check_image

        return self._checked("image", medium, lambda data: check_image(data, self._image_config))

    def audio(self, medium: Medium) -> tuple[int, int]:
        """Samples and rate."""
        from glowflow.data.processors.audio import check_audio

        return self._checked("audio", medium, lambda data: check_audio(data, self._audio_config))

    def _checked(self, modality: str, medium: Medium, check: Any) -> tuple[int, int]:
        last = self._last.get(modality)
        if last is None or last[0] != medium.data:
            try:
                if not medium.data:
                    raise BadSample("no_data", "holds no bytes")
                last = (medium.data, check(medium.data))
            except BadSample as bad:
                last = (medium.data, bad)
            self._last[modality] = last
        if isinstance(last[1], BadSample):
            where = f"{medium.path}: " if medium.path else ""
            raise BadSample(last[1].kind, f"{where}{last[1].reason}")
        return last[1]


@dataclass
class _Tally:
    """What a unit has seen."""

    rows: int = 0
    text_bytes: int = 0
    media: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)
    bad: list[tuple[str, str, str]] = field(default_factory=list)  # name, kind, reason

    def count(self, row: SampleRow) -> None:
        """Count a row that is written."""
        self.rows += 1
        self.text_bytes += len(row.text.encode("utf-8"))
        if row.bad is not None:
            return
        self.media.update(images=len(row.images), audio=len(row.audio))
        self.samples[COMBINATIONS[bool(row.images) + 2 * bool(row.audio)]] += 1
        if row.label is not None:
            self.labels.add(row.label)

    def problems(self) -> list[Problem]:
        """The bad samples as problems of the build."""
        hint = "repair or remove it, or set data.on_bad_sample=skip or blank"
        return [Problem(name, f"{kind}: {reason}", hint=hint) for name, kind, reason in self.bad[:_SHOWN_PROBLEMS]]

    def facts(self, on_bad: str) -> dict[str, Any]:
        """For the unit's result."""
        return {
            "images": self.media["images"],
            "audio": self.media["audio"],
            "samples": dict(self.samples),
            "labels": sorted(self.labels),
            "bad": {
                "counts": dict(Counter(kind for _, kind, _ in self.bad)),
                "first": [list(one) for one in self.bad[:_NAMED]],
                "policy": on_bad,
            },
        }


def media_facts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the samples of all units, from their results in order."""
    units = [result["media"] for result in results]
    counts: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for unit in units:
        counts.update(unit["bad"]["counts"])
        samples.update(unit["samples"])
    first = [one for unit in units for one in unit["bad"]["first"]][:_NAMED]
    number = sum(counts.values())
    skipped = any(unit["bad"]["policy"] == "skip" for unit in units)
    return {
        "images": sum(unit["images"] for unit in units),
        "audio": sum(unit["audio"] for unit in units),
        "samples": {name: samples[name] for name in COMBINATIONS},
        "labels": sorted({label for unit in units for label in unit["labels"]}),
        "bad": {
            "counts": dict(sorted(counts.items())),
            "first": first,
            "skipped": number if skipped else 0,
            "blank": 0 if skipped else number,
        },
        "placeholders": list(PLACEHOLDERS.values()),
    }


def check_bad_share(media: Mapping[str, Any], max_fraction: float) -> None:
    """Refuse a data set of which too large a share is bad; the first ten are never too many.

    Raises:
        DataError: it is.
    """
    if not media:
        return
    bad = media["bad"]
    number = sum(bad["counts"].values())
    total = sum(media["samples"].values()) + number
    if number > _NAMED and number > max_fraction * total:
        kinds = ", ".join(f"{kind} {count}" for kind, count in bad["counts"].items())
        named = "; ".join(f"{name} ({kind}: {reason})" for name, kind, reason in bad["first"])
        rule = f"{number} of {total} samples are bad, more than this share ({kinds})"
        hint = f"repair the source, or raise it; the first ten: {named}"
        raise DataError(Problem("data.max_bad_fraction", rule, max_fraction, hint))


def sample_texts(source: Source, limit: int | None) -> Iterator[str]:
    """Prompts and texts of the training split without their placeholders, to train a tokenizer on.

    Args:
        source: of samples with media.
        limit: UTF-8 bytes to read at most; None: everything.
    """
    assert source.samples is not None, "only samples with media come here"
    extents, count = list(source.splits.get("train", [])), 0
    if limit is not None:  # from places spread over the split
        extents.sort(key=lambda e: row_hash(f"{e.name}:{e.start}:{e.row}"))
    for extent in extents:
        for sample in read_samples(extent, source.samples, media=False):
            for text in split_placeholders((sample.prompt or "") + sample.text):
                if text in PLACEHOLDERS.values():
                    continue
                yield text
                count += len(text.encode("utf-8"))
            if limit is not None and count >= limit:
                return
