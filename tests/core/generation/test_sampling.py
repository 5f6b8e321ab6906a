"""From scores to a token: by hand, against transformers' processors, and in 100,000 draws."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError, GlowFlowError
from glowflow.core.generation import SamplingOptions, next_token_probabilities
from glowflow.core.generation.sampling import Sampler, draw

from .models import p_value

SCORES = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (SamplingOptions(), [0.5, 0.2, 0.2, 0.1]),
        (SamplingOptions(temperature=0), [1, 0, 0, 0]),
        (SamplingOptions(temperature=0.5), [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        (SamplingOptions(top_k=1), [1, 0, 0, 0]),
        (SamplingOptions(top_k=9), [0.5, 0.2, 0.2, 0.1]),
        (SamplingOptions(top_p=0.5), [1, 0, 0, 0]),
        (SamplingOptions(top_p=0.6), [5 / 7, 2 / 7, 0, 0]),
        (SamplingOptions(top_p=0.95), [0.5, 0.2, 0.2, 0.1]),
        (SamplingOptions(top_k=3, top_p=0.7), [5 / 7, 2 / 7, 0, 0]),
        (SamplingOptions(min_p=0.3), [5 / 9, 2 / 9, 2 / 9, 0]),
        (SamplingOptions(min_p=0.5), [1, 0, 0, 0]),
        (SamplingOptions(min_p=1), [1, 0, 0, 0]),
        (SamplingOptions(min_p=0), [0.5, 0.2, 0.2, 0.1]),
        # Of the temperature's 25/34, 4/34, 4/34, 1/34 the nucleus keeps two, of which one is below 0.2 of the other.
        (SamplingOptions(temperature=0.5, top_p=0.8, min_p=0.2), [1, 0, 0, 0]),
    ],
)
def test_probabilities_by_hand(options: SamplingOptions, want: list[float]) -> None:
    got = next_token_probabilities(SCORES, options)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    both = next_token_probabilities(torch.stack((SCORES.flip(0), SCORES)), options)
    assert torch.equal(both[1], got)


def test_the_repetition_penalty_by_hand() -> None:
    scores, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    got = next_token_probabilities(scores, SamplingOptions(repetition_penalty=4.0), seen)
    torch.testing.assert_close(got, torch.tensor([[0.5, -8.0, 2.0, -2.0]]).double().softmax(-1))
    greedy = next_token_probabilities(scores, SamplingOptions(0, repetition_penalty=4.0), seen)
    assert greedy.tolist() == [[0, 0, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-30, 30), min_size=2, max_size=20),
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.floats(1e-6, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_probabilities_are_a_distribution_with_the_best_token(
    scores: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    options = SamplingOptions(temperature, top_k, top_p, min_p=min_p)
    got = next_token_probabilities(torch.tensor(scores), options)
    assert (got >= 0).all()
    assert got.sum().item() == pytest.approx(1)
    assert got.max() == got[torch.tensor(scores).argmax()] > 0
    assert top_k is None or (got > 0).sum() <= top_k


@pytest.fixture(scope="module")
def processors() -> ModuleType:
    pytest.importorskip("transformers", reason="the comparison needs transformers (pip install -e .[dev])")
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(0.7),
        SamplingOptions(top_k=7),
        SamplingOptions(top_p=0.8),
        SamplingOptions(min_p=0.1),
        SamplingOptions(repetition_penalty=1.4),
        SamplingOptions(repetition_penalty=0.8),
        SamplingOptions(1.7, 12, 0.9, min_p=0.05, repetition_penalty=1.3),
        SamplingOptions(0.3, 30, 0.6, min_p=0.3, repetition_penalty=2.0),
    ],
)
def test_the_same_as_the_processors_of_transformers(processors: ModuleType, options: SamplingOptions) -> None:
    generator = torch.Generator().manual_seed(1)
    scores_nv = 3 * torch.randn(50, 40, dtype=torch.float64, generator=generator)
    texts_nt = torch.randint(40, (50, 9), generator=generator)
    theirs = [processors.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    theirs.append(processors.TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        theirs.append(processors.TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        theirs.append(processors.TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        theirs.append(processors.MinPLogitsWarper(options.min_p))
    want_nv = scores_nv
    for processor in theirs:
        want_nv = processor(texts_nt, want_nv)
    seen_nv = torch.zeros(50, 40, dtype=torch.bool).scatter_(1, texts_nt, True)
    got_nv = next_token_probabilities(scores_nv, options, seen_nv)
    torch.testing.assert_close(got_nv, want_nv.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(seed=1),
        SamplingOptions(0.6, seed=2),
        SamplingOptions(1.8, seed=3),
        SamplingOptions(top_k=5, seed=8),
        SamplingOptions(top_p=0.7, seed=5),
        SamplingOptions(min_p=0.2, seed=6),
        SamplingOptions(1.3, 9, 0.9, 7, min_p=0.1, repetition_penalty=1.5),
    ],
    ids=["plain", "cold", "hot", "top-k", "top-p", "min-p", "all"],
)
def test_100_000_draws_are_distributed_as_computed(options: SamplingOptions) -> None:
    """A thousand texts, a hundred draws each, through what the decoding loop calls."""
    generator = torch.Generator().manual_seed(0)
    scores_1v = 1.5 * torch.randn(1, 12, generator=generator)
    probabilities_v = next_token_probabilities(scores_1v, options, torch.arange(12)[None] % 3 == 0)[0]
    prompt, texts, counts_v = [0, 3, 6, 9], 1000, torch.zeros(12, dtype=torch.int64)
    sampler = Sampler(options, range(texts), [prompt] * texts, 12, torch.device("cpu"))
    for _ in range(100):
        chosen = sampler.choose(scores_1v.expand(texts, -1), range(texts))
        counts_v += torch.bincount(torch.tensor(chosen), minlength=12)
        if options.repetition_penalty != 1:  # what was chosen counts as seen from the next token on: begin anew
            sampler._seen_nv = torch.zeros(texts, 12, dtype=torch.bool).index_fill_(1, torch.tensor(prompt), True)
    assert counts_v.sum() == 100_000
    assert p_value(counts_v, probabilities_v) > 0.01


def test_the_chi_square_test_notices_a_wrong_distribution() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    drawn = draw(wanted.expand(100_000, -1), torch.rand(100_000, dtype=torch.float64, generator=_seeded(0)))
    counts = torch.bincount(drawn, minlength=3)
    assert p_value(counts, wanted) > 0.01
    assert p_value(counts, torch.tensor([0.51, 0.29, 0.2], dtype=torch.float64)) < 1e-6


def test_no_token_of_probability_zero_is_drawn_at_the_ends() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    largest = 1 - 2.0**-53  # of all that torch.rand gives in fp64
    for number, token in ((0.0, 1), (0.25 - 2.0**-53, 1), (0.25, 3), (largest, 3)):
        assert draw(probabilities, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_text_has_its_own_randomness() -> None:
    scores, device = torch.zeros(3, 1000), torch.device("cpu")

    def tokens(numbers: list[int], rows: list[int]) -> list[int]:
        sampler = Sampler(SamplingOptions(seed=4), numbers, [[0]] * len(numbers), 1000, device)
        return sampler.choose(scores[: len(numbers)], rows)

    first, second, third = tokens([0, 1, 2], [0, 1, 2])
    assert len({first, second, third}) == 3
    assert tokens([2, 0], [0, 1]) == [third, first]
    assert tokens([0, 1, 2], [1]) == [second]


def test_a_diverged_model_is_told_and_not_sampled() -> None:
    for temperature in (0, 1):
        sampler = Sampler(SamplingOptions(temperature), [0, 1], [[0], [0]], 3, torch.device("cpu"))
        scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]])
        assert len(sampler.choose(scores, [0])) == 1
        with pytest.raises(GlowFlowError, match="not finite"):
            sampler.choose(scores, [0, 1])


def test_bad_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingOptions(temperature=-1, top_k=0, top_p=1.5, min_p=-0.1, repetition_penalty=0)
    assert [p.key for p in caught.value.problems] == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    with pytest.raises(ConfigError, match="temperature"):
        SamplingOptions(temperature=float("nan"))
