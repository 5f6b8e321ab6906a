"""Sampling token by token: prompts go in, and new tokens come out one at a time, for one text or many in step.

Texts of a batch need no masks: all are read from the shortest prompt's length on one position at a time, and one whose
prompt is longer takes its next prompt token instead of a sampled one. So any architecture reads a batch exactly as it
reads each text alone.

A model has seen contexts of a certain length only. When the cache is full, the later half of the text is read again
into an empty cache and sampling goes on, so that a text may be longer than the context. The cache of a model with
memory is never full: such a model reads the whole prompt, a context at a time, and goes on without end.

Legend: N texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.generation.reading import Reader, check_prompts, open_reader, remembers, whole_text
from glowflow.core.generation.sampling import Sampler, SamplingOptions

__all__ = ["Completion", "Finish", "TokenScore", "generate", "generate_batch"]

Finish = Literal["length", "eos", "stop"]
"""Why a text ends: as many tokens as asked for, the end of a document, a stop string."""


@dataclass(frozen=True)
class TokenScore:
    """What the model said about a token, before penalty, temperature and the rest.

    Args:
        log_prob: natural logarithm of the token's probability.
        alternatives: the likeliest tokens and their logarithms, best first.
    """

    log_prob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass
class Completion:
    """What was written after one prompt.

    Args:
        ids: the new tokens; a token that ends a document is not among them.
        finish: why there are no more.
        scores: one per token where they were asked for.
    """

    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    scores: list[TokenScore] = field(default_factory=list)


@dataclass
class _Text:
    """A text that grows: prompt and new tokens, and what is given back about it."""

    number: int
    tokens: list[int]
    completion: Completion = field(default_factory=Completion)


def generate(
    module: BaseArchitecture,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    context: int,
    options: SamplingOptions | None = None,
    *,
    truncate_prompt: bool = False,
    cached: bool = True,
) -> Iterator[int]:
    """Sample ids after a prompt.

    Args:
        module: the architecture, unsharded; put into evaluation mode while it runs.
        prompt_ids: at least one id.
        max_new_tokens: how many ids at most.
        context: the longest run of tokens that the model reads at once.
        truncate_prompt: read only the end of a prompt that is longer than the context, unless the model has a memory.
        cached: False passes over the whole text for every token.

    Raises:
        ConfigError: an empty or too long prompt, or an id outside the vocabulary (at once, not at the first ``next``).
    """
    options = options or SamplingOptions()
    texts = _texts(module, [prompt_ids], max_new_tokens, context, truncate_prompt, cached)
    grown = _grow(open_reader(module, 1, context, cached), texts, max_new_tokens, options, _never, None)
    return (token for _, token in grown)


def generate_batch(
    module: BaseArchitecture,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    context: int,
    options: SamplingOptions | None = None,
    *,
    batch_size: int = 16,
    ends: Callable[[int, int], bool] | None = None,
    log_probs: int | None = None,
    truncate_prompt: bool = False,
    cached: bool = True,
) -> list[Completion]:
    """Sample after many prompts, several at a time; how many at a time changes no text.

    Args:
        module, max_new_tokens, context, options, truncate_prompt, cached: as for :func:`generate`.
        prompts: at least one id each; the number of a prompt and the seed decide its random numbers.
        batch_size: texts that are read at once.
        ends: asked with the number of a prompt and each of its new tokens: whether the text ends with it.
        log_probs: give the logarithm of each token's probability, and so many of the likeliest tokens.

    Returns:
        One completion per prompt, in their order.

    Raises:
        ConfigError: as :func:`generate`, for all prompts together.
    """
    options = options or SamplingOptions()
    if batch_size < 1:
        raise ConfigError(Problem("batch_size", "must be at least 1", batch_size))
    texts = _texts(module, prompts, max_new_tokens, context, truncate_prompt, cached)
    for batch in _batches(texts, batch_size, context):
        reader = open_reader(module, len(batch), context, cached, [text.number for text in batch])
        for _ in _grow(reader, batch, max_new_tokens, options, ends or _never, log_probs):
            pass
    return [text.completion for text in texts]


def _never(number: int, token: int) -> bool:
    return False


def _texts(
    module: BaseArchitecture,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    context: int,
    truncate: bool,
    cached: bool,
) -> list[_Text]:
    """The texts to go on with, checked."""
    checked = check_prompts(module, prompts, context, truncate=truncate)
    if not cached and remembers(module, context):
        for prompt in checked:
            whole_text(module, prompt, max_new_tokens, context, "a model with memory, read without a cache,")
    if hasattr(module, "for_texts"):
        for prompt in checked:
            whole_text(module, prompt, max_new_tokens, context, "a prompt with media")
    return [_Text(number, prompt) for number, prompt in enumerate(checked)]


def _batches(texts: Sequence[_Text], size: int, context: int) -> Iterator[list[_Text]]:
    """Texts of similar length together, so that little is read one position at a time.

    What a layer with a memory sees of positions before the context depends on where the text was cut into passes:
    prompts that are longer than the context go with equally long ones only.
    """
    batch: list[_Text] = []
    for text in sorted(texts, key=lambda text: len(text.tokens)):
        longer = batch and len(text.tokens) > max(context, len(batch[0].tokens))
        if len(batch) == size or longer:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _grow(
    reader: Reader,
    texts: list[_Text],
    max_new_tokens: int,
    options: SamplingOptions,
    ends: Callable[[int, int], bool],
    log_probs: int | None,
) -> Iterator[tuple[_Text, int]]:
    """Let all texts grow in step; gives each new token as it is chosen."""
    if max_new_tokens < 1:
        for text in texts:
            text.completion.finish = "length"
        return
    numbers, prompts = [text.number for text in texts], [text.tokens for text in texts]
    sampler = Sampler(options, numbers, prompts, reader.module.vocab_size, reader.device)
    length = min(len(text.tokens) for text in texts)
    unread = [text.tokens[:length] for text in texts]
    while True:
        scores_nv = reader.read(unread)
        ready = [row for row, text in enumerate(texts) if len(text.tokens) == length]
        if ready:
            chosen = sampler.choose(scores_nv, ready)
            told = [None] * len(ready) if log_probs is None else _told(scores_nv, ready, chosen, log_probs)
            for row, token, score in zip(ready, chosen, told, strict=True):
                text = texts[row]
                text.tokens.append(token)
                if text.completion.finish is None and _take(text, token, score, max_new_tokens, options, ends):
                    yield text, token
            texts = _alive(texts, reader, sampler)
            if not texts:
                return
        length += 1
        if reader.room < 1:
            reader.restart()
            half = max(1, reader.context // 2)
            unread = [text.tokens[length - half : length] for text in texts]
        else:
            unread = [[text.tokens[length - 1]] for text in texts]


def _take(
    text: _Text,
    token: int,
    score: TokenScore | None,
    max_new_tokens: int,
    options: SamplingOptions,
    ends: Callable[[int, int], bool],
) -> bool:
    """Write a token down; whether it is given out."""
    done = text.completion
    if token == options.eos_id:
        done.finish = "eos"
        return False
    done.ids.append(token)
    if score is not None:
        done.scores.append(score)
    if ends(text.number, token):
        done.finish = "stop"
    elif len(done.ids) == max_new_tokens:
        done.finish = "length"
    return True


def _alive(texts: list[_Text], reader: Reader, sampler: Sampler) -> list[_Text]:
    """The texts that go on; a cache that cannot let go of the others reads on in them, for nothing."""
    rows = [row for row, text in enumerate(texts) if text.completion.finish is None]
    if not rows:
        return []
    if len(rows) == len(texts) or reader.cannot("select"):
        return texts
    reader.select(rows)
    sampler.select(rows)
    return [texts[row] for row in rows]


def _told(scores_nv: Tensor, rows: Sequence[int], chosen: Sequence[int], count: int) -> list[TokenScore]:
    """What the model says about the chosen tokens and the likeliest ones."""
    log_probs_nv = scores_nv[list(rows)].double().log_softmax(-1)
    own_n = log_probs_nv[torch.arange(len(rows)), list(chosen)].tolist()
    top = log_probs_nv.topk(min(count, log_probs_nv.shape[-1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenScore(own, tuple(zip(ids, logs, strict=True))) for own, (ids, logs) in zip(own_n, likeliest, strict=True)
    ]
