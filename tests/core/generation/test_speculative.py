"""Speculative decoding: the model's own greedy text, and the model's own distribution whatever the draft proposes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.generation import SamplingOptions, Speculation, generate, next_token_probabilities, speculate
from glowflow.core.generation.speculative import verify

from .models import CONTEXT, KINDS, Table, make, p_value
from .test_decoding import custom

GREEDY = SamplingOptions(temperature=0)


def disturbed(module: BaseArchitecture, by: float) -> BaseArchitecture:
    """A draft that is right sometimes: the model with noise on its weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_speculation_is_the_greedy_text(kind: str, penalty: float) -> None:
    """The model's memory and the draft's are taken back to all places between nothing and everything accepted."""
    module, options = make(kind), SamplingOptions(temperature=0, repetition_penalty=penalty)
    prompt = [3, 1, 4]
    want = list(generate(module, prompt, CONTEXT - 3, CONTEXT, options))
    share = {}
    for name, draft in (("itself", make(kind)), ("near", disturbed(make(kind), 0.02)), ("other", make(kind, seed=1))):
        for draft_tokens in (1, 4):
            counts = Speculation()
            got = speculate(
                module, draft, prompt, CONTEXT - 3, CONTEXT, options, draft_tokens=draft_tokens, counts=counts
            )
            assert list(got) == want
            share[name, draft_tokens] = counts.accepted_share
            assert counts.passes + counts.accepted == CONTEXT - 3
    assert share["itself", 1] == share["itself", 4] == 1
    assert 0 < share["near", 4] < 1, "the test wants a draft that is right sometimes"


def test_draft_of_another_architecture_and_without_a_cache() -> None:
    for kind, other in (("dense", "gated-delta"), ("adaptive", "dense"), ("gated-linear", "transformer-xl")):
        module, draft = make(kind), make(other)
        want = list(generate(module, [5], 15, CONTEXT, GREEDY))
        assert list(speculate(module, draft, [5], 15, CONTEXT, GREEDY)) == want
        assert list(speculate(module, draft, [5], 15, CONTEXT, GREEDY, cached=False)) == want


def scores(seed: int, size: int = 4) -> Tensor:
    return 1.2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def joint(module: Table, first: int, steps: int, options: SamplingOptions, seen: set[int]) -> Tensor:
    """Probability of every text of so many tokens, in the order of ``product``."""
    found = []
    for tokens in product(range(module.vocab_size), repeat=steps):
        total, last, held = 1.0, first, set(seen)
        for token in tokens:
            mask = torch.tensor([place in held for place in range(module.vocab_size)])
            total *= next_token_probabilities(module.table.detach()[last], options, mask)[token].item()
            last, held = token, held | {token}
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "draft_tokens"),
    [
        (SamplingOptions(seed=1), 1),
        (SamplingOptions(seed=1), 3),
        (SamplingOptions(0.7, top_k=3, seed=2), 2),
        (SamplingOptions(seed=3, repetition_penalty=2.0), 3),
    ],
    ids=["one-at-a-time", "plain", "top-k", "penalty"],
)
def test_texts_are_distributed_as_the_model_samples_them(options: SamplingOptions, draft_tokens: int) -> None:
    """Whole texts of three tokens, of both ways of decoding, against their computed probabilities."""
    module, draft, runs, steps = Table(scores(0)), Table(scores(1)), 1500, 3
    wanted = joint(module, 2, steps, options, {2})
    counts = Speculation()
    seen = torch.zeros(4**steps, dtype=torch.int64)
    for number in range(runs):
        text = list(
            speculate(module, draft, [2], steps, 8, options, draft_tokens=draft_tokens, number=number, counts=counts)
        )
        seen[int("".join(map(str, text)), 4)] += 1
    share = counts.accepted_share
    assert share is not None and 0.3 < share < 0.95, "the draft must be wrong often enough for the test"
    assert p_value(*_grouped(seen, wanted)) > 0.001
    assert p_value(*_grouped(seen, joint(draft, 2, steps, options, {2}))) < 1e-6


def _grouped(counts: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Rare texts as one, so that each group is counted often enough; what is impossible stays apart."""
    often, never = probabilities * counts.sum() >= 10, probabilities == 0
    rare = ~often & ~never
    assert counts[never].sum() == 0 or not often.all()
    parts = (counts[often], counts[rare].sum()[None]), (probabilities[often], probabilities[rare].sum()[None])
    return torch.cat(parts[0]), torch.cat(parts[1]) / (1 - probabilities[never].sum())


def test_verified_tokens_are_distributed_as_the_models() -> None:
    """The first token of a round: proposed and accepted, or drawn in its place."""
    generator = torch.Generator().manual_seed(3)
    target_kv, draft_kv = scores(4, 6)[:3].double().softmax(-1), scores(5, 6)[:2].double().softmax(-1)
    runs = 20_000
    proposed = torch.multinomial(draft_kv[0], runs, replacement=True, generator=generator)
    second = torch.multinomial(draft_kv[1], runs, replacement=True, generator=generator)
    uniforms = torch.rand(runs, 3, dtype=torch.float64, generator=generator)
    first, after = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    for row, (one, two) in enumerate(zip(proposed.tolist(), second.tolist(), strict=True)):
        kept, token = verify(target_kv, draft_kv, [one, two], uniforms[row, :2], uniforms[row, 2])
        first[one if kept else token] += 1
        if kept:
            after[two if kept == 2 else token] += 1
    assert p_value(first, target_kv[0]) > 0.001
    assert p_value(after, target_kv[1]) > 0.001
    assert p_value(proposed.bincount(minlength=6), target_kv[0]) < 1e-6


def test_eos_ends_the_text_within_a_round() -> None:
    module = make()
    free = list(generate(module, [3, 1, 4], 12, CONTEXT, GREEDY))
    for stop in set(free):
        options = SamplingOptions(temperature=0, eos_id=stop)
        assert list(speculate(module, make(), [3, 1, 4], 12, CONTEXT, options)) == free[: free.index(stop)]


def test_what_cannot_be_decoded_speculatively_is_refused_at_once() -> None:
    own, module = custom()
    with pytest.raises(ConfigError, match=r"the cache of Custom has no save\(\) and restore\(\)"):
        speculate(own, module, [1], 5, CONTEXT)
    with pytest.raises(ConfigError, match=r"the cache of Custom has no save\(\) and restore\(\)"):
        speculate(module, own, [1], 5, CONTEXT)
    with pytest.raises(ConfigError) as caught:
        speculate(module, make(vocab_size=40), [1], 5, CONTEXT, draft_tokens=0)
    assert [p.key for p in caught.value.problems] == ["draft_tokens", "draft"]
    with pytest.raises(ConfigError, match="speculative decoding needs prompt"):
        speculate(module, make(), [1, 2], CONTEXT - 1, CONTEXT)
    with pytest.raises(ConfigError, match="at least one token"):
        speculate(module, make(), [], 5, CONTEXT)
    assert Speculation().accepted_share is None
