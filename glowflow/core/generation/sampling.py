"""From scores to a token: penalty, temperature, top-k, top-p, min-p, and a draw.

Every text has a generator of its own, seeded by (seed, number of the text), and takes one number in [0, 1) from it per
token. So what is written after a prompt does not depend on which other prompts are in the batch.

Legend: N texts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glowflow.config.errors import ConfigError, GlowFlowError, Problem
from glowflow.core.initialization import parameter_seed

__all__ = ["Sampler", "SamplingOptions", "draw", "next_token_probabilities", "require_finite"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Args:
        temperature: divides the scores; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to at least p (arXiv:1904.09751).
        seed: of the sampling alone.
        eos_id: stop after this token, which is not given out.
        min_p: sample among the tokens that are at least so likely, relative to the likeliest (arXiv:2407.01082).
        repetition_penalty: divides the positive scores, and multiplies the negative ones, of all tokens that the text
            holds already, the prompt's among them (arXiv:1909.05858); 1: none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    eos_id: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", "must be a finite number of at least 0", self.temperature))
        if self.top_k is not None and self.top_k < 1:
            problems.append(Problem("top_k", "must be at least 1", self.top_k))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", "must be above 0 and at most 1", self.top_p))
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(Problem("min_p", "must be at least 0 and at most 1", self.min_p))
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(Problem("repetition_penalty", "must be a finite number above 0", self.repetition_penalty))
        if problems:
            raise ConfigError(problems)


def next_token_probabilities(scores: Tensor, options: SamplingOptions, seen: Tensor | None = None) -> Tensor:
    """Probabilities after repetition penalty, temperature, top-k, top-p and min-p, in this order.

    Args:
        scores: (..., V).
        seen: (..., V) bool, the tokens that the text holds already; None: no penalty.

    Returns:
        (..., V) in fp64.
    """
    scores = _penalised(scores.double(), options, seen)
    if options.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    # Largest score first taken to 0, so that no temperature, however small, overflows.
    scores = (scores - scores.amax(-1, keepdim=True)) / options.temperature
    if options.top_k is not None and options.top_k < scores.shape[-1]:
        top = scores.topk(options.top_k)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, top.indices, top.values)
    probabilities = torch.softmax(scores, dim=-1)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while the ones before it do not yet reach p; so at least one stays.
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before < options.top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if options.min_p:
        least = options.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _penalised(scores: Tensor, options: SamplingOptions, seen: Tensor | None) -> Tensor:
    penalty = options.repetition_penalty
    if seen is None or penalty == 1:
        return scores
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def draw(probabilities_nv: Tensor, uniforms_n: Tensor) -> Tensor:
    """(N,) tokens: where the cumulative distribution passes a number in [0, 1). Both in fp64."""
    cumulative_nv = probabilities_nv.cumsum(-1)
    # The product stays below the total, and equal neighbours are skipped: no token of probability 0 is drawn.
    wanted_n1 = (uniforms_n * cumulative_nv[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_nv, wanted_n1, right=True).squeeze(-1)


class Sampler:
    """Chooses tokens for N texts, and remembers for each which tokens it holds and where its randomness stands.

    Args:
        options: how.
        numbers: number of each text in the whole call; seeds its generator.
        texts: the prompts, whole.
        vocab_size: V.
        device: where scores come from.
    """

    def __init__(
        self,
        options: SamplingOptions,
        numbers: Sequence[int],
        texts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self._generators = [
            torch.Generator().manual_seed(parameter_seed(options.seed, f"text {number}")) for number in numbers
        ]
        self._seen_nv: Tensor | None = None
        if options.repetition_penalty != 1:
            self._seen_nv = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
            for row_v, text in zip(self._seen_nv, texts, strict=True):
                row_v[torch.tensor(text, device=device)] = True

    def choose(self, scores_nv: Tensor, rows: Sequence[int]) -> list[int]:
        """A token for some of the texts; the others' randomness stays where it is.

        Args:
            scores_nv: of the next token of all N texts.
            rows: which of them want a token, in order.

        Raises:
            GlowFlowError: scores that are not finite.
        """
        if len(rows) < scores_nv.shape[0]:
            scores_nv = scores_nv[torch.tensor(rows, device=scores_nv.device)]
        if self.options.temperature == 0:
            largest_n, tokens_n = _penalised(scores_nv, self.options, self.seen(rows)).max(-1)
        else:
            largest_n = scores_nv.amax(-1)
            probabilities_nv = next_token_probabilities(scores_nv, self.options, self.seen(rows))
            tokens_n = draw(probabilities_nv, self.uniforms(rows).to(scores_nv.device))
        require_finite(largest_n)
        tokens: list[int] = tokens_n.tolist()
        if self._seen_nv is not None:
            self._seen_nv[list(rows), tokens] = True
        return tokens

    def saw(self, row: int, tokens: Sequence[int]) -> None:
        """A text holds these tokens too, which were not chosen here."""
        if self._seen_nv is not None:
            self._seen_nv[row, list(tokens)] = True

    def uniforms(self, rows: Sequence[int]) -> Tensor:
        """(N,) the next number in [0, 1) of each of these texts, in fp64 on the host."""
        drawn = [torch.rand((), dtype=torch.float64, generator=self._generators[row]) for row in rows]
        return torch.stack(drawn)

    def seen(self, rows: Sequence[int]) -> Tensor | None:
        """(N, V) bool, which tokens these texts hold; None without a penalty."""
        if self._seen_nv is None:
            return None
        return self._seen_nv if len(rows) == len(self._seen_nv) else self._seen_nv[list(rows)]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the texts, in this order."""
        self._generators = [self._generators[row] for row in rows]
        if self._seen_nv is not None:
            self._seen_nv = self._seen_nv[list(rows)]


def require_finite(largest_n: Tensor) -> None:
    """Check the largest score of each text; NaN is larger than everything.

    Raises:
        GlowFlowError: one is not finite.
    """
    if not all(map(math.isfinite, largest_n.tolist())):
        hint = "its weights hold NaN or infinity; take an earlier checkpoint"
        raise GlowFlowError(Problem("model", "gives scores that are not finite", hint=hint))
