"""Attention backends against the written-out definition in fp64; the choice of a backend; the cache."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.attention.backends.base import Backend, Conditions
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.cache import DecodeCache, FullKV, RingKV
from glowflow.core.attention.dispatch import SOFTMAX_BACKENDS, explain, resolve
from glowflow.core.attention.masks import Visibility, causal_mask
from glowflow.core.attention.spec import AttentionSpec

CPU = Conditions("cpu", torch.float32, training=True)
BACKENDS = [backend for backend in SOFTMAX_BACKENDS.values() if not backend.reasons(AttentionSpec(), CPU)]


def plain(q: Tensor, k: Tensor) -> Visibility:
    """Nothing but the spec's rule."""
    return Visibility(q.shape[2], k.shape[2], q.device)


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
    out = backend.run(*ours, spec, plain(*ours[:2]))
    want = definition(*theirs, allowed, spec.softmax_scale)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    for got, wanted in zip(
        torch.autograd.grad(out, ours, direction), torch.autograd.grad(want, theirs, direction), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_documents_and_padding_are_obeyed_and_a_blind_query_gets_zeros(backend: Backend) -> None:
    spec = SPECS[1]
    q, k, v = inputs(spec, 5, 5)
    documents = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]])
    valid = torch.tensor([[True] * 5, [False, True, True, True, True]])
    visibility = Visibility(5, 5, q.device, documents=documents, key_valid=valid)
    mask = causal_mask(5, 5, q.device) & (documents[:, :, None] == documents[:, None, :]) & valid[:, None, :]
    out = backend.run(q, k, v, spec, visibility)
    torch.testing.assert_close(out, definition(q, k, v, mask, spec.softmax_scale), rtol=1e-11, atol=1e-12)
    assert out[1, :, 0].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_later_key_changes_nothing_earlier(backend: Backend) -> None:
    spec = SPECS[0]
    q, k, v = (x.detach().float() for x in inputs(spec, 9, 9))
    before = backend.run(q, k, v, spec, plain(q, k))
    k[:, :, 6] += 1.0
    v[:, :, 6] -= 2.0
    after = backend.run(q, k, v, spec, plain(q, k))
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_dropout_only_in_training_and_unbiased(backend: Backend) -> None:
    spec = AttentionSpec(causal=False, heads=1, kv_heads=1, head_dim=2, dropout=0.5)
    q, k = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 400, 2)
    v = torch.ones(1, 1, 400, 2)
    assert torch.allclose(backend.run(q, k, v, spec, plain(q, k)), v)
    torch.manual_seed(0)
    dropped = backend.run(q, k, v, spec, plain(q, k), training=True)
    assert dropped.std() > 0.01
    assert abs(dropped.mean().item() - 1.0) < 0.01


def test_auto_takes_sdpa_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    spec = AttentionSpec(heads=2, kv_heads=2, head_dim=10)
    resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="glowflow"):
        backend, reason = resolve(spec, "auto", CPU)
        resolve(spec, "auto", CPU)
    assert backend.name == "sdpa"
    assert "first that can serve" in reason
    assert len([r for r in caplog.records if "sdpa" in r.message]) == 1


def test_a_named_backend_that_cannot_serve_lists_every_reason() -> None:
    spec = AttentionSpec(kind="linear", heads=3, kv_heads=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        resolve(spec, "sdpa", Conditions("cpu", torch.int64))
    assert len(caught.value.problems) == 3
    for words in ("linear", "floating-point", "divide heads", "sdpa", "model.attention.backend"):
        assert words in str(caught.value)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto, sdpa"):
        resolve(SPECS[0], "warp", CPU)


def test_named_reference_is_used_and_explain_marks_it() -> None:
    backend, reason = resolve(SPECS[0], "reference", CPU)
    assert isinstance(backend, ReferenceBackend)
    assert "named in the config" in reason
    rows = {row.name: row for row in explain(SPECS[0], Conditions("meta", torch.float32))}
    assert [name for name, row in rows.items() if row.chosen] == ["reference"]
    assert rows["sdpa"].reasons and not rows["reference"].reasons


def test_cache_fills_from_the_left_and_refuses_too_much() -> None:
    part = FullKV(1, 1, 4, 3, "cpu", torch.float32)
    cache = DecodeCache([part], 4)
    first, second = torch.full((1, 1, 3, 3), 1.0), torch.full((1, 1, 1, 3), 2.0)
    part.update(first, -first, cache.length)
    cache.advance(3)
    cache.require(1)
    k, v, positions = part.update(second, -second, cache.length)
    assert k[0, 0, :, 0].tolist() == [1.0, 1.0, 1.0, 2.0] and positions is None
    assert v[0, 0, :, 0].tolist() == [-1.0, -1.0, -1.0, -2.0]
    cache.advance(1)
    with pytest.raises(ConfigError, match="holds 4 positions"):
        cache.require(1)


def test_a_ring_holds_the_sinks_and_the_last_window() -> None:
    ring = RingKV(1, 1, 3, 2, 1, "cpu", torch.float32)

    def at(*positions: int) -> Tensor:
        return torch.tensor(positions, dtype=torch.float32).view(1, 1, -1, 1)

    keys, _, positions = ring.update(at(0, 1, 2, 3, 4, 5, 6), at(0, 1, 2, 3, 4, 5, 6), 0)
    assert positions is not None and sorted(positions[positions >= 0].tolist()) == [0, 1, 2, 3, 4, 5, 6]
    for now in (7, 8, 9):
        keys, _, positions = ring.update(at(now), -at(now), now)
        assert positions is not None and sorted(positions.tolist()) == [0, 1, now - 2, now - 1, now]
        assert keys.flatten().tolist() == positions.tolist()
    assert ring.nbytes() == 2 * 5 * 4


def test_default_scale_is_the_root_of_the_head_width() -> None:
    assert math.isclose(AttentionSpec(head_dim=16).softmax_scale, 0.25)
