"""The adapter to flash-linear-attention against a fake with fla-core 0.6's documented signatures, on the CPU.

The fake computes position by position by the words of the documentation, checks what the real functions ask of their
arguments, and keeps the calls.

Legend: B batch, H heads, T positions, K width of keys, V width of values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.linear.fla import FlaBackend
from glowflow.core.attention.linear.kernels import resolve_linear
from glowflow.core.attention.linear.recurrent import RecurrentBackend
from tests.core.attention.fakes import KernelPackages
from tests.core.attention.linear_cases import VARIANTS, documents, draw, leaves, padding, spec_of

GPU = Conditions("cuda", torch.bfloat16, (9, 0), training=True)


class FakeFla:
    """``fla.ops.simple_gla.chunk_simple_gla`` and ``fla.ops.gated_delta_rule.chunk_gated_delta_rule``."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def chunk_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert g_gamma is None and not state_v_first and not kwargs
        self.calls.append({"kernel": "simple_gla", "q": q, "g": g, "cu_seqlens": cu_seqlens})
        return self._each(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens)

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        cp_context: object = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first)
        assert beta.shape == q.shape[:3] and not kwargs
        self.calls.append({"kernel": "gated_delta_rule", "q": q, "g": g, "cu_seqlens": cu_seqlens})
        return self._each(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)

    def _each(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        scale: float | None,
        initial: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, heads, _ = q.shape
        for x in (q, k, v, g, beta):
            assert x is None or (x.shape[:3] == (batch, length, heads) and x.is_contiguous())
        assert q.dtype == k.dtype == v.dtype
        dtype = q.dtype  # of the outputs; states are kept in fp32
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        if cu_seqlens is not None:
            assert batch == 1 and cu_seqlens.dtype == torch.int64
            assert cu_seqlens[0] == 0 and cu_seqlens[-1] == length and (cu_seqlens.diff() > 0).all()
            spans = [(0, a, b) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        else:
            spans = [(b, 0, length) for b in range(batch)]
        if initial is not None:
            assert initial.shape == (len(spans), heads, q.shape[3], v.shape[3])
        rows: list[list[Tensor]] = [[] for _ in range(batch)]
        states = []
        for number, (b, start, stop) in enumerate(spans):
            state = q.new_zeros(heads, q.shape[3], v.shape[3]) if initial is None else initial[number]
            for t in range(start, stop):
                if g is not None:
                    state = state * g[b, t].exp()[:, None, None]
                key, value = k[b, t], v[b, t]
                if beta is not None:
                    value = beta[b, t][:, None] * (value - torch.einsum("hkv,hk->hv", state, key))
                state = state + key[:, :, None] * value[:, None]
                factor = q.shape[-1] ** -0.5 if scale is None else scale
                rows[b].append(torch.einsum("hk,hkv->hv", q[b, t], state) * factor)
            states.append(state)
        outputs = torch.stack([torch.stack(row) for row in rows]).to(dtype)
        return outputs, torch.stack(states) if output_final_state else None


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelPackages:
    return KernelPackages(tmp_path, monkeypatch)


def install(packages: KernelPackages, version: str = "0.6.0") -> FakeFla:
    fake = FakeFla()
    packages.distribution("fla-core", version)
    for name in ("fla", "fla.ops"):
        packages.module(name)
    packages.module("fla.ops.simple_gla", chunk_simple_gla=fake.chunk_simple_gla)
    packages.module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=fake.chunk_gated_delta_rule)
    return fake


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("causal", "with_state"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "documents-padding"])
def test_the_adapter_equals_the_recurrence(
    packages: KernelPackages, variant: str, causal: bool, masked: bool, with_state: bool
) -> None:
    fake, spec = install(packages), spec_of(variant, causal=causal)
    inputs = draw(spec, 13)
    if masked:
        inputs = replace(inputs, documents=documents(13), key_valid=padding(13))
    state = torch.rand(2, 3, 4, 6 if variant == "feature_map" else 5, dtype=torch.float64) if with_state else None
    results = []
    for backend in (FlaBackend(), RecurrentBackend()):
        cut, wanted = leaves(inputs)
        out, last = backend.run(cut, spec, state)
        grads = torch.autograd.grad(out.square().sum() + last.square().sum(), wanted)
        results.append([out, last, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    kernel = "gated_delta_rule" if variant == "gated_delta" else "simple_gla"
    assert [call["kernel"] for call in fake.calls] == [kernel] * (1 if causal else 2)
    assert all((call["cu_seqlens"] is not None) == masked for call in fake.calls)
    assert all((call["g"] is None) == (variant == "feature_map") for call in fake.calls)


def test_half_precision_goes_in_and_decays_stay_in_fp32(packages: KernelPackages) -> None:
    fake, spec = install(packages), spec_of("gated")
    inputs = draw(spec, 5)
    assert inputs.decay is not None
    half = {name: getattr(inputs, name).bfloat16() for name in ("q", "k", "v")}
    out, _ = FlaBackend().run(replace(inputs, **half, decay=inputs.decay.float()), spec)
    assert out.dtype == fake.calls[0]["q"].dtype == torch.bfloat16
    assert fake.calls[0]["g"].dtype == torch.float32


def test_one_position_is_a_step_of_the_recurrence(packages: KernelPackages) -> None:
    fake, spec = install(packages), spec_of("gated")
    inputs, state = draw(spec, 1), torch.rand(2, 3, 4, 5, dtype=torch.float64)
    got, want = FlaBackend().run(inputs, spec, state), RecurrentBackend().run(inputs, spec, state)
    assert not fake.calls
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reasons(packages: KernelPackages) -> None:
    spec, backend = spec_of("gated"), FlaBackend()
    assert backend.reasons(spec, GPU) == ["the package fla-core is not installed"]
    install(packages)
    assert backend.reasons(spec, GPU) == []
    assert "chunk_simple_gla" in backend.advice(spec, GPU)
    for conditions, word in [
        (replace(GPU, device_type="cpu"), "CUDA"),
        (replace(GPU, dtype=torch.float64), "float64"),
        (replace(GPU, second_order=True), "second derivative"),
    ]:
        (reason,) = backend.reasons(spec, conditions)
        assert word in reason
    (reason,) = backend.reasons(replace(spec, head_dim=512), GPU)
    assert "256" in reason


def test_an_old_version_is_refused_and_a_broken_one_too(packages: KernelPackages) -> None:
    install(packages, "0.2.1")
    (reason,) = FlaBackend().reasons(spec_of("gated"), GPU)
    assert "0.4" in reason and "0.2.1" in reason


def test_what_cannot_be_imported_is_a_reason(packages: KernelPackages) -> None:
    packages.distribution("fla-core", "0.6.0")
    reasons = FlaBackend().reasons(spec_of("gated"), GPU)
    assert len(reasons) == 2 and all("cannot be imported" in reason for reason in reasons)


def test_auto_prefers_it_on_cuda_where_it_is_there(packages: KernelPackages) -> None:
    resolve_linear.cache_clear()
    assert resolve_linear(spec_of("gated"), "auto", GPU)[0].name == "chunk"
    install(packages)
    resolve_linear.cache_clear()
    assert resolve_linear(spec_of("gated"), "auto", GPU)[0].name == "fla"
    resolve_linear.cache_clear()
