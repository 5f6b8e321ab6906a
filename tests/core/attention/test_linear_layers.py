"""Linear and gated layers: convolution, documents, decoding, mixed precision, checkpointing, `build_attention`.

Legend: B batch, T positions, D width, C channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glowflow.config.architectures import TransformerConfig
from glowflow.core.architectures.base import InitSpec
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.build import build_attention
from glowflow.core.attention.cache import DecodeCache, StateCache
from glowflow.core.attention.layer import AttentionContext
from glowflow.core.attention.linear.convolution import ShortConvolution
from glowflow.core.attention.linear.gated import GatedAttention, GatedCache
from glowflow.core.attention.linear.layer import LinearAttention
from glowflow.core.attention.linear.passes import runs_of
from glowflow.core.attention.masks import Visibility
from glowflow.core.initialization import initialize
from glowflow.core.layers.rotary import Rotary
from tests.core.attention.linear_cases import VARIANTS, documents, padding

DIM, HEADS, WINDOW = 16, 4, 5


def config_of(variant: str = "gated", *, gated: bool = False, **more: Any) -> TransformerConfig:
    """A model whose layers are linear, or the mixture of a window and linear attention."""
    attention: dict[str, Any] = {"kind": "linear", "linear": {"variant": variant, "chunk": 4, **more.pop("linear", {})}}
    if gated:
        attention |= {"kind": "adaptive", "adaptive": {"policy": "gated"}, "window": WINDOW, "sinks": 1}
    return TransformerConfig(dim=DIM, heads=HEADS, attention=attention, vocab_size=7, **more)


def layer_of(config: TransformerConfig, dtype: torch.dtype = torch.float64) -> Any:
    """Layer 0, every parameter drawn, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    module = build_attention(config, 0).to(dtype)
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    return module


def context_of(
    length: int,
    dtype: torch.dtype = torch.float64,
    *,
    start: int = 0,
    cache: DecodeCache | None = None,
    rope: bool = True,
    **masks: Tensor | None,
) -> AttentionContext:
    tables = Rotary(DIM // HEADS, 10000.0).tables(start + length, torch.device("cpu"), dtype) if rope else None
    return AttentionContext(
        Visibility(length, length, torch.device("cpu"), **masks),
        Conditions("cpu", dtype, training=True, decoding=cache is not None),
        tables=None if tables is None else tables.slice(start, start + length),
        cache=cache,
        length=length if cache is None else cache.max_length,
    )


def drawn(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=dtype, generator=torch.Generator().manual_seed(length))


CONFIGS = {
    **{variant: config_of(variant) for variant in VARIANTS},
    "gqa-qknorm": config_of(kv_heads=2, qk_norm=True),
    "retention-gqa": config_of("retention", kv_heads=1),
    "no-conv-no-gate": config_of(linear={"conv": 0, "output_gate": False}),
    "conv-1": config_of(linear={"conv": 1}),
    "mixture": config_of(gated=True),
    "mixture-gqa-qknorm": config_of("gated_delta", gated=True, kv_heads=2, qk_norm=True),
}
every_layer = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def test_the_convolution_equals_torchs() -> None:
    torch.manual_seed(0)
    module, x = ShortConvolution(6, 4).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), module.weight[:, None], groups=6).transpose(1, 2)
    got, tail = module(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail, x[:, -3:])


def test_the_convolution_looks_at_its_own_document_alone() -> None:
    torch.manual_seed(0)
    module, x, ids = ShortConvolution(3, 4).double(), torch.randn(2, 12, 3, dtype=torch.float64), documents(12)
    got, _ = module(x, runs_of(ids))
    for b in range(2):
        borders = [0, *[t for t in range(1, 12) if ids[b, t] != ids[b, t - 1]], 12]
        assert len(borders) > 3
        parts = [module(x[b : b + 1, i:j])[0] for i, j in pairwise(borders)]
        torch.testing.assert_close(got[b : b + 1], torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (5, 6), (2, 9)])
def test_the_convolution_in_parts_equals_the_whole(cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = ShortConvolution(3, 4).double(), torch.randn(2, 12, 3, dtype=torch.float64)
    tail, parts = None, []
    for i, j in zip((0, *cuts), (*cuts, 12), strict=True):
        out, tail = module(x[:, i:j], None, tail)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), module(x)[0], rtol=1e-12, atol=1e-12)


