"""Beam search: the likeliest texts rather than likely tokens.

The best ``num_beams`` texts go on at every step. One that ends is put aside with the score

    log p(new tokens) / (number of new tokens) ^ length_penalty,

where the token that ends a document counts. The search is over when no text that goes on can still become better than
the worst of the best ones that have ended, whatever its length.

Legend: N texts that go on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.generation.decoding import Finish
from glowflow.core.generation.reading import Reader, check_prompts, open_reader, remembers, whole_text
from glowflow.core.generation.sampling import require_finite

__all__ = ["Hypothesis", "beam_search"]


@dataclass(frozen=True)
class Hypothesis:
    """A text that the search has ended with.

    Args:
        ids: the new tokens; a token that ends a document is not among them.
        log_prob: sum of the logarithms of their probabilities, of the token that ends a document too.
        score: ``log_prob`` over the length to the power of the penalty.
        finish: why there are no more tokens.
    """

    ids: tuple[int, ...]
    log_prob: float
    score: float
    finish: Finish


@dataclass(frozen=True)
class _Beams:
    """The texts that go on: new tokens of each, and its log-probability."""

    ids: list[tuple[int, ...]]
    log_probs: list[float]


def beam_search(
    module: BaseArchitecture,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    context: int,
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    num_results: int = 1,
    eos_id: int | None = None,
    ends: Callable[[Sequence[int]], bool] | None = None,
    truncate_prompt: bool = False,
    cached: bool = True,
) -> list[Hypothesis]:
    """Search for the likeliest continuations of a prompt.

    Args:
        module, prompt_ids, max_new_tokens, context, truncate_prompt, cached: as for ``generate``; prompt and new tokens
            must fit the context together, unless the model has a memory.
        num_beams: texts that go on at every step; 1 is greedy decoding.
        length_penalty: 0: the likeliest text; larger numbers prefer longer texts.
        num_results: how many texts to give back, at most ``num_beams``.
        eos_id: the token that ends a document.
        ends: asked with all new tokens of a text: whether it ends with them.

    Returns:
        The best texts, best first.

    Raises:
        ConfigError: a prompt as in ``generate``, a text that does not fit, a number out of range, or an architecture
            whose cache cannot reorder its rows.
    """
    problems = []
    if num_beams < 1:
        problems.append(Problem("num_beams", "must be at least 1", num_beams))
    if not 1 <= num_results <= max(1, num_beams):
        problems.append(Problem("num_results", f"must lie between 1 and num_beams ({num_beams})", num_results))
    if not -100 <= length_penalty <= 100:
        problems.append(Problem("length_penalty", "must lie between -100 and 100", length_penalty))
    if max_new_tokens < 1:
        problems.append(Problem("max_new_tokens", "must be at least 1", max_new_tokens))
    if problems:
        raise ConfigError(problems)
    if cached and remembers(module, context):
        (prompt,) = check_prompts(module, [prompt_ids], context)
    else:
        prompt = whole_text(module, prompt_ids, max_new_tokens, context, "beam search", truncate=truncate_prompt)
    reader = open_reader(module, 1, context, cached)
    reason = reader.cannot("select")
    if reason:
        hint = "give the cache the methods of DecodeCache (docs/custom-architecture.md), or search without a cache"
        raise ConfigError(Problem("num_beams", f"beam search reorders the cache's rows: {reason}", hint=hint))
    search = _Search(num_beams, length_penalty, max_new_tokens, eos_id, ends)
    return search.run(reader, prompt)[:num_results]


class _Search:
    """What has ended so far, and how it is compared."""

    def __init__(
        self,
        num_beams: int,
        length_penalty: float,
        max_new_tokens: int,
        eos_id: int | None,
        ends: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        self.num_beams, self.length_penalty, self.max_new_tokens = num_beams, length_penalty, max_new_tokens
        self.eos_id, self.ends = eos_id, ends
        self.ended: list[Hypothesis] = []

    def run(self, reader: Reader, prompt: Sequence[int]) -> list[Hypothesis]:
        """The best texts, best first."""
        beams, unread = _Beams([()], [0.0]), [list(prompt)]
        while True:
            log_probs_nv = _log_probs(reader.read(unread))
            parents, beams = self._step(log_probs_nv, beams)
            if not parents or self._over(beams):
                return self.ended
            reader.select(parents)
            unread = [[ids[-1]] for ids in beams.ids]

    def _step(self, log_probs_nv: Tensor, beams: _Beams) -> tuple[list[int], _Beams]:
        """One token more: rows of the texts that go on, and these texts."""
        vocab_size = log_probs_nv.shape[1]
        sums_nv = log_probs_nv + torch.tensor(beams.log_probs, dtype=torch.float64, device=log_probs_nv.device)[:, None]
        # Twice as many as are needed: of two next tokens of a text only one ends the document.
        best = sums_nv.flatten().topk(min(2 * self.num_beams, sums_nv.numel()))
        parents: list[int] = []
        ids: list[tuple[int, ...]] = []
        log_probs: list[float] = []
        for place, log_prob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if len(parents) == self.num_beams or log_prob == float("-inf"):
                break
            row, token = divmod(place, vocab_size)
            if not self._ends(beams.ids[row], token, log_prob):
                parents.append(row)
                ids.append((*beams.ids[row], token))
                log_probs.append(log_prob)
        return parents, _Beams(ids, log_probs)

    def _ends(self, before: tuple[int, ...], token: int, log_prob: float) -> bool:
        """Put a text aside that ends with this token."""
        after, length = (*before, token), len(before) + 1
        finish: Finish
        if token == self.eos_id:
            finish, after = "eos", before
        elif self.ends is not None and self.ends(after):
            finish = "stop"
        elif length == self.max_new_tokens:
            finish = "length"
        else:
            return False
        self.ended.append(Hypothesis(after, log_prob, self._score(log_prob, length), finish))
        # Equal scores stay in the order in which they were found: that of the vocabulary.
        self.ended = sorted(self.ended, key=lambda found: -found.score)[: self.num_beams]
        return True

    def _score(self, log_prob: float, length: int) -> float:
        return log_prob / length**self.length_penalty

    def _over(self, beams: _Beams) -> bool:
        """Whether nothing better can come: a log-probability only falls, and some length favours it most."""
        if len(self.ended) < self.num_beams:
            return False
        if self.num_beams == 1:  # greedy decoding, which ends where its text does
            return True
        favoured = self.max_new_tokens if self.length_penalty > 0 else len(beams.ids[0]) + 1
        return self._score(max(beams.log_probs), favoured) <= self.ended[-1].score


def _log_probs(scores_nv: Tensor) -> Tensor:
    """(N, V) in fp64."""
    require_finite(scores_nv.amax(-1))
    return scores_nv.double().log_softmax(-1)
