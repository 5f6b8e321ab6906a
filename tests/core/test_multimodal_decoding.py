"""Decoding with media: step by step as in one pass, with a cache that forgets, comes back and changes its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError
from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.architectures.base import MissingMethodError
from glowflow.core.generation import ConditionedModule, SamplingOptions, beam_search, generate_batch
from tests.core.media_batches import Row, media_batch, media_rows
from tests.core.media_models import FUSIONS, make


def even_rows(config: MultimodalConfig, length: int) -> list[Row]:
    """Rows that fill ``length`` positions exactly."""
    found = []
    for row in media_rows():
        used = int(media_batch(config, [row]).readout[0]) + 1
        found.append(row + [20 + place % 9 for place in range(length - used)])
    return found


@pytest.mark.parametrize(
    "model",
    [
        *({"fusion": fusion} for fusion in FUSIONS),
        {"fusion": "bottleneck", "bottleneck": {"from_layer": 0, "tokens": 3}, "norm_placement": "post"},
        {"fusion": "cross_attention", "cross_attention": {"attends": "latest", "every": 2}, "position": "alibi"},
        {"fusion": "mixture", "attention": {"kind": "linear", "linear": {"variant": "gated_delta"}}},
        {"fusion": "mixture", "attention": {"kind": "adaptive", "window": 4, "adaptive": {"policy": "gated"}}},
        {"fusion": "prefix", "attention": {"kind": "windowed", "window": 4}, "moe": {"experts": 2}},
        {"fusion": "late", "attention": {"kind": "sparse"}, "qk_norm": True},
        {"fusion": "prefix", "image": None, "audio": None},
    ],
    ids=str,
)
def test_decoding_step_by_step_is_the_whole_pass(model: dict[str, Any]) -> None:
    module = make(**model).eval()
    batch = media_batch(module.config, even_rows(module.config, 25), length=25)
    want = module.logits(module(batch, compute_loss=False)[0].hidden)
    for splits in ((20, 1, 1, 2, 1), (1, 2, 1, 9, 1, 11), (25,)):
        cache = module.new_cache(6, 25, dtype=torch.float64, media=batch.modalities)
        with torch.no_grad():
            steps = [module.decode(part, cache) for part in batch.tokens.split(splits, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-8, atol=1e-8)
    with pytest.raises(ConfigError, match="holds 25 positions"):
        module.decode(batch.tokens[:, :1], cache)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_cache_forgets_comes_back_and_changes_its_rows_with_their_media(fusion: str) -> None:
    module = make(fusion).eval()
    batch = media_batch(module.config, even_rows(module.config, 25), length=25)
    want = module.logits(module(batch, compute_loss=False)[0].hidden)
    cache = module.new_cache(6, 25, dtype=torch.float64, media=batch.modalities)
    assert cache.nbytes() > 0
    with torch.no_grad():
        module.decode(batch.tokens[:, :3], cache)  # between the media
        saved = cache.save()
        module.decode(batch.tokens[:, 7:11], cache)
        cache.restore(saved)
        again = module.decode(batch.tokens[:, 3:9], cache)
        torch.testing.assert_close(again, want[:, 3:9], rtol=1e-8, atol=1e-8)
        assert cache.cut(5)
        torch.testing.assert_close(module.decode(batch.tokens[:, 5:7], cache), want[:, 5:7], rtol=1e-8, atol=1e-8)
        rows = torch.tensor([4, 0, 0, 5])
        cache.select(rows)
        picked = module.decode(batch.tokens[rows, 7:20], cache, last_only=True)
        torch.testing.assert_close(picked, want[rows, 19:20], rtol=1e-8, atol=1e-8)
        assert cache.cut(0)
        whole = module.decode(batch.tokens[rows], cache)
        torch.testing.assert_close(whole, want[rows], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_prompts_without_media_need_none(fusion: str) -> None:
    module = make(fusion, dropout=0.5)
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = media_batch(module.config, [row.tolist() for row in tokens], length=9)
    module.eval()
    want = module.logits(module(batch, compute_loss=False)[0].hidden)
    module.train()
    cache = module.new_cache(2, 9, dtype=torch.float64)
    assert module.training  # and yet media are encoded without dropout
    module.eval()
    torch.testing.assert_close(module.decode(tokens, cache), want, rtol=1e-8, atol=1e-8)


def test_what_cannot_be_decoded_is_refused() -> None:
    module = make("prefix")
    batch = media_batch(module.config, media_rows())
    with pytest.raises(ConfigError, match="must be those of the 2 rows of the cache"):
        module.new_cache(2, 16, media=batch.modalities)
    for fusion, task in (("prefix", "classification"), ("late", "contrastive")):
        with pytest.raises(MissingMethodError, match="must be language_modelling to generate text"):
            make(fusion, task).new_cache(1, 4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_prompts_with_media_are_continued_alike_with_and_without_a_cache(fusion: str) -> None:
    module = make(fusion)
    rows = media_rows()
    one = [media_batch(module.config, [row]) for row in rows]
    prompts = [batch.tokens[0, : int(batch.readout[0]) + 1].tolist() for batch in one]
    conditioned = ConditionedModule(module, lambda numbers: media_batch(module.config, [rows[n] for n in numbers]))
    options = SamplingOptions(temperature=0)
    found = {
        cached: generate_batch(conditioned, prompts, 6, 24, options, batch_size=4, cached=cached)
        for cached in (True, False)
    }
    assert [text.ids for text in found[True]] == [text.ids for text in found[False]]
    beams = [beam_search(conditioned.for_texts([0]), prompts[0], 4, 24, 3, cached=cached) for cached in (True, False)]
    assert [beam.ids for beam in beams[0]] == [beam.ids for beam in beams[1]]
