"""Which keys a query sees, of every kind and kernel, against plain Python numbers: a loss cannot verify a mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glowflow.core.attention.backends.base import Backend
from glowflow.core.attention.backends.blocked import BlockedBackend
from glowflow.core.attention.backends.gather import GatherBackend
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.masks import visible
from glowflow.core.attention.spec import AttentionSpec
from tests.core.attention.definition import PATTERNS, SITUATIONS, draw, seen_keys, sees

LENGTH = 37
KERNELS = {"windowed": BlockedBackend(block=4, worth=1.0), "sparse": GatherBackend(block=4, worth=1.0)}


def kernels(spec: AttentionSpec) -> list[Backend]:
    """Every kernel of the CPU that computes the kind."""
    own = [KERNELS[spec.kind]] if spec.kind in KERNELS else []
    return [ReferenceBackend(), SdpaBackend(), *own]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_rule_is_that_of_the_words(name: str, causal: bool) -> None:
    spec = replace(PATTERNS[name], causal=causal)
    positions = torch.arange(LENGTH)
    rule = visible(spec, positions[:, None], positions[None, :])
    assert rule.tolist() == [[sees(spec, query, key) for key in range(LENGTH)] for query in range(LENGTH)]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_reach_exactly_the_keys_that_are_seen(name: str, causal: bool, situation: str) -> None:
    spec = replace(PATTERNS[name], causal=causal, heads=2, kv_heads=1, head_dim=3)
    visibility = SITUATIONS[situation](LENGTH, LENGTH)
    for kernel in kernels(spec):
        q, k, v = draw(spec, LENGTH, LENGTH)
        out = kernel.run(q, k, v, spec, visibility)
        for query in (0, 2, 5, 14, 22, 34, 36):
            weights = torch.linspace(1.0, 2.0, out[:, :, query].numel(), dtype=out.dtype).view_as(out[:, :, query])
            grads = torch.autograd.grad((out[:, :, query] * weights).sum(), (k, v), retain_graph=True)
            for row in range(2):
                want = seen_keys(spec, visibility, row, query)
                reached = [grad[row].abs().amax((0, 2)).nonzero().flatten().tolist() for grad in grads]
                assert reached[1] == want, (kernel.name, query)
                if len(want) > 1:  # the weight of an only key is 1, whatever its score
                    assert reached[0] == want, (kernel.name, query)
                assert set(reached[0]) <= set(want), (kernel.name, query)
