"""BLEU: the paper's examples, parity with sacrebleu on any corpus, intervals from the counts."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.metrics.bleu import bleu_counts, bleu_interval, corpus_bleu, corpus_bleu_of, words

TEXT = st.lists(st.sampled_from("abcd"), max_size=9)
CORPUS = st.integers(1, 4).flatmap(
    lambda refs: st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=refs, max_size=refs)), min_size=1, max_size=6)
)


def test_the_paper_s_example_of_clipped_counts() -> None:
    references = [words("The cat is on the mat."), words("There is a cat on the mat.")]
    found = corpus_bleu([words("the the the the the the the")], [references])
    assert found.precisions[0] == pytest.approx(100 * 2 / 7)
    assert found.scores == (pytest.approx(100 * 2 / 7), 0, 0, 0)
    assert (found.length, found.reference_length, found.brevity_penalty) == (7, 7, 1)


def test_written_out_by_hand() -> None:
    found = corpus_bleu(
        ["a b c d e".split(), "a b".split()], [["a b c d x y z".split()], ["b a".split(), "a c a".split()]]
    )
    # 1-grams 4/5 + 2/2, 2-grams 3/4 + 0/1, 3-grams 2/3, 4-grams 1/2; 7 words where the references have 9.
    assert found.precisions == pytest.approx((600 / 7, 60, 200 / 3, 50))
    assert found.brevity_penalty == pytest.approx(math.exp(1 - 9 / 7))
    product = 1.0
    for order, precision in enumerate((6 / 7, 3 / 5, 2 / 3, 1 / 2), 1):
        product *= precision
        assert found.scores[order - 1] == pytest.approx(100 * math.exp(1 - 9 / 7) * product ** (1 / order))


def test_a_perfect_text_and_an_empty_one() -> None:
    text = "a man rides a brown horse".split()
    assert corpus_bleu([text], [[text, ["x"]]]).scores == pytest.approx((100,) * 4)
    nothing = corpus_bleu([[]], [[text]])
    assert nothing.scores == (0, 0, 0, 0) and nothing.brevity_penalty == 0
    # Of two references that are equally close in length the shorter one counts.
    assert corpus_bleu([["a"] * 4], [[["a"] * 5, ["a"] * 3]]).reference_length == 3


@settings(max_examples=150, deadline=None)
@given(CORPUS)
def test_equals_sacrebleu(corpus: list[tuple[list[str], list[list[str]]]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the reference implementation is not installed")
    texts, references = [text for text, _ in corpus], [refs for _, refs in corpus]
    streams = [[" ".join(refs[number]) for refs in references] for number in range(len(references[0]))]
    found = corpus_bleu(texts, references)
    for order in range(1, 5):
        metric = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
        want = metric.corpus_score([" ".join(text) for text in texts], streams)
        assert found.scores[order - 1] == pytest.approx(want.score, abs=1e-9)
        if any(want.counts):  # it leaves these at 0 where nothing is right
            assert found.precisions[:order] == pytest.approx(want.precisions)
            assert found.brevity_penalty == pytest.approx(want.bp)
        assert (found.length, found.reference_length) == (want.sys_len, want.ref_len)


def test_the_whole_corpus_at_once_equals_sacrebleu_s_function() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the reference implementation is not installed")
    generator = random.Random(0)
    texts = [generator.choices("abcde", k=generator.randint(3, 12)) for _ in range(60)]
    references = [[generator.choices("abcde", k=generator.randint(3, 12)) for _ in range(5)] for _ in texts]
    want = sacrebleu.corpus_bleu(
        [" ".join(text) for text in texts],
        [[" ".join(refs[number]) for refs in references] for number in range(5)],
        tokenize="none",
        smooth_method="none",
        force=True,
    )
    found = corpus_bleu(texts, references)
    assert 5 < found.scores[3] == pytest.approx(want.score)


def test_intervals_resample_texts() -> None:
    generator = random.Random(1)
    texts = [generator.choices("abcde", k=8) for _ in range(300)]
    references = [[generator.choices("abcde", k=8) for _ in range(3)] for _ in texts]
    counts = bleu_counts(texts, references)
    assert corpus_bleu_of(counts) == corpus_bleu(texts, references)
    interval = bleu_interval(counts, resamples=400)
    assert interval == bleu_interval(counts, resamples=400) != bleu_interval(counts, resamples=400, seed=1)
    assert interval.low < interval.estimate == corpus_bleu_of(counts).scores[3] < interval.high
    fewer = bleu_interval(counts[:75], resamples=400)
    assert 1.4 < (fewer.high - fewer.low) / (interval.high - interval.low) < 2.9  # the root of 4, about
    # One resample written out: the mean of draws is that of the whole corpus.
    draws = np.random.default_rng(0).integers(0, 300, (400, 300))
    slow = [corpus_bleu_of(counts[rows]).scores[3] for rows in draws]
    assert np.quantile(slow, [0.025, 0.975]) == pytest.approx([interval.low, interval.high], rel=0.03)


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("A dog's ball , red - and ROUND .") == ["a", "dog's", "ball", "red", "and", "round"]
    assert words("Ein Mädchen läuft; 3 Hunde!") == ["ein", "mädchen", "läuft", "3", "hunde"]
    assert words(" . ") == []


def test_nothing_to_measure_is_refused() -> None:
    for texts, references in (([], []), ([["a"]], []), ([["a"]], [[]])):
        with pytest.raises(ValueError, match="needs a reference"):
            corpus_bleu(texts, references)
    with pytest.raises(ValueError, match="order must lie"):
        bleu_interval(bleu_counts([["a"]], [[["a"]]]), 5)
