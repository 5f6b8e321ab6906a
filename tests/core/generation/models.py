"""Models that generation is tested with, one of every kind of memory, and a table whose distributions are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture, Carry
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.initialization import initialize
from glowflow.core.model import build_module

VOCABULARY, CONTEXT = 37, 16
LINEAR = {"kind": "linear", "linear": {"chunk": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped-alibi": {"position": "alibi", "kv_heads": 2},
    "windowed": {"attention": {"kind": "windowed", "window": 4}},
    "windowed-sinks": {"attention": {"kind": "windowed", "window": 4, "sinks": 2}},
    "sparse": {"attention": {"kind": "sparse", "sparse": {"local": 2, "stride": 4}}},
    "gated-linear": {"attention": LINEAR},
    "feature-map": {"attention": {"kind": "linear", "linear": {"variant": "feature_map", "chunk": 4}}},
    "retention": {"attention": {"kind": "linear", "linear": {"variant": "retention", "chunk": 4}}},
    "gated-delta": {"attention": {"kind": "linear", "linear": {"variant": "gated_delta", "chunk": 4}}},
    "adaptive": {
        "depth": 4,
        "attention": {"kind": "adaptive", "adaptive": {"pattern": "LGWD"}, "window": 3, "linear": {"chunk": 4}},
    },
    "transformer-xl": {"arch": "transformer-xl", "memory": 20},
    "transformer-xl-short-memory": {"arch": "transformer-xl", "memory": 4},
    "transformer-xl-no-memory": {"arch": "transformer-xl", "memory": 0},
    "mixture": {"moe": {"experts": 4, "active": 2}},
}
"""Name -> keys of ``model`` beside those of ``make``."""


def make(kind: str = "dense", seed: int = 0, **model: Any) -> BaseArchitecture:
    """A small model in fp64 whose next tokens are neither certain nor all alike."""
    small = {"arch": "transformer", "dim": 32, "depth": 2, "heads": 4, "ffn_dim": 40, "init_std": 0.4}
    keys = {**small, "vocab_size": VOCABULARY, **KINDS[kind], **model}
    module = build_module(GlowFlowConfig(model=keys, data={"context": CONTEXT}), "cpu").double()
    initialize(module, seed)
    return module


def has_memory(kind: str) -> bool:
    """Whether a text may be longer than the context without starting afresh."""
    return kind in ("transformer-xl", "transformer-xl-short-memory")


class TableCache:
    """All that a table of pairs remembers is the last token, which is read again each time."""

    def select(self, rows: Tensor) -> None: ...

    def save(self) -> None: ...

    def restore(self, saved: None) -> None: ...


class Table(BaseArchitecture):
    """Scores of the next token are looked up by the last one: ``table[last]``."""

    def __init__(self, scores_vv: Tensor) -> None:
        super().__init__(ArchitectureConfig(arch="table", vocab_size=len(scores_vv)))
        self.table = nn.Parameter(scores_vv.double())
        self.eval()

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        return ModelOutput(self.table[batch.tokens]), carry

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def new_cache(self, batch_size: int, max_length: int, device: Any = "cpu", dtype: Any = torch.float32) -> Any:
        return TableCache()

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        return self.table[tokens[:, -1:] if last_only else tokens]


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-square test; what has no probability must not have been counted."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    wanted = probabilities[possible] * counts.sum()
    assert wanted.min() >= 5, "too few draws for the test"
    statistic = ((counts[possible] - wanted).square() / wanted).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return 1.0 if freedom == 0 else float(torch.special.gammaincc(freedom, statistic.double() / 2))
