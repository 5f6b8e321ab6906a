"""Prompts with media: each text is written as if it were alone, cached or not, in batches, beams and long calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import Batch, Modality, ModelOutput
from glowflow.core.generation import ConditionedModule, SamplingOptions, beam_search, generate, generate_batch
from glowflow.core.generation.conditioned import with_row_length

VOCABULARY, MEDIUM, CONTEXT = 23, 22, 24
GREEDY = SamplingOptions(temperature=0)


@dataclass
class SumCache:
    """The sum of everything read, and the media of the rows with their places."""

    sums: Tensor  # (B, D)
    media: Tensor  # (B, T, D), NaN: no medium here
    length: int = 0

    def select(self, rows: Tensor) -> None:
        self.sums, self.media = self.sums[rows], self.media[rows]


class SumModel(BaseArchitecture):
    """The scores are a function of the sum of all tokens so far; a slot of a medium adds its own vector."""

    def __init__(self) -> None:
        super().__init__(ArchitectureConfig(arch="transformer", vocab_size=VOCABULARY))
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.head = nn.Linear(8, VOCABULARY)
        with torch.no_grad():
            self.head.weight.copy_(3 * torch.randn(VOCABULARY, 8, generator=generator))
            self.head.bias.zero_()
        self.caches = 0

    def placed(self, media: dict[str, Modality], rows: int, length: int) -> Tensor:
        flat = torch.full((rows * length, 8), float("nan"))
        for one in media.values():
            flat[one.slot_index] = one.features.flatten(0, 1)[one.token_index]
        return flat.view(rows, length, 8)

    def vectors(self, tokens: Tensor, media: Tensor) -> Tensor:
        return torch.where(media.isnan(), self.embedding[tokens], media)

    def forward(self, batch: Batch, carry: Any = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Any]:
        rows, length = batch.tokens.shape
        x_btd = self.vectors(batch.tokens, self.placed(batch.modalities, rows, length))
        if batch.modalities:
            assert batch.text_index is not None
            assert len(batch.text_index) + sum(len(m.slot_index) for m in batch.modalities.values()) == rows * length
        return ModelOutput(x_btd.cumsum(1).sin()), None

    def new_cache(self, batch_size, max_length, device="cpu", dtype=torch.float32, media=None):
        self.caches += bool(media)
        return SumCache(torch.zeros(batch_size, 8), self.placed(media or {}, batch_size, max_length))

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        stop = cache.length + tokens.shape[1]
        x_btd = self.vectors(tokens, cache.media[:, cache.length : stop]).cumsum(1) + cache.sums[:, None]
        cache.sums, cache.length = x_btd[:, -1], stop
        scores: Tensor = self.head(x_btd.sin())
        return scores[:, -1:] if last_only else scores


def prompt(number: int) -> list[int]:
    """Text, a medium of 1 to 3 slots, text."""
    slots = 1 + number % 3
    return [number % 7] * (1 + number % 4) + [MEDIUM] * slots + [3] * (number % 5)


def media_of(numbers: Sequence[int]) -> Batch:
    """What a collate function gives: rows padded to a common length, one item in each."""
    prompts = [prompt(number) for number in numbers]
    length = 8 * -(-max(map(len, prompts)) // 8)
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts])
    slots = (tokens.flatten() == MEDIUM).nonzero().squeeze(1)
    within = [slot for number in numbers for slot in range(1 + number % 3)]
    items = torch.tensor([item * 3 for item, number in enumerate(numbers) for _ in range(1 + number % 3)])
    count = len(numbers)
    features = torch.stack([torch.randn(3, 8, generator=torch.Generator().manual_seed(n)) for n in numbers])
    modality = Modality(
        features=features,
        sizes=torch.full((count, 1), 3),
        present=torch.ones(count, dtype=torch.bool),
        sample_index=torch.arange(count),
        positions=torch.tensor([ids.index(MEDIUM) for ids in prompts]),
        row_items=torch.arange(count)[:, None],
        slot_index=slots,
        token_index=items + torch.tensor(within),
    )
    nothing = torch.zeros_like(tokens)
    return Batch(
        tokens,
        nothing,
        nothing.float(),
        nothing,
        nothing,
        nothing[:, 0],
        nothing[:, 0].bool(),
        True,
        {"sound": modality},
    )


def alone(module: SumModel, number: int, count: int) -> list[int]:
    """Greedy decoding by whole passes over one text, without any of the machinery."""
    text, features = prompt(number), media_of([number]).modalities["sound"].features[0]
    for _ in range(count):
        x_td = module.embedding[torch.tensor(text)].clone()
        slots = [place for place, token in enumerate(text[: len(prompt(number))]) if token == MEDIUM]
        x_td[slots] = features[: len(slots)]
        text.append(int(module.head(x_td.sum(0).sin()).argmax()))
    return text[len(prompt(number)) :]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("cached", [True, False])
def test_every_text_has_its_own_media_whatever_the_batch(batch_size: int, cached: bool) -> None:
    module = SumModel()
    prompts = [prompt(number) for number in range(13)]
    found = generate_batch(
        ConditionedModule(module, media_of), prompts, 9, CONTEXT, GREEDY, batch_size=batch_size, cached=cached
    )
    with torch.no_grad():
        want = [alone(module, number, 9) for number in range(13)]
    assert [done.ids for done in found] == want
    assert len(set(map(tuple, want))) > 8  # media and texts matter
    if cached:
        assert module.caches == -(-13 // batch_size)  # encoded once for each batch of texts


@pytest.mark.parametrize("cached", [True, False])
def test_texts_that_end_early_leave_the_others_theirs(cached: bool) -> None:
    module = SumModel()
    prompts = [prompt(number) for number in range(13)]

    def ends(number: int, token: int) -> bool:
        return number % 3 == 0

    found = generate_batch(
        ConditionedModule(module, media_of), prompts, 9, CONTEXT, GREEDY, batch_size=5, ends=ends, cached=cached
    )
    with torch.no_grad():
        want = [alone(module, number, 1 if number % 3 == 0 else 9) for number in range(13)]
    assert [done.ids for done in found] == want


def test_one_text_and_beams() -> None:
    module = SumModel()
    for number in (0, 4, 11):
        conditioned = ConditionedModule(module, lambda rows, number=number: media_of([number + row for row in rows]))
        with torch.no_grad():
            want = alone(module, number, 6)
        assert list(generate(conditioned, prompt(number), 6, CONTEXT, GREEDY)) == want
        for cached in (True, False):
            (greedy,) = beam_search(conditioned, prompt(number), 6, CONTEXT, 1, cached=cached)
            assert list(greedy.ids) == want
        one, other = (beam_search(conditioned, prompt(number), 5, CONTEXT, 4, cached=c, num_results=4) for c in (1, 0))
        assert [found.ids for found in one] == [found.ids for found in other]
        assert [found.log_prob for found in one] == pytest.approx([found.log_prob for found in other], rel=1e-4)


def test_a_text_must_fit_the_context_with_its_media() -> None:
    conditioned = ConditionedModule(SumModel(), media_of)
    with pytest.raises(ConfigError, match=r"a prompt with media needs prompt .* within the context of 12"):
        generate_batch(conditioned, [prompt(0), prompt(11)], 8, 12, GREEDY)
    with pytest.raises(ConfigError, match="within the context"):
        generate(conditioned, prompt(11), 8, 12, GREEDY)


def test_the_mode_and_the_parameters_are_the_module_s() -> None:
    module = SumModel().train()
    conditioned = ConditionedModule(module, media_of)
    assert conditioned.training and next(conditioned.parameters()) is module.embedding
    generate_batch(conditioned, [prompt(0), prompt(1)], 3, CONTEXT, GREEDY)
    assert module.training
    assert conditioned.eval().training is module.training is False


def test_slots_move_with_the_length_of_the_rows() -> None:
    media = media_of([2, 5, 3]).modalities["sound"]
    longer = with_row_length(media, 16, 20)
    assert (longer.slot_index // 20).tolist() == (media.slot_index // 16).tolist()
    assert (longer.slot_index % 20).tolist() == (media.slot_index % 16).tolist()
    shorter = with_row_length(media, 16, 4)
    kept = media.slot_index % 16 < 4
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(shorter.token_index, media.token_index[kept])
    assert ((shorter.slot_index % 4) == (media.slot_index % 16)[kept]).all()
