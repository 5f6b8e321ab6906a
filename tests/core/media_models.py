"""Multi-modal models of all fusions and tasks, small, and what their tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glowflow.core.architectures.multimodal import Multimodal
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.initialization import initialize
from glowflow.core.model import build_module
from tests.core.media_batches import media_config

__all__ = ["CAUSAL", "FUSIONS", "TASKS", "assert_same", "make", "objective", "readings", "section"]

FUSIONS = ("prefix", "cross_attention", "bottleneck", "late", "mixture")
CAUSAL = {"prefix", "cross_attention", "mixture"}  # media count from their own place on
TASKS = [(fusion, task) for fusion in FUSIONS for task in ("language_modelling", "classification")]
TASKS += [("late", "contrastive")]


def section(fusion: str, task: str = "language_modelling", **model: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"fusion": fusion, "task": task, "bottleneck": {"from_layer": 1}, "depth": 2, **model}
    return {**given, "audio": None} if task == "contrastive" else given


def make(
    fusion: str, task: str = "language_modelling", *, dtype: torch.dtype = torch.float64, **model: Any
) -> Multimodal:
    """With weights that matter and open gates."""
    module = build_module(media_config(**{"init_std": 0.2, **section(fusion, task, **model)}), "cpu").to(dtype)
    assert isinstance(module, Multimodal)
    initialize(module, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_gate", "missing")):
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(len(name)))
    return module


def objective(output: ModelOutput) -> Tensor:
    """What is trained on; of pairs something that depends on all of them."""
    if output.pairs is None:
        return output.objective
    scores = output.logit_scale * output.pairs[0] @ output.pairs[1].T
    return (scores.log_softmax(-1).diagonal() * output.pair_weights).sum()


def readings(output: ModelOutput, batch: Batch) -> list[list[Tensor]]:
    """What comes out of each row: hidden states up to its end, the class's vector, the pair."""
    found = []
    for row, last in enumerate(batch.readout.tolist()):
        parts = [output.hidden[row, : last + 1]]
        parts += [] if output.pooled is None else [output.pooled[row]]
        parts += [] if output.pairs is None else [one[row] for one in output.pairs]
        found.append(parts)
    return found


def assert_same(got: list[list[Tensor]], want: list[list[Tensor]]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
