"""Hand-written gradients of norms and feed-forwards against autograd and finite differences; rotary angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glowflow.config.architectures import RopeScalingConfig
from glowflow.core.layers.feed_forward import ACTIVATIONS, build_feed_forward, gated
from glowflow.core.layers.norm import RMSNorm, rms_norm
from glowflow.core.layers.rotary import Rotary, frequencies, rotate, split_rotate, temperature


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_rms_norm_equals_its_formula_and_passes_gradcheck() -> None:
    x, weight = random(2, 3, 5), random(5, seed=1)
    want = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), want)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))


def test_rms_norm_gradient_equals_autograd_in_fp32() -> None:
    x, weight = random(7, 64, dtype=torch.float32), random(64, seed=1, dtype=torch.float32)
    direction = random(7, 64, seed=2, dtype=torch.float32).detach()
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), direction)
    theirs = torch.autograd.grad(F.rms_norm(x, (64,), weight, 1e-6), (x, weight), direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_a_strided_view_and_in_bf16() -> None:
    wide = random(4, 3, 10)
    norm = RMSNorm(5, 1e-6).double()
    assert torch.autograd.gradcheck(lambda w: norm(w.view(4, 3, 2, 5)[:, :, 1]), (wide,))
    half = RMSNorm(8, 1e-6).to(torch.bfloat16)(torch.ones(2, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), torch.ones(2, 8))


@pytest.mark.parametrize("ffn", ["swiglu", "geglu", "reglu"])
def test_gated_products_equal_their_formula_and_pass_gradcheck(ffn: str) -> None:
    gate_up, direction = random(2, 3, 8), random(2, 3, 4, seed=1).detach()
    gate, up = gate_up.chunk(2, -1)
    normal = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    want = {"swiglu": gate * torch.sigmoid(gate), "geglu": gate * normal, "reglu": gate.clamp(min=0)}[ffn] * up
    got = gated(gate_up, ACTIVATIONS[ffn])
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    (theirs,) = torch.autograd.grad(want, gate_up, direction)
    torch.testing.assert_close(torch.autograd.grad(got, gate_up, direction)[0], theirs, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: gated(x, ACTIVATIONS[ffn]), (gate_up,))


def test_halves_are_gate_then_up() -> None:
    layer = build_feed_forward(3, 4, "swiglu").double()
    x = random(2, 3)
    gate, up = layer.gate_up.weight[:4], layer.gate_up.weight[4:]
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize(("ffn", "act"), [("gelu", F.gelu), ("relu", F.relu)])
def test_a_plain_feed_forward_has_one_hidden_layer(ffn: str, act: Callable[[Tensor], Tensor]) -> None:
    layer = build_feed_forward(3, 4, ffn).double()
    x = random(2, 3)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"up.weight": (4, 3), "down.weight": (3, 4)}
    torch.testing.assert_close(layer(x), act(x @ layer.up.weight.T) @ layer.down.weight.T)


def test_rotation_is_by_position_times_frequency() -> None:
    tables = Rotary(4, 100.0).tables(6, torch.device("cpu"), torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(1, 6, 1, 4)
    turned = rotate(x, tables)[0, :, 0]
    for position in range(6):
        fast, slow = position * 1.0, position / 10.0  # theta^(-2i/D): 1 and 100^(-1/2)
        want = [math.cos(fast), math.sin(fast), -math.sin(slow), math.cos(slow)]
        torch.testing.assert_close(turned[position], torch.tensor(want, dtype=torch.float64))


def test_scores_depend_on_distance_only() -> None:
    rotary = Rotary(8, 10000.0)
    q, k = random(1, 1, 1, 8).detach(), random(1, 1, 1, 8, seed=1).detach()
    tables = rotary.tables(50, torch.device("cpu"), torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned_q = rotate(q, tables.slice(query_position, query_position + 1))
        return float((turned_q * rotate(k, tables.slice(key_position, key_position + 1))).sum())

    assert math.isclose(score(7, 3), score(44, 40), rel_tol=1e-9)
    assert not math.isclose(score(7, 3), score(7, 4), rel_tol=1e-3)


def test_split_rotate_equals_the_real_valued_path_and_passes_gradcheck() -> None:
    heads, kv_heads = 4, 2
    tables = Rotary(6, 10000.0, heads + kv_heads).tables(5, torch.device("cpu"), torch.float64)
    qkv = random(2, 5, (heads + 2 * kv_heads) * 6)
    q, k, v = split_rotate(qkv, heads, kv_heads, tables)
    parts = qkv.view(2, 5, 8, 6).split((4, 2, 2), dim=2)
    torch.testing.assert_close(q, rotate(parts[0], tables).transpose(1, 2))
    torch.testing.assert_close(k, rotate(parts[1], tables).transpose(1, 2))
    torch.testing.assert_close(v, parts[2].transpose(1, 2))
    assert torch.autograd.gradcheck(lambda x: split_rotate(x, heads, kv_heads, tables), (qkv,))


def test_half_precision_turns_in_fp32() -> None:
    tables = Rotary(8, 10000.0, 2).tables(300, torch.device("cpu"), torch.bfloat16)
    assert tables.cos.dtype == torch.float32
    qkv = random(1, 300, 24, dtype=torch.float32).detach()
    exact = rotate(qkv.bfloat16().float().view(1, 300, 3, 8)[:, :, :1], tables).transpose(1, 2)
    rounded = split_rotate(qkv.bfloat16(), 1, 1, tables)[0]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


def test_tables_grow_and_keep_their_start() -> None:
    rotary = Rotary(8, 10000.0)
    short = rotary.tables(10, torch.device("cpu"), torch.float32)
    longer = rotary.tables(1000, torch.device("cpu"), torch.float32)
    assert short.cos.shape == (10, 4)
    assert longer.turn.shape == (1000, 1, 4)
    assert torch.equal(longer.slice(0, 10).sin, short.sin)


def test_linear_scaling_divides_positions() -> None:
    scaled = Rotary(8, 100.0, scaling=RopeScalingConfig(method="linear", factor=4.0, original_context=16))
    stretched, plain = (r.tables(64, torch.device("cpu"), torch.float64) for r in (scaled, Rotary(8, 100.0)))
    torch.testing.assert_close(stretched.cos[::4], plain.cos[:16], rtol=0, atol=1e-14)
    torch.testing.assert_close(stretched.sin[::4], plain.sin[:16], rtol=0, atol=1e-14)


def test_ntk_scaling_keeps_the_fastest_and_stretches_the_slowest_fully() -> None:
    scaling = RopeScalingConfig(method="ntk", factor=4.0, original_context=16)
    scaled, plain = frequencies(8, 1000.0, scaling), frequencies(8, 1000.0)
    torch.testing.assert_close(scaled, (1000.0 * 4 ** (8 / 6)) ** (-torch.arange(4, dtype=torch.float64) / 4))
    assert scaled[0] == plain[0] == 1
    assert math.isclose(scaled[-1], plain[-1] / 4, rel_tol=1e-12)
    assert frequencies(2, 1000.0, scaling).tolist() == [1.0], "a single frequency has no base"


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    scaling = RopeScalingConfig(method="yarn", factor=8.0, original_context=2048)
    scaled, plain = frequencies(128, 10000.0, scaling), frequencies(128, 10000.0)
    turns = 2048 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 32], plain[turns > 32])
    assert torch.equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 32)
    gamma = (turns[between] - 1) / 31
    torch.testing.assert_close(scaled[between], (1 - gamma) * plain[between] / 8 + gamma * plain[between])
    assert between.sum() > 5 and (turns > 32).sum() > 5 and (turns < 1).sum() > 5


def test_yarn_warms_scores_by_its_temperature() -> None:
    scaling = RopeScalingConfig(method="yarn", factor=8.0, original_context=16)
    assert temperature(scaling) == 0.1 * math.log(8) + 1
    assert temperature(None) == temperature(scaling.model_copy(update={"method": "ntk"})) == 1
    tables = Rotary(6, 10000.0, 3, scaling).tables(5, torch.device("cpu"), torch.float64)
    qkv = random(2, 5, 4 * 6)
    q, k, _ = split_rotate(qkv, 2, 1, tables)
    norms = qkv.view(2, 5, 4, 6)[:, :, :3].norm(dim=-1).transpose(1, 2) * temperature(scaling)
    torch.testing.assert_close(torch.cat((q, k), 1).norm(dim=-1), norms)
    assert torch.autograd.gradcheck(lambda x: split_rotate(x, 2, 1, tables), (qkv,))
