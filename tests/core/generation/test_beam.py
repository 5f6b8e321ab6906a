"""Beam search: the optimum where the beam holds everything, greedy with one beam, scores that can be recomputed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError, GlowFlowError
from glowflow.core.generation import Hypothesis, SamplingOptions, beam_search, generate

from .models import CONTEXT, KINDS, Table, has_memory, make
from .test_decoding import batch_of, custom

EOS = 0


def table(size: int = 4, seed: int = 0) -> Table:
    return Table(2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))


def every_text(module: Table, prompt: int, steps: int, penalty: float, eos: int | None) -> list[tuple[float, Any]]:
    """All texts of so many steps, or of fewer that end with ``eos``: score and tokens, best first."""
    log_probs = module.table.detach().log_softmax(-1)
    found = {}
    for tokens in product(range(module.vocab_size), repeat=steps):
        text = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        total = sum(log_probs[a, b].item() for a, b in zip((prompt, *text), text, strict=False))
        found[text] = total / len(text) ** penalty
    return sorted(((score, text) for text, score in found.items()), reverse=True)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_holds_everything_finds_the_optimum(penalty: float, eos: int | None, seed: int) -> None:
    module, steps = table(seed=seed), 4
    want = every_text(module, 2, steps, penalty, eos)
    got = beam_search(module, [2], steps, 8, 4**steps, length_penalty=penalty, num_results=5, eos_id=eos)
    for found, (score, text) in zip(got, want[:5], strict=True):
        assert found.score == pytest.approx(score, abs=1e-12)
        ended = text[-1] == eos
        assert found.ids == (text[:-1] if ended else text) and found.finish == ("eos" if ended else "length")
        assert found.log_prob == pytest.approx(score * len(text) ** penalty, abs=1e-12)


def test_a_wider_beam_finds_what_greedy_decoding_misses() -> None:
    # After 0 the likeliest token is 1, but only 2 is followed by something certain.
    module = Table(torch.tensor([[0.0, 0.55, 0.45], [0.34, 0.33, 0.33], [0.98, 0.01, 0.01]]).log())
    assert beam_search(module, [0], 2, 8, 1)[0].ids == (1, 0)
    assert beam_search(module, [0], 2, 8, 2)[0].ids == (2, 0)


def test_a_longer_text_may_overtake_all_that_have_ended() -> None:
    # After 2 most texts end at once or after a 1; the rest goes on with a 3, which is nearly certain from then on.
    rows = [[0.25] * 4, [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3], [0.5, 0.38, 0.02, 0.1], [0.01, 0.01, 0.01, 0.97]]
    module = Table(torch.tensor(rows).log())
    best, second = beam_search(module, [2], 6, 8, 2, num_results=2, eos_id=EOS)
    assert best.ids == (3,) * 6 and best.score == pytest.approx(math.log(0.1 * 0.97**5) / 6, abs=1e-6)
    assert second.ids == () and second.finish == "eos" and second.score == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy_and_more_are_the_same_without_a_cache(kind: str) -> None:
    module = make(kind).eval()
    for prompt in ([3, 1, 4], [1]):
        (one,) = beam_search(module, prompt, 10, CONTEXT, 1)
        assert list(one.ids) == list(generate(module, prompt, 10, CONTEXT, SamplingOptions(temperature=0)))
        several = beam_search(module, prompt, 10, CONTEXT, 5, num_results=5)
        assert len({found.ids for found in several}) == 5
        assert _rounded(several) == _rounded(beam_search(module, prompt, 10, CONTEXT, 5, num_results=5, cached=False))
        for found in several:
            text = [*prompt, *found.ids]
            log_probs = module.logits(module(batch_of(text))[0].hidden)[0].log_softmax(-1)
            total = sum(log_probs[at, token].item() for at, token in enumerate(found.ids, len(prompt) - 1))
            assert found.log_prob == pytest.approx(total, abs=1e-9) and found.score == pytest.approx(total / 10)


def _rounded(found: Sequence[Hypothesis]) -> list[tuple[tuple[int, ...], float]]:
    return [(one.ids, round(one.score, 9)) for one in found]


def test_greedy_decoding_and_one_beam_end_at_the_same_token() -> None:
    module = make().eval()
    free = list(generate(module, [3, 1, 4], 12, CONTEXT, SamplingOptions(temperature=0)))
    stop = free[6]
    want = list(generate(module, [3, 1, 4], 12, CONTEXT, SamplingOptions(temperature=0, eos_id=stop)))
    (one,) = beam_search(module, [3, 1, 4], 12, CONTEXT, 1, eos_id=stop)
    assert (list(one.ids), one.finish) == (want, "eos")


def test_a_text_ends_where_it_is_told_to() -> None:
    module = table(5, seed=3)
    likely = beam_search(module, [2], 6, 8, 1)[0].ids[1:3]
    found = beam_search(module, [2], 6, 8, 40, num_results=40, ends=lambda ids: ids[-2:] == likely)
    assert {one.finish for one in found} == {"stop", "length"}
    for one in found:
        at = [i for i in range(1, len(one.ids)) if one.ids[i - 1 : i + 1] == likely]
        assert at == ([len(one.ids) - 1] if one.finish == "stop" else [])


def test_with_memory_a_text_may_be_longer_than_the_context() -> None:
    prompt = [i % 37 for i in range(30)]
    for kind in KINDS:
        if has_memory(kind):
            module = make(kind)
            (one,) = beam_search(module, prompt, 12, CONTEXT, 1)
            assert list(one.ids) == list(generate(module, prompt, 12, CONTEXT, SamplingOptions(temperature=0)))
        else:
            with pytest.raises(ConfigError, match=r"beam search needs prompt \(5 tokens\).*context of 16"):
                beam_search(make(kind), prompt[:5], 12, CONTEXT, 2)
    cut = beam_search(make(), prompt, 12, CONTEXT, 2, truncate_prompt=True)
    assert cut == beam_search(make(), prompt[-4:], 12, CONTEXT, 2)


def test_what_cannot_be_searched_is_refused() -> None:
    own, module = custom()
    with pytest.raises(ConfigError, match=r"the cache of Custom has no select\(\)"):
        beam_search(own, [1], 3, CONTEXT, 2)
    assert beam_search(own, [1], 3, CONTEXT, 2, cached=False) == beam_search(module, [1], 3, CONTEXT, 2, cached=False)
    with pytest.raises(ConfigError) as caught:
        beam_search(module, [1], 0, CONTEXT, 2, num_results=3, length_penalty=float("nan"))
    assert [p.key for p in caught.value.problems] == ["num_results", "length_penalty", "max_new_tokens"]
    with pytest.raises(ConfigError, match="num_beams"):
        beam_search(module, [1], 3, CONTEXT, 0)
    with pytest.raises(GlowFlowError, match="not finite"):
        beam_search(Table(torch.full((3, 3), float("nan"))), [1], 3, CONTEXT, 2)
