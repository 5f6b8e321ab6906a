"""Linear kernels: the recurrence against its closed form, chunks against the recurrence, the choice of a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.dispatch import BackendRow, explain
from glowflow.core.attention.linear import chunked
from glowflow.core.attention.linear.base import LinearBackend, LinearInputs
from glowflow.core.attention.linear.chunked import ChunkBackend
from glowflow.core.attention.linear.kernels import LINEAR_BACKENDS, resolve_linear
from glowflow.core.attention.linear.recurrent import RecurrentBackend
from glowflow.core.attention.linear.scan import scan
from glowflow.core.attention.spec import AttentionSpec
from tests.core.attention.linear_cases import VARIANTS, documents, draw, leaves, padding, spec_of

CPU = Conditions("cpu", torch.float32, training=True)
BACKENDS = [backend for backend in LINEAR_BACKENDS.values() if not backend.reasons(spec_of("gated"), CPU)]
ids = {"ids": lambda backend: backend.name}


def evaluate(
    backend: LinearBackend, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and final state; gradients of a fixed functional of both with respect to everything."""
    inputs, wanted = leaves(inputs)
    if state is not None:
        state = state.detach().clone().requires_grad_()
        wanted.append(state)
    results = backend.run(inputs, spec, state)
    score = sum((x * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).sin().view_as(x)).sum() for x in results)
    assert isinstance(score, Tensor)
    return [x.detach() for x in results], list(torch.autograd.grad(score, wanted))


def pair_weights(inputs: LinearInputs, spec: AttentionSpec) -> Tensor:
    """(B, H, T, T) from its definition, pair by pair: what query i takes of key j besides their product."""
    batch, heads, length, _ = inputs.q.shape
    weights = torch.zeros(batch, heads, length, length, dtype=inputs.q.dtype)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                low, high = min(i, j), max(i, j)
                if spec.causal and j > i:
                    continue
                if inputs.documents is not None and len(set(inputs.documents[b, low : high + 1].tolist())) > 1:
                    continue
                if inputs.key_valid is not None and not inputs.key_valid[b, j]:
                    continue
                # From the left a key decays at each position after it, from the right at each before it.
                between = slice(j + 1, i + 1) if j <= i else slice(i, j)
                real = torch.ones(length) if inputs.key_valid is None else inputs.key_valid[b]
                lost = 0.0 if inputs.decay is None else (inputs.decay[b] * real)[:, between].sum(-1)
                weights[b, :, i, j] = torch.as_tensor(lost, dtype=weights.dtype).exp()
    return weights


@pytest.mark.parametrize("backend", BACKENDS, **ids)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["gated", "feature_map", "retention"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "documents-padding"])
def test_sums_over_pairs_equal_the_definition(backend: LinearBackend, variant: str, causal: bool, masked: bool) -> None:
    spec = spec_of(variant, causal=causal, chunk=4)
    inputs = draw(spec, 11)
    if masked:
        inputs = replace(inputs, documents=documents(11), key_valid=padding(11))
    scores = (inputs.q @ inputs.k.transpose(-2, -1)) * pair_weights(inputs, spec)
    if variant == "feature_map":
        want = scores @ inputs.v / (scores.sum(-1, keepdim=True) + 1e-10)
    else:
        want = scores @ inputs.v * spec.softmax_scale
    torch.testing.assert_close(backend.run(inputs, spec)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_the_delta_rule_equals_products_of_transitions(backend: LinearBackend) -> None:
    """S_t = a_t (I - beta_t k k^T) S_{t-1} + beta_t k v^T, as in arXiv:2412.06464, equation 10."""
    spec = spec_of("gated_delta", chunk=4)
    inputs = draw(spec, 9)
    assert inputs.decay is not None and inputs.beta is not None
    state = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    got, last = backend.run(inputs, spec)
    for t in range(9):
        k, beta = inputs.k[:, :, t, :, None], inputs.beta[:, :, t, None, None]
        kept = torch.eye(4, dtype=torch.float64) - beta * k @ k.transpose(-2, -1)
        state = inputs.decay[:, :, t, None, None].exp() * kept @ state + beta * k @ inputs.v[:, :, t, None]
        want = (inputs.q[:, :, t, None] @ state).squeeze(2) * spec.softmax_scale
        torch.testing.assert_close(got[:, :, t], want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 5, 8, 19])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "documents-padding"])
