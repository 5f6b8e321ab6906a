"""How generation reads: texts of equal length go into a module in step, and scores of what follows come out.

``CachedReader`` goes on from what the module's cache holds. ``WholeReader`` passes over everything so far each time,
without a cache: slow, for checks, and for architectures that have no cached decoding.

Legend: N texts, T new positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture, MissingMethodError
from glowflow.core.attention.cache import DecodeCache
from glowflow.core.batch import Batch

__all__ = ["CachedReader", "Reader", "WholeReader", "check_prompts", "open_reader", "remembers", "whole_text"]


_SHOWN = 10  # problems of many prompts


class Reader(ABC):
    """Reads N texts in step.

    Args:
        module: the architecture, unsharded; in evaluation mode while it reads.
        num_texts: N.
        context: the longest run of tokens that the module reads at once.
    """

    room: int
    """Positions that can still be read."""

    def __init__(self, module: BaseArchitecture, num_texts: int, context: int) -> None:
        self.module, self.num_texts, self.context = module, num_texts, context
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.restart()

    @abstractmethod
    def restart(self) -> None:
        """Forget everything that was read."""

    @abstractmethod
    def _scores(self, tokens_nt: Tensor, every: bool) -> Tensor:
        """(N, T, V), or (N, 1, V) for the last position alone."""

    def read(self, texts: Sequence[Sequence[int]], *, every: bool = False) -> Tensor:
        """Read the next positions of all texts.

        Args:
            texts: N lists of the same length T.
            every: score what follows each of them.

        Returns:
            Scores of the next token in fp32 at least, (N, V), or (N, T, V) with ``every``.
        """
        tokens_nt = torch.tensor(texts, device=self.device)
        with evaluating(self.module), torch.inference_mode():
            scores = self._scores(tokens_nt, every)
            self.room -= tokens_nt.shape[1]
            scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
            return scores if every else scores[:, -1]

    def cannot(self, what: str) -> str:
        """Why ``what`` (``select`` or ``rewind``) is impossible; empty when it is possible."""
        return ""

    @abstractmethod
    def select(self, texts: Sequence[int]) -> None:
        """Go on with these of the texts, in this order; one may occur several times."""

    @abstractmethod
    def mark(self) -> None:
        """From here on ``rewind`` counts."""

    @abstractmethod
    def rewind(self, count: int) -> None:
        """Be as if only ``count`` positions had been read since the mark."""


class CachedReader(Reader):
    """Goes on from what the cache holds."""

    def restart(self) -> None:
        self.cache: Any = self.module.new_cache(self.num_texts, self.context, self.device, self.dtype)
        self.room = self.cache.max_length if isinstance(self.cache, DecodeCache) else self.context
        self._mark: Any = None
        self._since: list[Tensor] | None = None  # what was read since the mark

    def _scores(self, tokens_nt: Tensor, every: bool) -> Tensor:
        if self._since is not None:
            self._since.append(tokens_nt)
        pieces = tokens_nt.split(self.context, dim=1)
        parts = [self.module.decode(piece, self.cache, last_only=not every) for piece in pieces]
        return torch.cat(parts, dim=1) if every else parts[-1]

    def cannot(self, what: str) -> str:
        methods = {"select": ("select",), "rewind": ("save", "restore")}[what]
        missing = [method for method in methods if not hasattr(self.cache, method)]
        lacks = " and ".join(f"{method}()" for method in missing)
        return f"the cache of {type(self.module).__name__} has no {lacks}" if missing else ""

    def select(self, texts: Sequence[int]) -> None:
        if list(texts) == list(range(self.num_texts)):
            return
        self.cache.select(torch.tensor(texts, device=self.device))
        self.num_texts = len(texts)

    def mark(self) -> None:
        self._since, self._mark = [], self.cache.save()

    def rewind(self, count: int) -> None:
        assert self._since is not None
        tokens_nt = torch.cat(self._since, dim=1)
        surplus = tokens_nt.shape[1] - count
        if not surplus:
            return
        self.room += surplus
        if isinstance(self.cache, DecodeCache) and self.cache.cut(self.cache.length - surplus):
            return
        self.cache.restore(self._mark)
        if count:
            with evaluating(self.module), torch.inference_mode():
                self.module.decode(tokens_nt[:, :count], self.cache, last_only=True)


class WholeReader(Reader):
    """Passes over everything so far, without a cache."""

    def restart(self) -> None:
        self.room = self.context
        self._mark = 0
        self._rows = list(range(self.num_texts))  # which of the texts at the start each row is
        self._read_nt = torch.empty(self.num_texts, 0, dtype=torch.int64, device=self.device)

    def _scores(self, tokens_nt: Tensor, every: bool) -> Tensor:
        self._read_nt = torch.cat((self._read_nt, tokens_nt), dim=1)
        output, _ = self.module(_batch_of(self._read_nt, self._rows), compute_loss=False)
        return self.module.logits(output.hidden[:, -tokens_nt.shape[1] if every else -1 :])

    def select(self, texts: Sequence[int]) -> None:
        self._read_nt = self._read_nt[list(texts)]
        self._rows = [self._rows[text] for text in texts]
        self.num_texts = len(texts)

    def mark(self) -> None:
        self._mark = self._read_nt.shape[1]

    def rewind(self, count: int) -> None:
        self.room += self._read_nt.shape[1] - (self._mark + count)
        self._read_nt = self._read_nt[:, : self._mark + count]


def open_reader(
    module: BaseArchitecture, num_texts: int, context: int, cached: bool, numbers: Sequence[int] | None = None
) -> Reader:
    """A reader that goes on from a cache, or one that reads everything anew.

    Args:
        numbers: of the texts among all prompts, for a module with something of its own for each of them
            (``for_texts``, see ``conditioned.py``); default: 0, 1, 2 ...
    """
    for_texts: Any = getattr(module, "for_texts", None)
    if for_texts is not None:
        module = for_texts(range(num_texts) if numbers is None else numbers)
    return CachedReader(module, num_texts, context) if cached else WholeReader(module, num_texts, context)


@contextmanager
def evaluating(module: BaseArchitecture) -> Iterator[None]:
    """In evaluation mode; as before afterwards."""
    if not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()


def _batch_of(tokens_nt: Tensor, rows: Sequence[int]) -> Batch:
    """Texts without targets, one document each; ``rows`` says which of the reader's texts they are."""
    nothing_nt = torch.zeros_like(tokens_nt)
    return Batch(
        tokens=tokens_nt,
        targets=nothing_nt,
        loss_weights=nothing_nt.float(),
        positions=torch.arange(tokens_nt.shape[1], device=tokens_nt.device).expand_as(tokens_nt),
        document_ids=nothing_nt,
        sample_ids=torch.tensor(rows, device=tokens_nt.device),
        reset=torch.ones(len(rows), dtype=torch.bool, device=tokens_nt.device),
        single_document=True,
    )


