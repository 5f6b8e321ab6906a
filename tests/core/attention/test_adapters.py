"""The adapters of other kernels: what they hand over, what comes back, and why they cannot serve.

The packages are fakes with the documented signatures (``fakes.py``); what they return is computed, so that every
adapter is held against the reference in outputs and gradients.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import ConfigError
from glowflow.core.attention.backends import flex, fused
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.backends.packages import import_reasons, package_reasons, version_of
from glowflow.core.attention.backends.xformers import attention_bias
from glowflow.core.attention.dispatch import SOFTMAX_BACKENDS, candidates, explain, resolve
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec, SparsePattern

from .fakes import BlockBias, KernelPackages

MHA = AttentionSpec(heads=4, kv_heads=4, head_dim=8)
GQA = AttentionSpec(heads=4, kv_heads=2, head_dim=8, scale=0.3)
WINDOW = replace(GQA, kind="windowed", window=5)
BLOCKS = SparsePattern("blocks", block_size=4, blocks=((True, False, False), (True, True, False), (True, False, True)))
H100 = Conditions("cuda", torch.bfloat16, (9, 0), training=True)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelPackages]:
    resolve.cache_clear()
    yield KernelPackages(tmp_path, monkeypatch)
    resolve.cache_clear()


def inputs(spec: AttentionSpec, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, spec.heads, queries), (2, spec.kv_heads, keys), (2, spec.kv_heads, keys)]
    drawn = [torch.randn(*shape, spec.head_dim, dtype=torch.float64, generator=generator) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def assert_parity(name: str, spec: AttentionSpec, queries: int, keys: int, documents: Tensor | None = None) -> None:
    """Outputs and gradients of a backend equal the reference's."""
    results = []
    for backend in (name, "reference"):
        given = inputs(spec, queries, keys)
        visibility = Visibility(queries, keys, given[0].device, documents=documents)
        out = SOFTMAX_BACKENDS[backend].run(*given, spec, visibility)
        direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        results.append((out, *torch.autograd.grad(out, given, direction)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


DENSE = [MHA, GQA, replace(GQA, causal=False)]
WINDOWED = [WINDOW, replace(WINDOW, window=1), replace(WINDOW, window=40), replace(WINDOW, causal=False)]
EXTRAS = [replace(GQA, softcap=2.0), replace(WINDOW, softcap=2.0)]
ALIBI = [replace(GQA, alibi=True), replace(WINDOW, alibi=True), replace(GQA, alibi=True, causal=False, softcap=1.5)]
SERVED = {
    "flash_attn_2": [*DENSE, *WINDOWED, *EXTRAS, *ALIBI],
    "flash_attn_3": [*DENSE, *WINDOWED],
    "flash_attn_4": [*DENSE, *WINDOWED, *EXTRAS],
    "xformers": [*DENSE, *WINDOWED],
}


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name, specs in SERVED.items() for spec in specs])
def test_adapters_equal_the_reference(packages: KernelPackages, name: str, spec: AttentionSpec) -> None:
    getattr(packages, name)()
    assert_parity(name, spec, 11, 11)
    assert_parity(name, spec, 4, 11)  # fewer queries than keys: aligned at the ends
    if name != "xformers" or spec.kind == "dense" or spec.causal:
        assert_parity(name, spec, 11, 11, DOCUMENTS)


def run(name: str, spec: AttentionSpec, documents: Tensor | None = None, training: bool = False) -> None:
    given = inputs(spec, 11, 11)
    SOFTMAX_BACKENDS[name].run(*given, spec, Visibility(11, 11, given[0].device, documents=documents), training)


def test_flash_attn_2_gets_the_documented_arguments(packages: KernelPackages) -> None:
    calls = packages.flash_attn_2().calls
    run("flash_attn_2", replace(WINDOW, dropout=0.0, softcap=3.0, alibi=True))
    slopes = calls[0].pop("alibi_slopes")
    assert slopes.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    expected = {"function": "dense", "dropout_p": 0.0, "softmax_scale": 0.3, "causal": True, "window_size": (4, 0)}
    assert calls[0] == {**expected, "softcap": 3.0, "deterministic": False, "return_attn_probs": False}
    run("flash_attn_2", replace(WINDOW, causal=False))
    assert calls[1]["window_size"] == (4, 4) and calls[1]["causal"] is False
    run("flash_attn_2", replace(MHA, dropout=0.25), training=True)
    run("flash_attn_2", replace(MHA, dropout=0.25))
    assert [call["dropout_p"] for call in calls[2:]] == [0.25, 0.0]
    assert calls[2]["window_size"] == (-1, -1) and calls[2]["softmax_scale"] == 8**-0.5
    torch.use_deterministic_algorithms(True)
    try:
        run("flash_attn_2", MHA)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[-1]["deterministic"] is True


