"""Sampling: probabilities by hand, cached equals uncached, sliding past the context, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.architectures import TransformerConfig
from glowflow.config.errors import ConfigError
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.generation import SamplingOptions, generate, next_token_probabilities

Make = Callable[..., Transformer]
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
    ],
)
def test_probabilities_by_hand(options: SamplingOptions, want: list[float]) -> None:
    got = next_token_probabilities(SCORES, options)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-30, 30), min_size=2, max_size=20),
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.floats(1e-6, 1),
)
def test_probabilities_are_a_distribution_with_the_best_token(
    scores: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    got = next_token_probabilities(torch.tensor(scores), SamplingOptions(temperature, top_k, top_p))
    assert (got >= 0).all()
    assert got.sum().item() == pytest.approx(1)
    assert got.max() == got[torch.tensor(scores).argmax()] > 0
    assert top_k is None or (got > 0).sum() <= top_k


def greedy_without_cache(module: Transformer, batch: Batch, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        batch.tokens = torch.tensor([text])
        text.append(int(module.logits(module(batch, compute_loss=False)[0].hidden)[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_with_cache_equals_greedy_without(make_module: Make, make_batch: Callable[..., Batch]) -> None:
    module = make_module(init_std=0.4)
    want = greedy_without_cache(module, make_batch(rows=1), [3, 1, 4], 12)
    got = list(generate(module, [3, 1, 4], 12, context=16, options=SamplingOptions(temperature=0)))
    assert got == want
    assert len(set(got)) > 1


def test_past_the_context_it_goes_on_from_the_later_half(make_module: Make, make_batch: Callable[..., Batch]) -> None:
    module, prompt = make_module(init_std=0.4), [3, 1, 4, 1, 5]
    got = list(generate(module, prompt, 30, context=8, options=SamplingOptions(temperature=0)))
    text = prompt + got
    # The cache holds 8 tokens; the ninth is scored after the last 4 were read anew, and so after every 4 more.
    assert got[:4] == greedy_without_cache(module, make_batch(rows=1), prompt, 4)
    for start in range(5, len(text) - 8, 5):
        want = greedy_without_cache(module, make_batch(rows=1), text[start : start + 4], 5)
        assert text[start + 4 : start + 9] == want


def test_a_long_prompt_is_cut_to_the_context(make_module: Make) -> None:
    module, prompt = make_module(), [i % 37 for i in range(50)]
    options = SamplingOptions(seed=5)
    assert list(generate(module, prompt, 5, 8, options)) == list(generate(module, prompt[-8:], 5, 8, options))


def test_seed_decides_and_dropout_is_off(make_module: Make) -> None:
    module = make_module(dropout=0.5)

    def sample(seed: int) -> list[int]:
        return list(generate(module, [1], 20, 16, SamplingOptions(seed=seed)))

    assert sample(1) == sample(1) != sample(2)
    assert module.training


def test_eos_stops_and_is_not_given_out(make_module: Make) -> None:
    module = make_module(init_std=0.4)
    free = list(generate(module, [2], 12, 16, SamplingOptions(seed=3)))
    stop = free[5]
    got = list(generate(module, [2], 12, 16, SamplingOptions(seed=3, eos_id=stop)))
    assert got == free[: free.index(stop)]


def test_it_streams(make_module: Make) -> None:
    stream = generate(make_module(), [2], 10**9, 16)
    assert all(0 <= next(stream) < 37 for _ in range(3))


def test_bad_prompts_are_refused_at_once(make_module: Make) -> None:
    module = make_module()
    with pytest.raises(ConfigError, match="at least one token"):
        generate(module, [], 3, 16)
    with pytest.raises(ConfigError, match=r"0\.\.36"):
        generate(module, [0, 37], 3, 16)


def test_bad_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingOptions(temperature=-1, top_k=0, top_p=1.5)
    assert [p.key for p in caught.value.problems] == ["temperature", "top_k", "top_p"]


def test_a_windowed_model_decodes_in_memory_that_does_not_grow_with_the_text() -> None:
    """Measured: what the cache holds, and what its storages take, after ten times as much text."""
    sizes: dict[int, list[int]] = {}
    for length in (64, 640):
        attention = {"kind": "windowed", "window": 8, "sinks": 2}
        config = TransformerConfig(vocab_size=11, dim=16, depth=2, heads=2, attention=attention)  # type: ignore[arg-type]
        module = Transformer(config).eval()
        cache = module.new_cache(1, length)
        with torch.no_grad():
            module.decode(torch.zeros(1, 9, dtype=torch.int64), cache)
            for _ in range(length - 9):
                module.decode(torch.ones(1, 1, dtype=torch.int64), cache, last_only=True)
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # type: ignore[attr-defined]
        sizes[length] = [cache.nbytes(), *(tensor.untyped_storage().nbytes() for tensor in held)]
        assert cache.length == length
    assert sizes[64] == sizes[640]
    assert sizes[64][0] == 2 * 2 * (8 + 2) * 16 * 4  # layers, keys and values, positions, width, bytes
