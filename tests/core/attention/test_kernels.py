"""The CPU's softmax kernels against the definition in float64: outputs, gradients, causality, and what they save."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glowflow.config.errors import ConfigError
from glowflow.core.attention import tiles
from glowflow.core.attention.backends.base import Backend, Conditions
from glowflow.core.attention.backends.blocked import BlockedBackend
from glowflow.core.attention.backends.gather import GatherBackend
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.dispatch import resolve
from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec, SparsePattern
from tests.core.attention.definition import CPU, PATTERNS, SITUATIONS, definition, draw, see_all

TRAINING = Conditions("cpu", torch.float32, training=True)
BLOCKED, GATHER = BlockedBackend(block=4, worth=1.0), GatherBackend(block=4, worth=1.0)
OWN: dict[str, Backend] = {"windowed": BLOCKED, "sparse": GATHER}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 6}
SHAPES = [(37, 37), (18, 35), (3, 37)]


def case(name: str, causal: bool = True, **more: object) -> AttentionSpec:
    return replace(PATTERNS[name], causal=causal, **{**HEADS, **more})


def results(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and what a fixed direction's gradient is for queries, keys and values."""
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


@lru_cache(maxsize=256)
def wanted(spec: AttentionSpec, queries: int, keys: int, situation: str) -> list[Tensor]:
    inputs = draw(spec, queries, keys)
    return results(definition(*inputs, spec, SITUATIONS[situation](queries, keys)), inputs)


def assert_equal(backend: Backend, spec: AttentionSpec, queries: int, keys: int, situation: str = "plain") -> None:
    inputs = draw(spec, queries, keys)
    got = results(backend.run(*inputs, spec, SITUATIONS[situation](queries, keys)), inputs)
    for ours, theirs in zip(got, wanted(spec, queries, keys, situation), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.fixture
def no_mask_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels must do the work by themselves."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("left to SDPA with a mask over all pairs")

    monkeypatch.setattr(SdpaBackend, "run", refuse)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("backend", [ReferenceBackend(), SdpaBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("name", ["dense", "sinks", "strided"])
def test_general_kernels_equal_the_definition(
    name: str, backend: Backend, causal: bool, queries: int, keys: int, situation: str
) -> None:
    assert_equal(backend, case(name, causal), queries, keys, situation)


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "dense"])
def test_kernels_of_a_kind_equal_the_definition(
    name: str, causal: bool, queries: int, keys: int, situation: str
) -> None:
    spec = case(name, causal)
    assert_equal(OWN[spec.kind], spec, queries, keys, situation)


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "dense"])
def test_alibi_and_a_scale_of_ones_own(name: str, causal: bool) -> None:
    spec = case(name, causal, alibi=True, scale=0.3, kv_heads=1)
    assert_equal(OWN[spec.kind], spec, 18, 35, "documents")
    assert_equal(OWN[spec.kind], spec, 37, 37)


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("block", [1, 3, 8, 16])
@pytest.mark.parametrize("name", ["sinks", "strided-local", "local_global", "blocks"])
def test_the_tiles_size_changes_nothing(name: str, block: int) -> None:
    spec = case(name)
    kernel = {"windowed": BlockedBackend(block, worth=10.0), "sparse": GatherBackend(block, worth=10.0)}[spec.kind]
    assert_equal(kernel, spec, 36, 36)


