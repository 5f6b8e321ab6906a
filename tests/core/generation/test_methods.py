"""Generation from Python: the methods of ``GlowFlowModel``."""

from __future__ import annotations

from typing import Any

import pytest

from glowflow.config.errors import ConfigError
from glowflow.core.generation import SamplingOptions
from glowflow.core.model import GlowFlowModel


def model_of(seed: int = 0, kind: str = "bytes", context: int = 32) -> GlowFlowModel:
    model: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "init_std": 0.4, "vocab_size": 257}
    config = {"model": model, "data": {"context": context}, "training": {"seed": seed}}
    made = GlowFlowModel.from_config(config)
    made.set_tokenizer({"kind": kind})
    return made


def test_the_ways_to_write_agree() -> None:
    model, draft = model_of(), model_of(seed=1)
    want = model.generate([256, 1], 12, temperature=0)
    assert list(model.stream([256, 1], 12, 0.0)) == want
    assert model.generate([256, 1], 12, temperature=0, draft=draft, draft_tokens=3) == want
    assert list(model.beam_search([256, 1], 12, 1)[0].ids) == want
    (first, second) = model.generate_batch([[256, 1], [256]], 12, SamplingOptions(0), log_probs=1)
    assert first.ids == want and len(second.ids) == len(second.scores) == 12
    assert model.generate([256, 1], 12, temperature=0, repetition_penalty=5.0) != want
    assert model.generate([256, 1], 12, min_p=1.0) == want


def test_what_cannot_be_written_is_told() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="temperature"):
        model.generate([1], 3, temperature=-0.5)
    with pytest.raises(ConfigError, match="has 40 tokens"):
        model.stream([1] * 40, 3)
    assert len(model.generate([1] * 40, 3, truncate_prompt=True)) == 3
    with pytest.raises(ConfigError, match=r"draft: must have the model's tokenizer \(bytes\)"):
        model.generate([1], 3, draft=model_of(kind="chars"))
    with pytest.raises(ConfigError, match="context of 16"):
        model.generate([1], 20, draft=model_of(context=16))
