"""Small models and batches for the tests of core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.initialization import initialize

SMALL = {"arch": "transformer", "dim": 32, "depth": 2, "heads": 4, "ffn_dim": 40, "vocab_size": 37}


@pytest.fixture
def make_config() -> Callable[..., GlowFlowConfig]:
    def make(**model: Any) -> GlowFlowConfig:
        return GlowFlowConfig(model={**SMALL, **model}, data={"context": 16})

    return make


@pytest.fixture
def make_module(make_config: Callable[..., GlowFlowConfig]) -> Callable[..., Transformer]:
    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **model: Any) -> Transformer:
        module = Transformer(make_config(**model).model).to(dtype)
        initialize(module, seed)
        return module

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(rows: int = 3, length: int = 11, vocab_size: int = 37, documents: bool = False, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        positions = torch.arange(length).expand(rows, length)
        ids = (torch.rand(rows, length, generator=generator) < 0.3).long().cumsum(1) if documents else positions * 0
        return Batch(
            tokens=text[:, :-1],
            targets=text[:, 1:],
            loss_weights=(torch.rand(rows, length, generator=generator) < 0.8).float(),
            positions=positions,
            document_ids=ids,
            sample_ids=torch.arange(rows),
            reset=torch.zeros(rows, dtype=torch.bool),
            single_document=not documents,
        )

    return make
