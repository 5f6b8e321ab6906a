"""Attention backends against the written-out definition in fp64; the choice of a backend; the cache."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.attention.backends import BACKENDS, Backend, ReferenceBackend, causal_mask
from glowflow.core.attention.cache import KVCache
from glowflow.core.attention.dispatch import explain, resolve
from glowflow.core.attention.spec import AttentionSpec


def definition(q: Tensor, k: Tensor, v: Tensor, allowed_bts: Tensor, scale: float) -> Tensor:
    """Row by row, head by head: softmax over the allowed keys only."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys = allowed_bts[b, t].nonzero().flatten()
                if len(keys):
                    scores = (k[b, h // group, keys] @ q[b, h, t]) * scale
                    out[b, h, t] = torch.softmax(scores, 0) @ v[b, h // group, keys]
    return out


def inputs(spec: AttentionSpec, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, spec.heads, queries), (2, spec.kv_heads, keys), (2, spec.kv_heads, keys)]
    drawn = [torch.randn(*s, spec.head_dim, dtype=dtype, generator=generator) for s in shapes]
    return [x.requires_grad_() for x in drawn]


SPECS = [
    AttentionSpec(heads=4, kv_heads=4, head_dim=8),
    AttentionSpec(heads=4, kv_heads=2, head_dim=6, scale=0.3),
    AttentionSpec(heads=3, kv_heads=1, head_dim=2),
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("spec", SPECS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 5), (3, 9)])
def test_outputs_and_gradients_equal_the_definition(
    backend: Backend, spec: AttentionSpec, queries: int, keys: int
) -> None:
    allowed = causal_mask(queries, keys, torch.device("cpu")).expand(2, queries, keys)
    ours, theirs = inputs(spec, queries, keys), inputs(spec, queries, keys)
    out = backend.run(*ours, spec)
    want = definition(*theirs, allowed, spec.softmax_scale)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    for got, wanted in zip(
        torch.autograd.grad(out, ours, direction), torch.autograd.grad(want, theirs, direction), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_mask_is_obeyed_and_a_blind_query_gets_zeros(backend: Backend) -> None:
    spec = SPECS[1]
    q, k, v = inputs(spec, 5, 5)
    mask = causal_mask(5, 5, q.device).repeat(2, 1, 1)
    mask[0, 3, :2] = False
    mask[1, 0] = False
    out = backend.run(q, k, v, spec, mask[:, None])
    torch.testing.assert_close(out, definition(q, k, v, mask, spec.softmax_scale), rtol=1e-11, atol=1e-12)
    assert out[1, :, 0].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_later_key_changes_nothing_earlier(backend: Backend) -> None:
    spec = SPECS[0]
    q, k, v = (x.detach().float() for x in inputs(spec, 9, 9))
    before = backend.run(q, k, v, spec)
    k[:, :, 6] += 1.0
    v[:, :, 6] -= 2.0
    after = backend.run(q, k, v, spec)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_dropout_only_in_training_and_unbiased(backend: Backend) -> None:
    spec = AttentionSpec(causal=False, heads=1, kv_heads=1, head_dim=2, dropout=0.5)
    q, k = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 400, 2)
    v = torch.ones(1, 1, 400, 2)
    assert torch.allclose(backend.run(q, k, v, spec), v)
    torch.manual_seed(0)
    dropped = backend.run(q, k, v, spec, training=True)
    assert dropped.std() > 0.01
    assert abs(dropped.mean().item() - 1.0) < 0.01


def test_auto_takes_sdpa_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    spec = AttentionSpec(heads=2, kv_heads=2, head_dim=10)
    resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="glowflow"):
        backend, reason = resolve(spec, "auto", "cpu", torch.float32)
        resolve(spec, "auto", "cpu", torch.float32)
    assert backend.name == "sdpa"
    assert "first that can serve" in reason
    assert len([r for r in caplog.records if "sdpa" in r.message]) == 1


def test_a_named_backend_that_cannot_serve_lists_every_reason() -> None:
    spec = AttentionSpec(kind="linear", heads=3, kv_heads=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        resolve(spec, "sdpa", "cpu", torch.int64)
    assert len(caught.value.problems) == 3
    for words in ("linear", "floating-point", "divide heads", "sdpa", "model.attention.backend"):
        assert words in str(caught.value)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto, sdpa, reference"):
        resolve(SPECS[0], "warp", "cpu", torch.float32)


def test_named_reference_is_used_and_explain_marks_it() -> None:
    backend, reason = resolve(SPECS[0], "reference", "cpu", torch.float32)
    assert isinstance(backend, ReferenceBackend)
    assert "named in the config" in reason
    rows = explain(SPECS[0], "meta", torch.float32)
    assert [(r.name, r.chosen) for r in rows] == [("sdpa", False), ("reference", True)]
    assert rows[0].reasons and not rows[1].reasons


def test_cache_fills_from_the_left_and_refuses_too_much() -> None:
    cache = KVCache.empty(2, 1, 1, 4, 3, "cpu", torch.float32)
    first, second = torch.full((1, 1, 3, 3), 1.0), torch.full((1, 1, 1, 3), 2.0)
    for layer in range(2):
        cache.update(layer, first + layer, -first)
    cache.advance(3)
    cache.require(1)
    k, v = cache.update(1, second, -second)
    assert k[0, 0, :, 0].tolist() == [2.0, 2.0, 2.0, 2.0]
    assert v[0, 0, :, 0].tolist() == [-1.0, -1.0, -1.0, -2.0]
    cache.advance(1)
    with pytest.raises(ConfigError, match="holds 4 positions"):
        cache.require(1)


def test_default_scale_is_the_root_of_the_head_width() -> None:
    assert math.isclose(AttentionSpec(head_dim=16).softmax_scale, 0.25)
