"""What a model writes about media: answers to the samples' prompts, and texts about each picture.

Prompts go in with their media, several at a time, and the text goes on greedily or by beam search. An answer is right
when all of it is; a text about a picture is compared with all texts that the data set has of it (BLEU).

Legend: N samples.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.generation import ConditionedModule, SamplingOptions, beam_search, generate_batch
from glowflow.data.processors.text import Tokenizer
from glowflow.data.samples.collate import collate
from glowflow.data.samples.sample import PreparedSample
from glowflow.data.samples.view import MediaView
from glowflow.evaluation.references import Reference, read_references
from glowflow.evaluation.sample_reader import SampleReader
from glowflow.metrics.bleu import MAX_ORDER, bleu_counts, bleu_interval, corpus_bleu_of, words
from glowflow.metrics.clusters import accuracy_interval, group_numbers

__all__ = ["WrittenText", "measure_answers", "measure_bleu", "prompt_of", "save_lines", "write_texts"]

_CHUNK = 16  # batches of prompts whose media are held at once
_POSITIONS = 32  # words of an answer that are told apart


@dataclass(frozen=True)
class WrittenText:
    """What was written after a prompt.

    Args:
        document: number of the sample in the data set.
        group: what it belongs to; None: to nothing but itself.
        prompt: the text before, with placeholders.
        text: what was written.
        finish: why it ends: ``eos`` or ``length``.
        wanted: the sample's own answer, or all texts of its group.
        right: the whole answer is right; None for texts about pictures.
    """

    document: int
    group: str | None
    prompt: str
    text: str
    finish: str
    wanted: tuple[str, ...]
    right: bool | None = None


def measure_answers(
    reader: SampleReader, *, limit: int | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, Any], list[WrittenText]]:
    """Write the answer to each sample's prompt greedily, and compare it word by word.

    Args:
        reader: what is measured on.
        limit: only the first samples.

    Returns:
        ``exact``: the share of answers that are right as a whole, with an interval over groups, ``positions``: of the
        words at each position of the wanted answers how many are right; and the answers.

    Raises:
        DataError: as the reader; or no sample has an answer.
    """
    wanted = {one.document: one for one in itertools.islice(read_references(reader.manifest, reader.split), limit)}
    longest = _longest(reader, wanted.values())
    found = [
        _compared(written, wanted[written.document])
        for written in write_texts(reader, lambda sample: sample.document_id in wanted, longest + 1, len(wanted))
    ]
    reader.require_some(len(found), "an answer to write")
    groups = group_numbers([one.group or one.document for one in found])
    exact = accuracy_interval([bool(one.right) for one in found], groups, resamples=resamples, seed=seed)
    return {
        "samples": len(found),
        "groups": int(groups.max()) + 1,
        "exact": exact.estimate,
        "confidence": {"level": exact.level, "method": exact.method, "exact": [exact.low, exact.high]},
        "positions": word_accuracy([one.wanted[0].split() for one in found], [one.text.split() for one in found]),
        "unfinished": sum(one.finish == "length" for one in found),
    }, found


def measure_bleu(
    reader: SampleReader, *, beams: int = 1, limit: int | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, Any], list[WrittenText]]:
    """Write a text after the prompt of the first sample of each group, and compare it with all texts of the group.

    Args:
        reader: what is measured on.
        beams: of a beam search; 1: greedy.
        limit: only the first groups.

    Returns:
        ``bleu``: BLEU-1 to BLEU-4 in percent, ``confidence`` with their intervals over groups, lengths, how many
        references a text has; and the texts.

    Raises:
        DataError: as the reader; or nothing to write about.
    """
    references: dict[str | int, list[Reference]] = defaultdict(list)
    for one in read_references(reader.manifest, reader.split):
        references[one.group or one.document].append(one)
    chosen = dict(itertools.islice(references.items(), limit))
    owner = {texts[0].document: texts for texts in chosen.values()}
    longest = max(_longest(reader, itertools.chain.from_iterable(chosen.values())), 1)
    texts = write_texts(reader, lambda sample: sample.document_id in owner, longest, len(owner), beams=beams)
    found = [replace(one, wanted=tuple(ref.answer for ref in owner[one.document])) for one in texts]
    reader.require_some(len(found), "a text to write")
    counts = bleu_counts([words(one.text) for one in found], [[words(ref) for ref in one.wanted] for one in found])
    score = corpus_bleu_of(counts)
    intervals = [bleu_interval(counts, n, resamples=resamples, seed=seed) for n in range(1, MAX_ORDER + 1)]
    return {
        "groups": len(found),
        "references": float(np.mean([len(one.wanted) for one in found])),
        "beams": beams,
        "words": "lower case, without punctuation",
        "bleu": list(score.scores),
        "confidence": {
            "level": intervals[0].level,
            "method": intervals[0].method,
            "bleu": [[one.low, one.high] for one in intervals],
        },
        "brevity_penalty": score.brevity_penalty,
        "length": score.length,
        "reference_length": score.reference_length,
    }, found


def write_texts(
    reader: SampleReader, wanted: Callable[[PreparedSample], bool], max_tokens: int, count: int, *, beams: int = 1
) -> Iterator[WrittenText]:
    """What the model writes after the prompts of samples, with their media.

    Args:
        reader: what is read.
        wanted: says of a sample whether its prompt is gone on from.
        max_tokens: of each text.
        count: stop reading after so many texts.
        beams: 1: greedily.
    """
    view = reader.view(prompt_loss=False)
    tokenizer = reader.manifest.tokenizer()
    # Bad samples were counted when all were read, and what takes time here is the writing.
    reading = replace(reader, bad=Counter(), progress=None)
    samples, done = itertools.islice(filter(wanted, reading.usable(view)), count), 0
    while chunk := list(itertools.islice(samples, _CHUNK * reader.batch_size)):
        prompts = [prompt_of(sample) for sample in chunk]
        for sample, prompt, (ids, finish) in zip(
            chunk, prompts, _go_on(reader, prompts, view, tokenizer, max_tokens, beams), strict=True
        ):
            shown = tokenizer.decode(_once(prompt, tokenizer)).strip()
            text = tokenizer.decode(ids).strip()
            yield WrittenText(sample.document_id, sample.group or None, shown, text, finish, ())
        done += len(chunk)
        if reader.progress is not None:
            reader.progress(done, max(done, count))


def prompt_of(sample: PreparedSample) -> PreparedSample:
    """The part of a sample that its answer goes on from: everything before the first target that counts.

    Media behind it are left out.
    """
    stop = int(np.flatnonzero(sample.weights > 0)[0]) + 1
    return replace(
        sample,
        tokens=sample.tokens[:stop],
        targets=np.zeros(stop, np.int32),
        weights=np.zeros(stop, np.float32),
        items=[item for item in sample.items if item.position < stop],
    )


def _go_on(
    reader: SampleReader,
    prompts: list[PreparedSample],
    view: MediaView,
    tokenizer: Tokenizer,
    max_tokens: int,
    beams: int,
) -> Iterable[tuple[Sequence[int], str]]:
    """New tokens after each prompt, and why they end."""
    ids = [prompt.tokens.tolist() for prompt in prompts]
    context = max(map(len, ids)) + max_tokens
    if beams == 1:
        module = ConditionedModule(reader.module, lambda numbers: collate([prompts[n] for n in numbers], view))
        greedy = SamplingOptions(temperature=0, eos_id=tokenizer.eos_id)
        done = generate_batch(module, ids, max_tokens, context, greedy, batch_size=reader.batch_size)
        return [(one.ids, str(one.finish)) for one in done]
    found: list[tuple[Sequence[int], str]] = []
    for number, prompt in enumerate(prompts):
        module = ConditionedModule(reader.module, lambda _, prompt=prompt: collate([prompt], view))  # type: ignore[misc]
        (best,) = beam_search(module, ids[number], max_tokens, context, beams, eos_id=tokenizer.eos_id)
        found.append((best.ids, best.finish))
    return found


def _once(prompt: PreparedSample, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids with one token for each medium, without the one that starts it."""
    dropped = {place for item in prompt.items for place in range(item.position + 1, item.position + item.slots)}
    return [int(token) for place, token in enumerate(prompt.tokens) if place and place not in dropped]


def _longest(reader: SampleReader, references: Iterable[Reference]) -> int:
    """Tokens of the longest answer."""
    tokenizer = reader.manifest.tokenizer()
    return max((len(ids) for ids in tokenizer.encode_batch([one.answer for one in references])), default=0)


def _compared(written: WrittenText, reference: Reference) -> WrittenText:
    """An answer is right when its words are those of the sample, and it ends there."""
    right = written.finish == "eos" and written.text.split() == reference.answer.split()
    return replace(written, wanted=(reference.answer,), right=right)


def word_accuracy(wanted: Sequence[Sequence[str]], written: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Of the wanted words at each position, from the first on, the share that was written there."""
    found = []
    for position in range(min(_POSITIONS, max(map(len, wanted), default=0))):
        asked = [(one[position], other) for one, other in zip(wanted, written, strict=True) if len(one) > position]
        right = sum(position < len(other) and other[position] == word for word, other in asked)
        found.append({"position": position + 1, "accuracy": right / len(asked), "samples": len(asked)})
    return found


def save_lines(records: Iterable[Any], path: Path) -> None:
    """Write records as JSON lines.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(
            Problem("--predictions", f"cannot be written: {error.strerror or error}", str(path))
        ) from error
