"""Sampling token by token with a key/value cache: prompt ids go in, new ids come out one at a time.

A model has seen contexts of a certain length only. When the cache is full, the later half of the text is read again
into an empty cache and sampling goes on, so that a text may be longer than the context. The cache of a model with
memory is never full: such a model reads the whole prompt, a context at a time, and goes on without end.

Legend: B batch (1), T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.attention.cache import DecodeCache

__all__ = ["SamplingOptions", "generate", "next_token_probabilities"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Args:
        temperature: divides the scores; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to at least p (arXiv:1904.09751).
        seed: of the sampling alone.
        eos_id: stop after this token, which is not given out.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    eos_id: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", "must be a finite number of at least 0", self.temperature))
        if self.top_k is not None and self.top_k < 1:
            problems.append(Problem("top_k", "must be at least 1", self.top_k))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", "must be above 0 and at most 1", self.top_p))
        if problems:
            raise ConfigError(problems)


def next_token_probabilities(scores_v: Tensor, options: SamplingOptions) -> Tensor:
    """(V,) scores -> (V,) probabilities after temperature, top-k and top-p, in this order."""
    scores_v = scores_v.double()
    if options.temperature == 0:
        return torch.zeros_like(scores_v).index_fill_(0, scores_v.argmax(), 1.0)
    # Largest score first taken to 0, so that no temperature, however small, overflows.
    scores_v = (scores_v - scores_v.max()) / options.temperature
    if options.top_k is not None and options.top_k < scores_v.numel():
        kept = torch.full_like(scores_v, float("-inf"))
        top = scores_v.topk(options.top_k)
        scores_v = kept.scatter(0, top.indices, top.values)
    probabilities_v = torch.softmax(scores_v, dim=-1)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = probabilities_v.sort(descending=True, stable=True)
        # A token stays while the ones before it do not yet reach p; so at least one stays.
        before = ordered.cumsum(0) - ordered
        ordered = torch.where(before < options.top_p, ordered, 0.0)
        probabilities_v = torch.zeros_like(probabilities_v).scatter(0, order, ordered)
        probabilities_v = probabilities_v / probabilities_v.sum()
    return probabilities_v


def generate(
    module: BaseArchitecture,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    context: int,
    options: SamplingOptions | None = None,
) -> Iterator[int]:
    """Sample ids after a prompt.

    Args:
        module: the architecture, unsharded; put into evaluation mode while it runs.
        prompt_ids: at least one id; only the last ``context`` of them are read by a model without memory.
        max_new_tokens: how many ids at most.
        context: the longest run of tokens that the model reads at once.

    Raises:
        ConfigError: an empty prompt, or an id outside the vocabulary (at once, not at the first ``next``).
    """
    problems = []
    if not prompt_ids:
        problems.append(Problem("prompt", "must have at least one token", hint="start with the tokenizer's bos_id"))
    problems += [
        Problem("prompt", f"token ids must lie in 0..{module.vocab_size - 1}", token)
        for token in prompt_ids
        if not 0 <= token < module.vocab_size
    ][:3]
    if context < 2:
        problems.append(Problem("context", "must be at least 2 to generate", context))
    if problems:
        raise ConfigError(problems)
    return _generate(
        module, [int(token) for token in prompt_ids], max_new_tokens, context, options or SamplingOptions()
    )


def _generate(
    module: BaseArchitecture, text: list[int], max_new_tokens: int, context: int, options: SamplingOptions
) -> Iterator[int]:
    parameter = next(module.parameters())
    device = parameter.device
    generator = torch.Generator().manual_seed(options.seed)
    cache = module.new_cache(1, context, device, parameter.dtype)
    room = cache.max_length if isinstance(cache, DecodeCache) else context
    unread = text[-room:]
    for _ in range(max_new_tokens):
        if len(unread) > room:
            unread = text[-max(1, context // 2) :]
            cache, room = module.new_cache(1, context, device, parameter.dtype), context
        scores_v = _score(module, torch.tensor([unread], device=device).split(context, dim=1), cache)
        room -= len(unread)
        token = int(torch.multinomial(next_token_probabilities(scores_v, options), 1, generator=generator))
        if token == options.eos_id:
            return
        text.append(token)
        unread = [token]
        yield token


def _score(module: BaseArchitecture, pieces: Sequence[Tensor], cache: object) -> Tensor:
    """Scores (V,) of the token after these pieces of text, on the CPU; the module's mode is as before afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            for tokens_bt in pieces:
                scores = module.decode(tokens_bt, cache, last_only=True)
            return scores[0, -1].float().cpu()
    finally:
        module.train(training)
