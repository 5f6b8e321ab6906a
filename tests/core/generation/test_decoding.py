"""Sampling loop: cached equals uncached, a batch equals its texts alone, sliding past the context, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.config.architectures import TransformerConfig
from glowflow.config.errors import ConfigError
from glowflow.core.architectures.base import BaseArchitecture, MissingMethodError
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.generation import SamplingOptions, generate, generate_batch, next_token_probabilities

from .models import CONTEXT, KINDS, VOCABULARY, Table, has_memory, make

GREEDY = SamplingOptions(temperature=0)
PROMPTS = [[1], [2, 3, 4], [7, 8, 9, 10], [5] * 9, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]
LONG = [[i % 37 for i in range(40)], [i % 31 for i in range(40)], [i % 29 for i in range(23)]]

every_kind = pytest.mark.parametrize("kind", KINDS)


def batch_of(text: list[int]) -> Batch:
    tokens = torch.tensor([text])
    return Batch(
        tokens, tokens, torch.ones(1, len(text)), tokens * 0, tokens * 0, torch.zeros(1), torch.ones(1).bool(), True
    )


def greedy_without_cache(module: BaseArchitecture, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(module.logits(module(batch_of(text))[0].hidden)[0, -1].argmax()))
    return text[len(prompt) :]


@every_kind
def test_greedy_with_cache_equals_greedy_without(kind: str) -> None:
    module = make(kind).eval()
    for prompt in PROMPTS:
        count = CONTEXT + 1 - len(prompt)  # the last token is scored when the context is full
        want = greedy_without_cache(module, prompt, count)
        assert list(generate(module, prompt, count, CONTEXT, GREEDY)) == want
        without = list(generate(module, prompt, count - 1, CONTEXT, GREEDY, cached=False))
        assert without == want[:-1]
    assert len(set(want)) > 1 or len(want) < 3


@every_kind
@pytest.mark.parametrize(
    "options",
    [GREEDY, SamplingOptions(seed=3), SamplingOptions(0.9, 20, 0.95, 1, 5, 0.02, 1.3)],
    ids=["greedy", "sampled", "everything"],
)
def test_a_batch_equals_its_texts_alone(kind: str, options: SamplingOptions) -> None:
    """Of different lengths, past the context, some ending earlier; one after another they are read without a batch."""
    module = make(kind)
    prompts = PROMPTS + (LONG if has_memory(kind) else [])
    alone = generate_batch(module, prompts, 20, CONTEXT, options, batch_size=1)
    assert generate_batch(module, prompts, 20, CONTEXT, options) == alone
    assert all(len(done.ids) == 20 for done in alone if done.finish == "length")
    if options.temperature:
        assert len({tuple(done.ids) for done in alone}) == len(prompts)
    else:
        for prompt, done in zip(prompts, alone, strict=True):
            assert list(generate(module, prompt, 20, CONTEXT, options)) == done.ids
        assert generate_batch(module, prompts, 20, CONTEXT, options, batch_size=2) == alone


def test_texts_that_end_leave_the_batch_and_the_others_do_not_notice() -> None:
    module = make("windowed-sinks")
    free = generate_batch(module, PROMPTS, 20, CONTEXT, SamplingOptions(seed=2))
    stop = free[1].ids[4]
    got = generate_batch(module, PROMPTS, 20, CONTEXT, SamplingOptions(seed=2, eos_id=stop))
    for whole, done in zip(free, got, strict=True):
        cut = whole.ids.index(stop) if stop in whole.ids else len(whole.ids)
        assert (done.ids, done.finish) == (whole.ids[:cut], "eos" if stop in whole.ids else "length")
    assert {done.finish for done in got} == {"eos", "length"}


def test_ends_is_asked_for_each_text() -> None:
    asked: list[list[int]] = [[] for _ in PROMPTS]

    def ends(number: int, token: int) -> bool:
        asked[number].append(token)
        return len(asked[number]) == number + 1

    got = generate_batch(make(), PROMPTS, 3, CONTEXT, ends=ends)
    assert [done.ids for done in got] == asked
    assert [len(done.ids) for done in got] == [1, 2, 3, 3, 3]
    assert [done.finish for done in got] == ["stop", "stop", "stop", "length", "length"]


class NoSelect:
    """A cache of somebody's own, with what is needed and no more."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Custom(Transformer):
    def new_cache(self, *args: Any, **more: Any) -> Any:
        return NoSelect(super().new_cache(*args, **more))

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        return super().decode(tokens, cache.inner, last_only=last_only)


def custom() -> tuple[Custom, BaseArchitecture]:
    """The dense model with a cache of its own, and as it is."""
    module = make()
    assert isinstance(module.config, TransformerConfig)
    other = Custom(module.config).double()
    other.load_state_dict(module.state_dict())
    return other, module


def test_a_cache_that_cannot_let_go_of_rows_gives_the_same() -> None:
    own, module = custom()
    options = SamplingOptions(seed=2, eos_id=7)
    want = generate_batch(module, PROMPTS, 24, CONTEXT, options)
    assert generate_batch(own, PROMPTS, 24, CONTEXT, options) == want
    assert any(done.finish == "eos" for done in want)


def test_without_cached_decoding_it_is_refused_but_possible_without_a_cache() -> None:
    class NoCache(Table):
        new_cache = BaseArchitecture.new_cache
        decode = BaseArchitecture.decode

    module = NoCache(torch.eye(4).roll(1, 1))
    with pytest.raises(MissingMethodError, match="new_cache"):
        generate(module, [0], 5, 8, GREEDY)
    assert list(generate(module, [0], 5, 8, GREEDY, cached=False)) == [1, 2, 3, 0, 1]