@every_layer
@pytest.mark.parametrize("cuts", [tuple(range(1, 13)), (1, 2, 9), (7, 8)], ids=["ones", "chunk-last", "chunk-first"])
def test_decoding_equals_the_full_forward_with_a_state_of_constant_size(
    config: TransformerConfig, cuts: tuple[int, ...]
) -> None:
    module, x = layer_of(config), drawn(13)
    want = module(x, context_of(13))
    cache = DecodeCache([module.new_cache(2, 40, "cpu", torch.float64)], 40)
    parts, sizes = [], []
    with torch.no_grad():
        for i, j in zip((0, *cuts), (*cuts, 13), strict=True):
            parts.append(module(x[:, i:j], context_of(j - i, start=i, cache=cache)))
            cache.advance(j - i)
            sizes.append(cache.nbytes())
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-12, atol=1e-12)
    assert len(set(sizes)) == 1 and sizes[0] > 0
    part = cache.layers[0]
    state = part.linear if isinstance(part, GatedCache) else part
    assert isinstance(state, StateCache)
    held = [t.untyped_storage().nbytes() for t in state.state.values()]
    assert sum(held) == state.nbytes()  # no view of something larger


@every_layer
def test_documents_are_as_if_alone(config: TransformerConfig) -> None:
    module, x, ids = layer_of(config), drawn(14), documents(14)
    # Rotary scores depend on distances only, and a window's sinks are the first positions of the sequence.
    if isinstance(module, GatedAttention):
        module.window_spec = type(module.window_spec)(**{**vars(module.window_spec), "sinks": 0})
    together = module(x, context_of(14, documents=ids))
    for b in range(2):
        borders = [0, *[t for t in range(1, 14) if ids[b, t] != ids[b, t - 1]], 14]
        assert len(borders) > 3
        for i, j in pairwise(borders):
            alone = module(x[b : b + 1, i:j], context_of(j - i))
            torch.testing.assert_close(together[b : b + 1, i:j], alone, rtol=1e-11, atol=1e-11)


@every_layer
def test_exactly_the_visible_positions_have_a_gradient(config: TransformerConfig) -> None:
    module, x = layer_of(config), drawn(11).requires_grad_()
    ids, valid = documents(11), padding(11)
    y = module(x, context_of(11, documents=ids, key_valid=valid))
    for b in range(2):
        for t in [t for t in range(11) if valid[b, t]]:
            (grad,) = torch.autograd.grad(y[b, t].square().sum(), x, retain_graph=True)
            row = ids[b].tolist()
            want = {j for j in range(t + 1) if valid[b, j] and len(set(row[j : t + 1])) == 1}
            assert set(grad[b].abs().sum(-1).nonzero().flatten().tolist()) == want
            assert grad[1 - b].abs().max() == 0


@every_layer
def test_a_later_position_changes_no_bit_earlier(config: TransformerConfig) -> None:
    module, x = layer_of(config, torch.float32), drawn(13, torch.float32)
    before = module(x, context_of(13, torch.float32))
    x[:, 9] += 1.0
    after = module(x, context_of(13, torch.float32))
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


@every_layer
def test_checkpointing_changes_no_gradient(config: TransformerConfig) -> None:
    module, x = layer_of(config, torch.float32), drawn(13, torch.float32)
    grads = []
    for through in (False, True):
        context = context_of(13, torch.float32, documents=documents(13))
        y = checkpoint(module, x, context, use_reentrant=False) if through else module(x, context)
        grads.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_layer