def test_documents_go_end_to_end_and_their_borders_are_found_once_per_pass(
    packages: KernelPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = packages.flash_attn_2().calls
    found = []
    original = fused._find_runs
    monkeypatch.setattr(fused, "_find_runs", lambda documents: found.append(1) or original(documents))
    given = inputs(GQA, 11, 11)
    visibility = Visibility(11, 11, given[0].device, documents=DOCUMENTS)
    for spec in (GQA, WINDOW):
        SOFTMAX_BACKENDS["flash_attn_2"].run(*given, spec, visibility)
    assert [call["function"] for call in calls] == ["varlen", "varlen"] and len(found) == 1
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 3, 9, 10, 11, 22] and calls[0]["max_seqlen_k"] == 11


def test_flash_attn_4_says_everything_with_none(packages: KernelPackages) -> None:
    calls = packages.flash_attn_4().calls
    run("flash_attn_4", replace(GQA, softcap=2.0))
    assert calls[0]["window_size"] == (None, None) and calls[0]["causal"] is True
    assert calls[0]["softcap"] == 2.0 and calls[0]["softmax_scale"] == 0.3
    run("flash_attn_4", WINDOW, DOCUMENTS)
    assert calls[1]["window_size"] == (4, 0) and calls[1]["function"] == "varlen" and calls[1]["softcap"] == 0.0


def test_flash_attn_3_is_put_underneath_torch_once_and_said(
    packages: KernelPackages, caplog: pytest.LogCaptureFixture
) -> None:
    fake = packages.flash_attn_3()
    with caplog.at_level(logging.WARNING, logger="glowflow"):
        run("flash_attn_3", GQA)
        assert fake.calls == []  # the plain causal mask goes to SDPA
        run("flash_attn_3", WINDOW)
        run("flash_attn_3", GQA, DOCUMENTS)
        run("flash_attn_3", replace(MHA, causal=False), DOCUMENTS)
        run("flash_attn_3", replace(WINDOW, causal=False))
    assert fake.activations == ["FA3"]
    assert len(caplog.records) == 1 and "whole process" in caplog.text and "sdpa" in caplog.text
    assert [call["window_size"] for call in fake.calls] == [(4, 0), (-1, 0), (-1, -1), (4, 4)]
    assert [call["enable_gqa"] for call in fake.calls] == [True, True, False, True]
    assert fake.calls[0]["scale"] == 0.3