def test_past_the_context_it_goes_on_from_the_later_half() -> None:
    module, prompt = make(), [3, 1, 4, 1, 5]
    for cached in (True, False):
        got = list(generate(module, prompt, 30, context=8, options=GREEDY, cached=cached))
        text = prompt + got
        # The cache holds 8 tokens; the ninth is scored after the last 4 were read anew, and so after every 4 more.
        assert got[:4] == greedy_without_cache(module, prompt, 4)
        for start in range(5, len(text) - 8, 5):
            want = greedy_without_cache(module, text[start : start + 4], 5)
            assert text[start + 4 : start + 9] == want


def test_a_prompt_longer_than_the_context_is_refused_or_read_from_its_end() -> None:
    module, prompt = make(), [i % 37 for i in range(50)]
    for call in (generate, lambda m, p, *rest, **more: generate_batch(m, [p], *rest, **more)):
        with pytest.raises(ConfigError, match=r"prompt: has 50 tokens, but the model reads at most 8 .*truncate"):
            call(module, prompt, 5, 8)
    options = SamplingOptions(seed=5)
    cut = list(generate(module, prompt, 5, 8, options, truncate_prompt=True))
    assert cut == list(generate(module, prompt[-8:], 5, 8, options))


def test_a_model_with_memory_reads_a_prompt_of_any_length() -> None:
    module = make("transformer-xl")
    got = list(generate(module, LONG[0], 5, CONTEXT, GREEDY))
    assert list(generate(module, LONG[0], 5, CONTEXT, GREEDY, truncate_prompt=True)) == got
    with pytest.raises(ConfigError, match="without a cache"):
        generate(module, LONG[0], 5, CONTEXT, GREEDY, cached=False)


def test_seed_decides_and_dropout_is_off() -> None:
    module = make(dropout=0.5)

    def sample(seed: int) -> list[int]:
        return list(generate(module, [1], 20, 16, SamplingOptions(seed=seed)))

    assert sample(1) == sample(1) != sample(2)
    assert module.training


def test_eos_stops_and_is_not_given_out() -> None:
    module = make()
    free = list(generate(module, [2], 12, 16, SamplingOptions(seed=3)))
    stop = free[5]
    got = list(generate(module, [2], 12, 16, SamplingOptions(seed=3, eos_id=stop)))
    assert got == free[: free.index(stop)]


def test_it_streams() -> None:
    stream = generate(make(), [2], 10**9, 16)
    assert all(0 <= next(stream) < VOCABULARY for _ in range(3))


def test_nothing_is_written_where_nothing_is_wanted() -> None:
    assert list(generate(make(), [2], 0, 16)) == []
    (done,) = generate_batch(make(), [[2]], 0, 16)
    assert done.ids == [] and done.finish == "length"
    assert generate_batch(make(), [], 3, 16) == []


@pytest.mark.parametrize("kind", ["dense", "adaptive", "transformer-xl"])
def test_log_probs_are_those_of_the_whole_text_before_any_option(kind: str) -> None:
    module = make(kind).eval()
    done = generate_batch(module, PROMPTS, 6, 32, SamplingOptions(0.5, 5, seed=1, repetition_penalty=1.2), log_probs=3)
    for prompt, one in zip(PROMPTS, done, strict=True):
        text = prompt + one.ids
        log_probs = module.logits(module(batch_of(text))[0].hidden)[0].log_softmax(-1)
        assert len(one.scores) == 6
        for place, (token, told) in enumerate(zip(one.ids, one.scores, strict=True), len(prompt) - 1):
            assert told.log_prob == pytest.approx(log_probs[place, token].item(), abs=1e-9)
            best = log_probs[place].topk(3)
            assert [token for token, _ in told.alternatives] == best.indices.tolist()
            assert [log for _, log in told.alternatives] == pytest.approx(best.values.tolist(), abs=1e-9)


def test_the_repetition_penalty_counts_prompt_and_new_tokens() -> None:
    module, options = make().eval(), SamplingOptions(0, repetition_penalty=3.0)
    text = [3, 1, 4]
    for _ in range(10):
        scores = module.logits(module(batch_of(text))[0].hidden)[0, -1]
        seen = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill_(0, torch.tensor(text), True)
        text.append(int(next_token_probabilities(scores, options, seen).argmax()))
    assert list(generate(module, [3, 1, 4], 10, CONTEXT, options)) == text[3:]
    assert text[3:] != list(generate(module, [3, 1, 4], 10, CONTEXT, GREEDY))


def test_bad_prompts_are_refused_at_once_and_together() -> None:
    module = make()
    with pytest.raises(ConfigError, match="at least one token"):
        generate(module, [], 3, 16)
    with pytest.raises(ConfigError, match=r"0\.\.36"):
        generate(module, [0, 37], 3, 16)
    with pytest.raises(ConfigError) as caught:
        generate_batch(module, [[1], [], [40], [1] * 17], 3, 16)
    assert [p.key for p in caught.value.problems] == ["prompt 2", "prompt 3", "prompt 4"]
    with pytest.raises(ConfigError, match="batch_size"):
        generate_batch(module, [[1]], 3, 16, batch_size=0)
    with pytest.raises(ConfigError, match="context"):
        generate(module, [1], 3, 1)


@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"attention": KINDS["retention"]["attention"]}])
def test_training_goes_on_after_sampling(model: dict[str, Any]) -> None:
    """Tables that sampling has made must serve a pass with gradients."""
    module = make(**model)
    list(generate(module, [1, 2, 3], 8, CONTEXT))
    module(batch_of([1, 2, 3, 4]))[0].loss_sum.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


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