def remembers(module: BaseArchitecture, context: int) -> bool:
    """Whether the module's cache takes in texts longer than the context."""
    parameter = next(module.parameters())
    try:
        cache = module.new_cache(1, context, parameter.device, parameter.dtype)
    except MissingMethodError:
        return False
    return isinstance(cache, DecodeCache) and cache.max_length > context


def check_prompts(
    module: BaseArchitecture, prompts: Sequence[Sequence[int]], context: int, *, truncate: bool = False
) -> list[list[int]]:
    """The prompts as they will be read.

    Args:
        truncate: of a prompt that is longer than the context a model without memory reads the end.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or a prompt that is too long.
    """
    problems = []
    if context < 2:
        problems.append(Problem("context", "must be at least 2 to generate", context))
    longest = None if problems or remembers(module, context) else context
    for number, prompt in enumerate(prompts, 1):
        key = "prompt" if len(prompts) == 1 else f"prompt {number}"
        problems += _prompt_problems(key, prompt, module.vocab_size, None if truncate else longest)
    if problems:
        raise ConfigError(problems[:_SHOWN])
    return [[int(token) for token in (prompt if longest is None else prompt[-longest:])] for prompt in prompts]


def _prompt_problems(key: str, prompt: Sequence[int], vocab_size: int, longest: int | None) -> list[Problem]:
    if not len(prompt):
        return [Problem(key, "must have at least one token", hint="start with the tokenizer's bos_id")]
    problems = [
        Problem(key, f"token ids must lie in 0..{vocab_size - 1}", token)
        for token in prompt
        if not 0 <= token < vocab_size
    ][:3]
    if longest is not None and len(prompt) > longest:
        rule = f"has {len(prompt):,} tokens, but the model reads at most {longest:,} (data.context)"
        problems.append(Problem(key, rule, hint="--truncate-prompt (truncate_prompt) reads only its end"))
    return problems


def whole_text(
    module: BaseArchitecture,
    prompt: Sequence[int],
    max_new_tokens: int,
    context: int,
    what: str,
    *,
    truncate: bool = False,
) -> list[int]:
    """The prompt as it will be read by what cannot go on past the context.

    Args:
        what: names it in the error.
        truncate: read only the end of a prompt that leaves too little room.

    Raises:
        ConfigError: as ``check_prompts``, or prompt and new tokens do not fit the context together.
    """
    (checked,) = check_prompts(module, [prompt], context, truncate=truncate)
    room = context - max_new_tokens
    if room < 1 or (len(checked) > room and not truncate):
        rule = f"{what} needs prompt ({len(checked):,} tokens) and new tokens within the context of {context:,}"
        raise ConfigError(Problem("max_new_tokens", rule, max_new_tokens))
    return checked[-room:]