def test_flash_attn_3_goes_without_a_flag_that_an_older_torch_does_not_know(
    packages: KernelPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = packages.flash_attn_3()

    def of_2_11(  # torch 2.11 takes fewer key/value heads without being told
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
        return fake.varlen_attn(query, key, value, *lengths, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", of_2_11)
    assert_parity("flash_attn_3", WINDOW, 11, 11)


def test_xformers_gets_its_own_biases(packages: KernelPackages) -> None:
    calls = packages.xformers().calls
    run("xformers", MHA)
    run("xformers", replace(MHA, causal=False))
    run("xformers", WINDOW)
    run("xformers", replace(WINDOW, causal=False))
    sides = [call["attn_bias"] and (call["attn_bias"].left, call["attn_bias"].right) for call in calls]
    assert sides == [(-1, 0), None, (4, 0), (4, 4)]
    assert calls[2]["scale"] == 0.3 and calls[2]["shape"] == (2, 11, 4, 8) and calls[2]["p"] == 0.0
    run("xformers", replace(WINDOW, dropout=0.5), DOCUMENTS, training=True)
    bias = calls[4]["attn_bias"]
    assert isinstance(bias, BlockBias) and bias.lengths == [3, 6, 1, 1, 11] and bias.inner.left == 4
    assert calls[4]["shape"] == (1, 22, 4, 8) and calls[4]["p"] == 0.5


def test_real_xformers_biases_are_our_masks() -> None:
    if version_of("xformers") is None or import_reasons("xformers.ops"):
        pytest.skip("xformers is not installed, or cannot be imported here")
    for spec in [*DENSE, *WINDOWED]:
        for queries, keys in ((11, 11), (4, 11)):
            visibility = Visibility(queries, keys, torch.device("cpu"))
            bias = attention_bias(spec, visibility)
            if bias is None:
                assert spec.kind == "dense" and not spec.causal
                continue
            assert torch.equal(bias.materialize((queries, keys)).exp().bool(), visibility.mask(spec)[0, 0])
        if spec.kind == "windowed" and not spec.causal:
            continue
        visibility = Visibility(11, 11, torch.device("cpu"), documents=DOCUMENTS)
        rows = visibility.mask(spec)[:, 0].float()
        ours = torch.block_diag(*rows).bool()
        assert torch.equal(attention_bias(spec, visibility).materialize((1, 1, 22, 22))[0, 0].exp().bool(), ours)


FLEX = [
    (replace(GQA, softcap=2.0, alibi=True), 11),
    (replace(WINDOW, sinks=2), 4),
    (replace(WINDOW, causal=False), 11),
    (replace(GQA, kind="sparse", sparse=SparsePattern("strided", local=2, stride=3)), 11),
    (replace(GQA, kind="sparse", causal=False, sparse=SparsePattern("local_global", local=2, global_tokens=2)), 11),
    (replace(GQA, kind="sparse", sparse=BLOCKS), 11),
]


@pytest.mark.parametrize(("spec", "queries"), FLEX)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_reference(spec: AttentionSpec, queries: int) -> None:
    given = [x.detach() for x in inputs(spec, queries, 11)]
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, :3] = False  # blind queries too
    batch = {"documents": DOCUMENTS, "key_valid": valid} if queries == 11 else {}
    for more in ({}, batch):
        visibility = Visibility(queries, 11, given[0].device, **more)
        with torch.inference_mode():
            out = SOFTMAX_BACKENDS["flex"].run(*given, spec, visibility)
        wanted = SOFTMAX_BACKENDS["reference"].run(*given, spec, visibility)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["strided", "fixed", "local_global", "blocks"])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_mask_functions_say_what_the_masks_say(pattern: Any, causal: bool) -> None:
    sparse = BLOCKS if pattern == "blocks" else SparsePattern(pattern, local=2, stride=3, global_tokens=2)
    spec = replace(GQA, kind="sparse", causal=causal, sparse=sparse)
    visibility = Visibility(7, 23, torch.device("cpu"))
    query, key = torch.arange(7)[:, None], torch.arange(23)[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(flex.mask_function(spec, visibility)(zero, zero, query, key), visibility.mask(spec)[0, 0])


def test_flex_keeps_what_only_lengths_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = flex._build
    monkeypatch.setattr(flex, "_build", lambda *given: built.append(given) or original(*given))
    spec = replace(WINDOW, window=7)
    first, second = Visibility(37, 37, torch.device("cpu")), Visibility(37, 37, torch.device("cpu"))
    mask = flex._block_mask(spec, first, 2, False)
    assert flex._block_mask(replace(spec, heads=2), second, 2, False) is mask and len(built) == 1
    documents = torch.zeros(2, 37, dtype=torch.int64)
    passes = [Visibility(37, 37, torch.device("cpu"), documents=documents) for _ in range(2)]
    masks = [flex._block_mask(spec, visibility, 2, False) for visibility in passes for _ in range(2)]
    assert masks[0] is masks[1] and masks[0] is not masks[2] and len(built) == 3
    scores = [flex.score_function(replace(GQA, alibi=True), visibility, torch.float32) for visibility in passes]
    assert scores[0] is scores[1]
    assert flex._block_mask(replace(MHA, causal=False), first, 2, False) is None


REASONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((name, {}, {"dtype": torch.float32}, "needs float16 or bfloat16, not float32") for name in SERVED if "_" in name),
    *((name, {}, {"dtype": torch.int64}, "floating-point") for name in (*SERVED, "flex")),
    *((name, {}, {"second_order": True}, "second derivative") for name in (*SERVED, "flex")),
    *((name, {"kind": "sparse"}, {}, "not 'sparse'") for name in SERVED),
    *((name, {"kind": "windowed", "window": 4, "sinks": 1}, {}, "sinks") for name in SERVED),
    *((name, {"kv_heads": 3}, {}, "divide heads") for name in (*SERVED, "flex")),
    *((name, {}, {"padding": True}, "padding") for name in SERVED),
    *((name, {"kind": "windowed", "window": 4}, {"decoding": True}, "in order") for name in SERVED),
    *((name, {}, {"decoding": True, "documents": True}, "as many queries") for name in SERVED),
    *((name, {"head_dim": 264}, {}, "256 channels") for name in SERVED),
    *((name, {"dropout": 0.1}, {}, "dropout") for name in ("flash_attn_3", "flash_attn_4", "flex")),
    *((name, {"alibi": True}, {}, "ALiBi") for name in ("flash_attn_3", "flash_attn_4", "xformers")),
    *((name, {"softcap": 5.0}, {}, "softcap") for name in ("flash_attn_3", "xformers")),
    *((name, {"head_dim": 20}, {}, "steps of 8") for name in ("flash_attn_3", "flash_attn_4", "xformers")),
    ("flash_attn_2", {"softcap": 5.0, "dropout": 0.1}, {}, "together"),
    ("flash_attn_2", {}, {"capability": (7, 5)}, "needs compute capability 8.0 or later, this GPU has 7.5"),
    ("flash_attn_2", {"head_dim": 256, "dropout": 0.1}, {"capability": (8, 9)}, "A100 and H100"),
    ("flash_attn_3", {}, {"capability": (10, 0)}, "9.x (Hopper), this GPU has 10.0"),
    ("flash_attn_3", {}, {"capability": (8, 0)}, "9.x (Hopper), this GPU has 8.0"),
    ("flash_attn_4", {}, {"capability": (8, 0)}, "9.x to 12.x to train, this GPU has 8.0"),
    ("flash_attn_4", {"head_dim": 192}, {"capability": (10, 0)}, "at most 128 or of 256"),
    ("flash_attn_4", {"softcap": 5.0}, {"capability": (12, 0)}, "capped scores"),
    ("flash_attn_4", {"softcap": 5.0, "head_dim": 256}, {"capability": (10, 0)}, "capped scores"),
    ("xformers", {}, {"capability": (7, 5)}, "8.0 or later"),
    ("xformers", {}, {"dtype": torch.float64}, "not float64"),
    ("xformers", {}, {"dtype": torch.float32, "capability": (10, 0)}, "5.0 to 9.0 in float32"),
    ("xformers", {"head_dim": 18}, {"dtype": torch.float32}, "steps of 4"),
    ("xformers", {"kind": "windowed", "window": 4}, {"dtype": torch.float32}, "trains windows"),
    ("xformers", {"kind": "windowed", "window": 4, "causal": False}, {"dtype": torch.float32}, "both sides"),
    ("xformers", {"kind": "windowed", "window": 4, "causal": False}, {"documents": True}, "inside documents"),
    ("flex", {"kind": "linear"}, {}, "not 'linear'"),
    ("flex", {}, {"decoding": True}, "compiled anew"),
    ("flex", {"head_dim": 8}, {}, "at least 16 channels"),
    ("flex", {}, {"capability": (7, 0)}, "8.0 or later"),
    ("flex", {}, {"dtype": torch.float64}, "float64"),
    ("flex", {}, {"device_type": "cpu", "capability": None}, "cannot train on the CPU"),
    ("flex", {}, {"device_type": "meta", "capability": None, "training": False}, "not on meta"),
]


def install_all(packages: KernelPackages) -> None:
    for install in (packages.flash_attn_2, packages.flash_attn_3, packages.flash_attn_4, packages.xformers):
        install()
    packages.triton()


@pytest.mark.parametrize(("name", "spec", "conditions", "words"), REASONS)
def test_each_reason_by_itself(
    packages: KernelPackages, name: str, spec: dict[str, Any], conditions: dict[str, Any], words: str
) -> None:
    install_all(packages)
    asked = AttentionSpec(heads=4, kv_heads=4, head_dim=64)
    backend = SOFTMAX_BACKENDS[name]
    assert backend.reasons(asked, H100) == []
    reasons = backend.reasons(replace(asked, **spec), replace(H100, **conditions))
    assert len(reasons) == 1 and words in reasons[0], reasons
    assert backend.advice(asked, H100)


@pytest.mark.parametrize("name", SERVED)
def test_no_cpu_and_no_package_are_said_together(packages: KernelPackages, name: str) -> None:
    reasons = SOFTMAX_BACKENDS[name].reasons(replace(MHA, softcap=1.0), Conditions("cpu", torch.float16))
    assert any("CUDA alone, not on cpu" in reason for reason in reasons)
    missing = SOFTMAX_BACKENDS[name].reasons(MHA, H100)
    assert len(missing) == 1 and missing[0].startswith("the package ") and missing[0].endswith("is not installed")


@pytest.mark.parametrize(
    ("install", "version"),
    [("flash_attn_2", "2.5.8"), ("flash_attn_4", "4.0.0a1"), ("flash_attn_3", "2.9"), ("xformers", "0.0.29.post1")],
)
def test_too_old_a_package_is_named(packages: KernelPackages, install: str, version: str) -> None:
    getattr(packages, install)(version)
    (reason,) = SOFTMAX_BACKENDS[install].reasons(MHA, H100)
    assert "or later" in reason and f"{version} is installed" in reason


def test_a_package_that_cannot_be_imported_is_a_reason(packages: KernelPackages) -> None:
    packages.flash_attn_2()
    packages.monkeypatch.setitem(sys.modules, "flash_attn", None)
    (reason,) = SOFTMAX_BACKENDS["flash_attn_2"].reasons(MHA, H100)
    assert reason.startswith("flash_attn cannot be imported: ")


def test_the_namespace_of_flash_attn_4_is_not_flash_attn(packages: KernelPackages) -> None:
    """Only distributions count: a folder ``flash_attn`` says nothing. And xformers dies of it."""
    packages.flash_attn_4()
    packages.xformers()
    assert "flash_attn" in sys.modules and package_reasons("flash-attn", "2.6")
    assert SOFTMAX_BACKENDS["flash_attn_2"].reasons(MHA, H100) == ["the package flash-attn is not installed"]
    (reason,) = SOFTMAX_BACKENDS["xformers"].reasons(MHA, H100)
    assert "flash-attn-4" in reason
    packages.flash_attn_2()
    assert SOFTMAX_BACKENDS["xformers"].reasons(MHA, H100) == []


def test_a_torch_without_the_switch_has_no_flash_attn_3(
    packages: KernelPackages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.flash_attn_3()
    monkeypatch.delattr(torch.nn.attention, "list_flash_attention_impls")
    (reason,) = SOFTMAX_BACKENDS["flash_attn_3"].reasons(MHA, H100)
    assert "underneath its flash operators" in reason


ORDERS: list[tuple[AttentionSpec, Callable[[KernelPackages], Any], str]] = [
    (MHA, install_all, "sdpa"),
    (replace(MHA, softcap=2.0), install_all, "flash_attn_2"),
    (replace(MHA, softcap=2.0, head_dim=16), KernelPackages.triton, "flex"),
    (replace(MHA, softcap=2.0), KernelPackages.flash_attn_4, "flash_attn_4"),
    (WINDOW, install_all, "flash_attn_2"),
    (WINDOW, KernelPackages.xformers, "xformers"),
    (replace(WINDOW, head_dim=16, sinks=2), install_all, "flex"),
    (replace(MHA, kind="sparse", head_dim=16, sparse=SparsePattern()), install_all, "flex"),
]


@pytest.mark.parametrize(("spec", "install", "chosen"), ORDERS)
def test_auto_on_cuda(packages: KernelPackages, spec: AttentionSpec, install: Any, chosen: str) -> None:
    install(packages)
    backend, reason = resolve(spec, "auto", H100)
    assert backend.name == chosen and "first that can serve" in reason
    rows = explain(spec, H100)
    assert [row.name for row in rows if row.chosen] == [chosen]
    assert {row.name for row in rows} == set(SOFTMAX_BACKENDS)


def test_auto_never_takes_what_changes_the_process(packages: KernelPackages) -> None:
    assert all("flash_attn_3" not in {b.name for b in candidates(spec, H100)} for spec in (MHA, WINDOW))
    packages.flash_attn_3()
    assert resolve(MHA, "flash_attn_3", H100)[0].name == "flash_attn_3"


def test_while_decoding_windows_leave_the_fused_kernels(packages: KernelPackages) -> None:
    install_all(packages)
    decoding = replace(H100, training=False, decoding=True)
    assert resolve(WINDOW, "auto", decoding)[0].name == "sdpa"
    with pytest.raises(ConfigError, match="in order"):
        resolve(WINDOW, "flash_attn_2", decoding)