@pytest.mark.parametrize("segments", [False, True], ids=["at-once", "segments"])
def test_chunks_equal_the_recurrence_in_outputs_state_and_gradients(
    variant: str, length: int, causal: bool, masked: bool, segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if segments:
        monkeypatch.setattr(chunked, "_CACHED_BYTES", 1)  # one chunk of 8 positions at a time
        monkeypatch.setattr(chunked, "_FEWEST_CHUNKS", 1)
    spec = spec_of(variant, causal=causal)
    inputs = draw(spec, length)
    if masked:
        inputs = replace(inputs, documents=documents(length), key_valid=padding(length))
    columns = 6 if variant == "feature_map" else 5
    state = torch.rand(2, 3, 4, columns, dtype=torch.float64) if causal else None
    ours = evaluate(ChunkBackend(), inputs, spec, state)
    theirs = evaluate(RecurrentBackend(), inputs, spec, state)
    for got, want in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chunk_size_changes_nothing(variant: str) -> None:
    results = [
        ChunkBackend().run(draw(spec_of(variant), 21), spec_of(variant, chunk=chunk))[0] for chunk in (1, 3, 7, 64)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_a_sequence_in_parts_equals_the_whole(backend: LinearBackend, variant: str) -> None:
    spec = spec_of(variant, chunk=4)
    inputs = draw(spec, 15)
    whole, last = backend.run(inputs, spec)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 7), slice(7, 8), slice(8, 15)):
        cut = {n: x[:, :, part] for n, x in vars(inputs).items() if isinstance(x, Tensor)}
        out, state = backend.run(replace(inputs, **cut), spec, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_a_later_position_changes_no_bit_earlier(backend: LinearBackend, variant: str) -> None:
    spec = spec_of(variant)
    inputs = draw(spec, 21, dtype=torch.float32)
    before = backend.run(inputs, spec)[0]
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.decay, inputs.beta):
        if tensor is not None:
            tensor[:, :, 13] *= 0.5
    after = backend.run(inputs, spec)[0]
    assert torch.equal(before[:, :, :13], after[:, :, :13])
    assert not torch.isclose(before[:, :, 13:], after[:, :, 13:]).flatten(3).all(-1).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_exactly_the_visible_keys_have_a_gradient(backend: LinearBackend, variant: str, causal: bool) -> None:
    spec, length = spec_of(variant, causal=causal, chunk=4), 13
    inputs = replace(draw(spec, length), documents=documents(length), key_valid=padding(length))
    assert inputs.documents is not None and inputs.key_valid is not None
    for query in range(length):
        cut, _ = leaves(inputs)
        y = backend.run(cut, spec)[0][:, :, query]
        (grad,) = torch.autograd.grad(y.square().sum(), cut.v)
        for b in range(2):
            ids = inputs.documents[b].tolist()
            want = {
                j
                for j in range(length)
                if len(set(ids[min(query, j) : max(query, j) + 1])) == 1
                and inputs.key_valid[b, j]
                and (j <= query or not causal)
            }
            assert set(grad[b].abs().sum((0, 2)).nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS, **ids)
def test_padding_on_either_side_equals_no_padding(backend: LinearBackend, variant: str) -> None:
    spec = spec_of(variant, chunk=4)
    inputs = draw(spec, 12)
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[:, 3:10] = True
    cut = {n: x[:, :, 3:10] for n, x in vars(inputs).items() if isinstance(x, Tensor)}
    alone, alone_state = backend.run(replace(inputs, **cut), spec)
    padded, padded_state = backend.run(replace(inputs, key_valid=valid), spec)
    torch.testing.assert_close(padded[:, :, 3:10], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded_state, alone_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gated", "gated_delta"])
def test_strong_and_weak_decays_stay_finite_and_right(variant: str, dtype: torch.dtype) -> None:
    spec = spec_of(variant, chunk=16)
    inputs = draw(spec, 50, dtype=torch.float64)
    # Per head: nearly everything is lost at each step, by turns, nothing at all.
    decay = torch.stack((torch.full((50,), -300.0), -90.0 * torch.arange(50).remainder(2), torch.zeros(50)))
    inputs = replace(inputs, decay=decay.double().expand(2, -1, -1))
    want = RecurrentBackend().run(inputs, spec)[0]
    low = {n: x.to(dtype) for n, x in vars(inputs).items() if isinstance(x, Tensor)}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (got, state), grads = evaluate(ChunkBackend(), replace(inputs, **low), spec, None)
    assert got.dtype == dtype and state.dtype == torch.float32
    assert all(torch.isfinite(x).all() for x in (got, state, *grads))
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("matrices", [False, True])
def test_the_scan_has_first_and_second_derivatives(matrices: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 2 if matrices else 1
    shapes = [(1, 2, 3, size, size), (1, 2, 3, 2, 2), (1, 2, 2, 2)]
    given = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(scan, given)
    assert torch.autograd.gradgradcheck(scan, given)


def test_a_gradient_of_a_gradient_equals_the_recurrences() -> None:
    results = []
    for backend in (ChunkBackend(), RecurrentBackend()):
        inputs, wanted = leaves(draw(spec_of("gated_delta"), 11))
        loss = backend.run(inputs, spec_of("gated_delta"))[0].square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))  # type: ignore[arg-type]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_auto_takes_chunks_on_the_cpu_and_a_softmax_kernel_is_refused() -> None:
    assert resolve_linear(spec_of("gated"), "auto", CPU)[0].name == "chunk"
    assert resolve_linear(spec_of("gated"), "reference", CPU)[0].name == "reference"
    with pytest.raises(ConfigError, match="auto, chunk, fla, reference for kind linear"):
        resolve_linear(spec_of("gated"), "sdpa", CPU)
    with pytest.raises(ConfigError, match="Triton kernels run on CUDA alone"):
        resolve_linear(spec_of("gated"), "fla", CPU)


def test_explain_lists_the_linear_kernels() -> None:
    rows = {row.name: row for row in explain(spec_of("gated"), CPU)}
    assert set(rows) == set(LINEAR_BACKENDS)
    assert [name for name, row in rows.items() if row.chosen] == ["chunk"]
    assert rows["fla"].reasons and not rows["reference"].reasons
    assert not any(row.chosen for row in explain(spec_of("gated"), CPU, "fla"))
    foreign = explain(spec_of("gated"), CPU, "blocked")
    assert foreign[-1] == BackendRow("blocked", False, ("is not a kernel of kind linear",), "")
    assert not any(row.chosen for row in foreign)


def test_reasons_name_kind_dtype_and_heads() -> None:
    spec = AttentionSpec(kind="dense", heads=3, kv_heads=2)
    for backend in (ChunkBackend(), RecurrentBackend()):
        assert len(backend.reasons(spec, Conditions("cpu", torch.int64))) == 3
