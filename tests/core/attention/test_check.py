"""``attention check``: right kernels pass in every type, and each sort of wrong one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.attention import check
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.check import LIMITS, CheckRow, check_attention
from glowflow.core.attention.check_cases import CASES, CheckCase, draw
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

BY_NAME = {case.name: case for case in CASES}


def rows(names: list[str], *cases: str, dtypes: tuple[torch.dtype, ...] = ()) -> list[CheckRow]:
    chosen = [BY_NAME[name] for name in cases] if cases else CASES
    return list(check_attention("cpu", backends=names, dtypes=dtypes, cases=chosen))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torch_and_the_recurrences_pass(dtype: torch.dtype) -> None:
    some = ["causal, grouped heads", "causal, padding", "window, documents"]
    some += ["relative positions, memory", "gated, documents", "gated delta"]
    found = rows(["sdpa", "chunk", "reference"], *some, dtypes=(dtype,))
    served = [row for row in found if row.status != "cannot"]
    assert {row.status for row in served} == {"ok"}, [row for row in served if row.status != "ok"]
    assert {(row.kind, row.backend) for row in served} >= {("relative", "sdpa"), ("linear", "chunk")}
    for row in served:
        assert set(row.errors) >= {"out", "dq", "dk", "dv"} and set(row.errors) == set(row.limits)
        assert max(row.limits.values()) <= LIMITS[dtype]
    delta = next(row for row in served if row.case == "gated delta")
    assert set(delta.errors) == {"out", "dq", "dk", "dv", "ddecay", "dbeta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_other_types_have_limits_that_torch_keeps(dtype: torch.dtype) -> None:
    (row,) = rows(["sdpa"], "causal", dtypes=(dtype,))
    assert row.status == "ok" and LIMITS[dtype] / 100 < max(row.errors.values()) <= LIMITS[dtype]


def test_every_kind_and_variant_has_a_case() -> None:
    assert {case.kind for case in CASES} == {"dense", "windowed", "sparse", "linear", "relative"}
    assert {case.spec.linear.variant for case in CASES if case.spec.linear} == {
        *("gated", "feature_map", "retention", "gated_delta")
    }
    patterns = {case.spec.sparse.pattern for case in CASES if case.spec.sparse}
    assert patterns == {"strided", "fixed", "local_global", "blocks"}
    assert len(BY_NAME) == len(CASES)


def test_tiled_kernels_are_checked_where_they_tile() -> None:
    """A case that such a kernel passes on to SDPA with a mask would check nothing of it."""
    tiled = {name: kernel for name, kernel in check.SOFTMAX_BACKENDS.items() if name in ("blocked", "gather")}
    calls: list[str] = []

    class Recorder:
        def run(self, *args: Any, **more: Any) -> Tensor:
            calls.append("masked")
            return ReferenceBackend().run(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        for kernel in tiled.values():
            patch.setattr(__import__(type(kernel).__module__, fromlist=["_MASKED"]), "_MASKED", Recorder())
        for name in ("window", "window, sinks", "strided", "fixed", "local and global", "blocks"):
            kernel = tiled["blocked" if BY_NAME[name].spec.kind == "windowed" else "gather"]
            case, cpu = BY_NAME[name], torch.device("cpu")
            drawn = draw(case, torch.float64, cpu)
            kernel.run(drawn["q"], drawn["k"], drawn["v"], case.spec, case.visibility(cpu))
    assert calls == []


class Wrong(ReferenceBackend):
    """The reference, given another spec, or with its result spoilt."""

    name = "wrong"

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x, **other: Any) -> None:
        self.spoil, self.other = spoil, other

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        return self.spoil(super().run(q, k, v, replace(spec, **self.other), visibility, training))


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("illegal memory access")


class _LosesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.05


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (Wrong(window=18), "window"),
        (Wrong(window=16), "window"),
        (Wrong(sinks=2), "window, sinks"),
        (Wrong(causal=False), "causal"),
        (Wrong(scale=0.12), "causal"),
        (Wrong(softcap=None), "causal, softcap"),
        (Wrong(alibi=False), "causal, ALiBi"),
        (Wrong(lambda x: x * float("nan")), "causal"),
        (Wrong(lambda x: _LosesGradient.apply(x)), "causal"),
        (Wrong(raises), "causal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Wrong, case: str, dtype: torch.dtype) -> None:
    monkeypatch.setitem(check.SOFTMAX_BACKENDS, "wrong", wrong)
    (row,) = rows(["wrong"], case, dtypes=(dtype,))
    assert row.status == "failed"
    if wrong.spoil is raises:
        assert row.note == "RuntimeError: illegal memory access" and not row.errors
    else:
        assert not all(error <= row.limits[name] for name, error in row.errors.items())


def test_documents_are_held_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Wrong):
        def run(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, seen: Visibility, *_: Any) -> Tensor:  # type: ignore[override]
            return super().run(q, k, v, spec, Visibility(seen.num_queries, seen.num_keys, seen.device))

    monkeypatch.setitem(check.SOFTMAX_BACKENDS, "wrong", Blind())
    found = rows(["wrong"], "causal, documents", "causal, padding", "window, documents", dtypes=(torch.bfloat16,))
    assert [row.status for row in found] == ["failed"] * 3


def test_a_kernel_without_gradients_is_checked_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly(Wrong):
        def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
            return ["cannot train"] if conditions.training else []

    monkeypatch.setitem(check.SOFTMAX_BACKENDS, "wrong", ForwardOnly())
    (row,) = rows(["wrong"], "causal", dtypes=(torch.float32,))
    assert row.status == "ok" and set(row.errors) == {"out"} and "outputs alone" in row.note


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_refusals_carry_their_reasons() -> None:
    found = rows(["flash_attn_2", "flex"], "causal", "causal, behind a cache", dtypes=(torch.float32,))
    refused = {(row.backend, row.case): row.note for row in found if row.status == "cannot"}
    assert "CUDA alone" in refused["flash_attn_2", "causal"] and "not installed" in refused["flash_attn_2", "causal"]
    assert "compiled anew" in refused["flex", "causal, behind a cache"]


def test_what_changes_the_process_comes_last() -> None:
    order = [row.backend for row in rows(["flash_attn_3", "sdpa"], "causal", dtypes=(torch.float32,))]
    assert order == ["sdpa", "flash_attn_3"]


def test_unknown_names_and_a_missing_device_are_said_together() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError) as caught:
        list(check_attention("cuda", backends=["warp"]))
    assert [problem.key for problem in caught.value.problems] == ["--device", "--backend"]
    with pytest.raises(ConfigError, match="must be cpu or cuda"):
        list(check_attention("meta"))


def test_inputs_are_the_same_in_every_type_and_run() -> None:
    case = CheckCase("causal", AttentionSpec(heads=2, kv_heads=1, head_dim=8), 9)
    first, second = (draw(case, torch.float64, torch.device("cpu")) for _ in range(2))
    half = draw(case, torch.bfloat16, torch.device("cpu"))
    for name in ("q", "k", "v"):
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name].bfloat16(), half[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_on_the_gpu() -> None:
    failed = [row for row in check_attention("cuda") if row.status == "failed"]
    assert not failed, failed