@pytest.mark.usefixtures("no_mask_over_all")
def test_a_stride_beyond_the_sequence_leaves_the_near_keys() -> None:
    for pattern in ("strided", "fixed"):
        assert_equal(GATHER, case("dense", kind="sparse", sparse=SparsePattern(pattern, local=3, stride=50)), 37, 37)


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("window", [37, 64])
def test_a_window_over_everything_is_dense(window: int) -> None:
    for causal in (True, False):
        spec, inputs = case("windowed", causal, window=window), draw(case("dense"), 37, 37)
        got = results(BlockedBackend(block=4, worth=10.0).run(*inputs, spec, see_all(37, 37)), inputs)
        for ours, theirs in zip(got, wanted(case("dense", causal), 37, 37, "plain"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_a_layout_of_ones_is_dense(causal: bool) -> None:
    matrix = SparsePattern("blocks", block_size=4, blocks=((True,) * 10,) * 10)
    spec, inputs = case("dense", causal, kind="sparse", sparse=matrix), draw(case("dense"), 37, 37)
    got = results(GatherBackend(block=4, worth=1.0).run(*inputs, spec, see_all(37, 37)), inputs)
    for ours, theirs in zip(got, wanted(case("dense", causal), 37, 37, "plain"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_later_key_changes_no_bit_of_what_came_before(name: str, dtype: torch.dtype) -> None:
    spec = case(name)
    kernels = [ReferenceBackend(), SdpaBackend()] + ([OWN[spec.kind]] if spec.kind in OWN else [])
    for kernel in kernels:
        q, k, v = (x.detach() for x in draw(spec, 37, 37, dtype))
        before = kernel.run(q, k, v, spec, see_all(37, 37))
        k[:, :, 20] += 3.0
        v[:, :, 20] -= 2.0
        after = kernel.run(q, k, v, spec, see_all(37, 37))
        assert torch.equal(before[:, :, :20], after[:, :, :20]), kernel.name
        assert not torch.equal(before[:, :, 20], after[:, :, 20]), kernel.name


@pytest.mark.usefixtures("no_mask_over_all")
@pytest.mark.parametrize("name", ["sinks", "strided", "fixed-1", "local_global", "blocks"])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(name: str) -> None:
    spec, valid = case(name), torch.ones(2, 37, dtype=torch.bool)
    valid[0, :30] = False
    inputs = draw(spec, 37, 37)
    out = OWN[spec.kind].run(*inputs, spec, Visibility(37, 37, CPU, key_valid=valid))
    assert out[0, :, :30].abs().max() == 0 and out[0, :, 30:].abs().amin(-1).min() > 0
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert all(x[0, :, :30].abs().max() == 0 for x in gradients)


@pytest.mark.parametrize("name", ["sinks", "strided", "local_global", "blocks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
def test_lower_precision_stays_near(name: str, dtype: torch.dtype, tolerance: float) -> None:
    spec = case(name)
    inputs = draw(spec, 37, 37, dtype)
    got = results(OWN[spec.kind].run(*inputs, spec, see_all(37, 37)), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = results(ReferenceBackend().run(*exact, spec, see_all(37, 37)), exact)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("name", ["windowed", "strided", "local_global", "blocks"])
def test_short_sequences_and_rings_go_to_the_mask_over_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = case(name)
    kernel: Backend = BlockedBackend() if spec.kind == "windowed" else GatherBackend()
    calls: list[int] = []
    masked = SdpaBackend.run
    monkeypatch.setattr(SdpaBackend, "run", lambda *args: calls.append(1) or masked(*args))
    q, k, v = draw(spec, 20, 20)
    short = kernel.run(q, k, v, spec, see_all(20, 20))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    ring = Visibility(20, 20, CPU, query_positions=torch.arange(20), key_positions=order)
    turned = OWN[spec.kind].run(q, k[:, :, order], v[:, :, order], spec, ring)
    assert len(calls) == 2
    torch.testing.assert_close(turned, short, rtol=0, atol=1e-12)
    assert "mask over all pairs where" in kernel.advice(spec, TRAINING)
    q, k, v = draw(spec, 300, 300)
    kernel.run(q, k, v, spec, see_all(300, 300))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["windowed", "local_global", "blocks"])
def test_dropout_only_in_training_and_unbiased(name: str) -> None:
    spec = replace(PATTERNS[name], heads=1, kv_heads=1, head_dim=2, dropout=0.5)
    q = k = torch.zeros(1, 1, 400, 2)
    v = torch.ones(1, 1, 400, 2)
    assert torch.allclose(OWN[spec.kind].run(q, k, v, spec, see_all(400, 400)), v)
    torch.manual_seed(0)
    dropped = torch.stack([OWN[spec.kind].run(q, k, v, spec, see_all(400, 400), True) for _ in range(20)])
    assert dropped.std() > 0.01
    assert abs(dropped.mean().item() - 1.0) < 0.02


def saved_bytes(kernel: Backend, spec: AttentionSpec, length: int) -> int:
    """What a forward pass keeps for backward, each storage once."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = draw(spec, length, length, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = kernel.run(*inputs, spec, see_all(length, length))
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["sinks", "strided", "local_global", "blocks"])
def test_what_is_kept_for_backward_grows_with_the_length_and_not_its_square(name: str) -> None:
    spec = case(name)
    short, long = (saved_bytes(OWN[spec.kind], spec, length) for length in (256, 1024))
    assert long < 4.5 * short
    assert saved_bytes(SdpaBackend(), spec, 1024) > 8 * saved_bytes(SdpaBackend(), spec, 256)


@pytest.mark.parametrize("name", ["sinks", "strided"])
def test_activation_checkpointing_and_a_second_layer_find_the_same_masks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    seen = tiles._seen
    monkeypatch.setattr(tiles, "_seen", lambda *args: made.append(1) or seen(*args))
    spec, visibility = case(name), see_all(37, 37)
    inputs = draw(spec, 37, 37)
    want = results(OWN[spec.kind].run(*inputs, spec, visibility), inputs)
    once = len(made)
    recomputed = checkpoint(OWN[spec.kind].run, *inputs, spec, visibility, use_reentrant=False)
    for ours, theirs in zip(results(recomputed, inputs), want, strict=True):
        assert torch.equal(ours, theirs)
    assert once > 0 and len(made) == once


@pytest.mark.parametrize(("name", "kernel"), [("windowed", "blocked"), ("strided", "gather")])
def test_auto_takes_the_kernel_of_the_kind(name: str, kernel: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = case(name)
    resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="glowflow"):
        backend, reason = resolve(spec, "auto", TRAINING)
    assert backend.name == kernel and "first that can serve" in reason and kernel in caplog.text
    assert resolve(spec, "auto", replace(TRAINING, decoding=True))[0].name == "sdpa"
    assert resolve(replace(spec, softcap=20.0), "auto", TRAINING)[0].name == "reference"
    assert resolve(spec, "auto", replace(TRAINING, second_order=True))[0].name == "reference"
    assert resolve(case("dense"), "auto", TRAINING)[0].name == "sdpa"


REFUSALS: list[tuple[Backend, AttentionSpec, Conditions, list[str]]] = [
    (BLOCKED, case("strided"), TRAINING, ["not 'sparse'"]),
    (GATHER, case("windowed"), TRAINING, ["not 'windowed'"]),
    (BLOCKED, case("windowed", softcap=9.0), replace(TRAINING, device_type="meta"), ["meta device", "softcap"]),
    (BLOCKED, case("windowed"), replace(TRAINING, decoding=True), ["decoding"]),
    (BLOCKED, case("windowed", heads=3), replace(TRAINING, second_order=True), ["divide heads", "second derivative"]),
    (GATHER, case("fixed", dropout=0.1), replace(TRAINING, device_type="cuda"), ["CPU alone", "no dropout"]),
    (GATHER, case("strided", dropout=0.1), replace(TRAINING, training=False), []),
    (GATHER, case("blocks", dropout=0.1), replace(TRAINING, device_type="cuda"), []),
    (BLOCKED, case("sinks", alibi=True, dropout=0.1), replace(TRAINING, padding=True, documents=True), []),
]


@pytest.mark.parametrize(("backend", "spec", "conditions", "reasons"), REFUSALS)
def test_reasons_name_all_that_is_wrong(
    backend: Backend, spec: AttentionSpec, conditions: Conditions, reasons: list[str]
) -> None:
    got = backend.reasons(spec, conditions)
    assert len(got) == len(reasons)
    assert all(any(words in clause for clause in got) for words in reasons)


def test_a_named_kernel_of_another_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match="computes only kind 'windowed'"):
        resolve(case("dense"), "blocked", TRAINING)


@pytest.mark.parametrize("name", ["sinks", "strided", "fixed", "local_global", "blocks"])
def test_one_visibility_serves_batches_of_any_size(name: str) -> None:
    spec, visibility = case(name), see_all(37, 37)
    both = draw(spec, 37, 37)
    one = [x[1:] for x in both]
    out = OWN[spec.kind].run(*both, spec, visibility)
    torch.testing.assert_close(OWN[spec.kind].run(*one, spec, visibility), out[1:], rtol=0, atol=1e-13)
