"""BLEU over a corpus with several references of each text (K. Papineni et al., "BLEU: a method for automatic evaluation
of machine translation", ACL 2002).

    BLEU-n = BP * exp(mean over k = 1..n of log p_k)

p_k is the share of the k-grams of all texts that a reference of the same text has too, each counted at most as often
as the reference that has it most often. BP = exp(1 - r / c) where the texts, c words together, are shorter than r, the
sum of the closest lengths of their references (the shorter of two that are equally close), else 1. Nothing is smoothed:
an order of which no k-gram is right makes the score 0.

All of it follows from sums over texts, so that intervals resample texts at once, without counting anything anew.

Legend: N texts, R resamples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glowflow.metrics.intervals import Interval

__all__ = ["MAX_ORDER", "Bleu", "bleu_counts", "bleu_interval", "corpus_bleu", "corpus_bleu_of", "words"]

MAX_ORDER = 4
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Bleu:
    """The score of a corpus, in percent.

    Args:
        scores: BLEU-1 to BLEU-4.
        precisions: of 1-grams to 4-grams.
        brevity_penalty: between 0 and 1.
        length: words of the texts together.
        reference_length: of the closest references together.
    """

    scores: tuple[float, ...]
    precisions: tuple[float, ...]
    brevity_penalty: float
    length: int
    reference_length: int


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, as captions are usually compared."""
    return _WORD.findall(text.lower())


def corpus_bleu(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Bleu:
    """BLEU-1 to BLEU-4 of texts, each a list of words, against any number of references of each.

    Raises:
        ValueError: no texts, other numbers of texts and references, or a text without a reference.
    """
    return corpus_bleu_of(bleu_counts(texts, references))


def bleu_counts(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> NDArray[np.int64]:
    """What each text adds to the sums, (N, 10): right 1- to 4-grams, all of them, words, words of the reference.

    Raises:
        ValueError: as ``corpus_bleu``.
    """
    if not len(texts) or len(texts) != len(references) or not all(len(given) for given in references):
        raise ValueError(f"each text needs a reference; there are {len(texts)} texts, references of {len(references)}")
    return np.array([_counts(text, given) for text, given in zip(texts, references, strict=True)], np.int64)


def _counts(text: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    right, total = [], []
    for order in range(1, MAX_ORDER + 1):
        own, most = _ngrams(text, order), Counter[tuple[str, ...]]()
        for reference in references:
            most |= _ngrams(reference, order)
        right.append((own & most).total())
        total.append(own.total())
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return [*right, *total, len(text), closest]


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def corpus_bleu_of(counts_nk: NDArray[np.int64]) -> Bleu:
    """The score of texts whose counts (``bleu_counts``) these are."""
    sums = counts_nk.sum(0).astype(np.float64)[None]
    scores, precisions, penalty = _scores(sums)
    return Bleu(
        scores=tuple(scores[0].tolist()),
        precisions=tuple(precisions[0].tolist()),
        brevity_penalty=float(penalty[0]),
        length=int(sums[0, -2]),
        reference_length=int(sums[0, -1]),
    )


def bleu_interval(
    counts_nk: NDArray[np.int64], order: int = MAX_ORDER, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of BLEU-``order`` over texts (P. Koehn, "Statistical significance tests for machine
    translation evaluation", EMNLP 2004).

    Raises:
        ValueError: an order or a level that is none.
    """
    if not 1 <= order <= MAX_ORDER or not 0 < level < 1:
        raise ValueError(f"order must lie in 1..{MAX_ORDER} and level in 0..1, not {order} and {level}")
    counts, generator = counts_nk.astype(np.float64), np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, _CHUNK_ELEMENTS // len(counts))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        draws = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=stop - start)
        found[start:stop] = _scores(draws @ counts)[0][:, order - 1]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(corpus_bleu_of(counts_nk).scores[order - 1], float(low), float(high), level, "bootstrap")


def _scores(sums_rk: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """BLEU-1 to BLEU-4 (R, 4), precisions (R, 4), both in percent, and brevity penalties (R,)."""
    right, total = sums_rk[:, :MAX_ORDER], sums_rk[:, MAX_ORDER : 2 * MAX_ORDER]
    length, reference = sums_rk[:, -2], sums_rk[:, -1]
    precision = np.divide(right, total, out=np.zeros_like(right), where=total > 0)
    with np.errstate(divide="ignore"):
        mean_logs = np.cumsum(np.log(precision), axis=1) / np.arange(1, MAX_ORDER + 1)
    short = np.divide(reference, length, out=np.full_like(length, np.inf), where=length > 0)
    penalty = np.exp(np.minimum(0.0, 1 - short))
    return 100 * penalty[:, None] * np.exp(mean_logs), 100 * precision, penalty