def test_autocast_stays_close_and_every_parameter_learns(config: TransformerConfig) -> None:
    module, x = layer_of(config, torch.float32), drawn(37, torch.float32)
    want = module(x, context_of(37, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, context_of(37, torch.float32))
        grads = torch.autograd.grad(got.float().square().sum(), list(module.parameters()))
    assert (got.float() - want).norm() / want.norm() < 3e-2
    for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name


def test_strong_decays_are_finite_in_the_layer() -> None:
    module = layer_of(config_of(), torch.float32)
    nn.init.constant_(module.recurrence.decay.bias, -2000.0)
    x = drawn(50, torch.float32).requires_grad_()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(x, context_of(50, torch.float32))
            (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        assert torch.isfinite(y).all() and torch.isfinite(grad).all()


def test_padding_on_the_left_changes_nothing() -> None:
    module, x = layer_of(config_of()), drawn(12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, :4] = False
    got = module(x, context_of(12, key_valid=valid))[:, 4:]
    torch.testing.assert_close(got, module(x[:, 4:], context_of(8)), rtol=1e-12, atol=1e-12)


def test_retention_turns_by_tables_of_its_own_where_the_model_has_none() -> None:
    module, x = layer_of(config_of("retention", position="none")), drawn(9)
    torch.testing.assert_close(module(x, context_of(9, rope=False)), module(x, context_of(9)), rtol=1e-12, atol=1e-12)


def test_retention_decodes_by_tables_of_its_own() -> None:
    module, x = layer_of(config_of("retention", position="none")), drawn(9)
    cache, parts = DecodeCache([module.new_cache(2, 12, "cpu", torch.float64)], 12), []
    for t in range(9):
        parts.append(module(x[:, t : t + 1], context_of(1, cache=cache, rope=False)))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(parts, 1), module(x, context_of(9, rope=False)), rtol=1e-12, atol=1e-12)


def test_a_hybrid_model_decodes_as_it_reads() -> None:
    attention = {"kind": "adaptive", "adaptive": {"pattern": "LGWD"}, "window": 3, "linear": {"chunk": 4}}
    module = Transformer(TransformerConfig(dim=DIM, heads=HEADS, kv_heads=2, vocab_size=7, attention=attention))
    initialize(module.double(), seed=3)
    tokens = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, cache, parts = (
        module.new_cache(2, 12, "cpu", torch.float64),
        module.new_cache(2, 12, "cpu", torch.float64),
        [],
    )
    with torch.no_grad():
        want = module.decode(tokens, whole)
        for i, j in pairwise((0, 1, 2, 7, 8, 12)):
            parts.append(module.decode(tokens[:, i:j], cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-12, atol=1e-12)
    bias = module.get_parameter("blocks.0.attention.recurrence.decay.bias")
    assert torch.equal(bias, torch.zeros(HEADS, dtype=torch.float64))


def test_an_open_gate_is_the_window_and_a_closed_one_the_recurrence() -> None:
    module, x = layer_of(config_of(gated=True)), drawn(13)
    linear = LinearAttention(DIM, module.recurrence.spec, 0).double()
    linear.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("mix")})
    window = layer_of(
        TransformerConfig(
            dim=DIM, heads=HEADS, vocab_size=7, attention={"kind": "windowed", "window": WINDOW, "sinks": 1}
        )
    )
    window.load_state_dict({k: v for k, v in module.state_dict().items() if k in ("qkv.weight", "out.weight")})
    nn.init.zeros_(module.mix.weight)
    for bias, other in ((60.0, window), (-60.0, linear)):
        nn.init.constant_(module.mix.bias, bias)
        got, want = module(x, context_of(13)), other(x, context_of(13))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_how_the_parameters_start() -> None:
    module = layer_of(config_of("gated_delta", gated=True))
    names = [name for name, _ in module.named_parameters()]
    given = {name: module.init_spec(name) for name in names}
    zeros = {"mix.weight", "mix.bias", "recurrence.decay.bias", "recurrence.beta.bias"}
    assert {name for name, spec in given.items() if spec == InitSpec("zeros")} == zeros
    assert given["recurrence.convolution.weight"] == InitSpec("normal", 0.5)
    assert given["qkv.weight"] is given["out.weight"] is given["recurrence.gate.weight"] is None
    assert layer_of(config_of()).init_spec("recurrence.decay.bias") == InitSpec("zeros")
    assert layer_of(config_of()).init_spec("out.weight") is None


def test_patterns_of_kinds_make_layers_of_kinds() -> None:
    attention = {"kind": "adaptive", "adaptive": {"pattern": "LGD"}, "window": 4}
    config = TransformerConfig(dim=DIM, heads=HEADS, vocab_size=7, depth=4, attention=attention)
    made = [type(build_attention(config, layer)).__name__ for layer in range(4)]
    assert made == ["LinearAttention", "GatedAttention", "SelfAttention", "LinearAttention"]
    assert [build_attention(config, layer).layer for layer in range(4)] == [0, 1, 2, 3]
