"""Hand-written gradients against autograd and finite differences; rotary angles; the chunked loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.core.layers import head as head_module
from glowflow.core.layers.head import OutputHead, chunked_loss, plain_loss
from glowflow.core.layers.norm import RMSNorm, rms_norm
from glowflow.core.layers.rotary import Rotary, rotate, split_rotate
from glowflow.core.layers.swiglu import SwiGLU, swiglu


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


def test_swiglu_equals_its_formula_and_passes_gradcheck() -> None:
    gate_up = random(2, 3, 8)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(swiglu(gate_up), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))


def test_swiglu_halves_are_gate_then_up() -> None:
    layer = SwiGLU(3, 4).double()
    x = random(2, 3)
    gate, up = layer.gate_up.weight[:4], layer.gate_up.weight[4:]
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), want)


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


@pytest.fixture
def loss_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets = torch.randint(0, 13, (29,), generator=torch.Generator().manual_seed(5))
    weights = torch.rand(29, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weights[3] = 0.0
    return random(29, 6), random(13, 6, seed=1), targets, weights


@pytest.mark.parametrize("elements", [13, 13 * 7, 10**6])
def test_chunked_loss_equals_the_plain_one(
    loss_inputs: tuple[Tensor, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
    hidden, matrix, targets, weights = loss_inputs
    want = plain_loss(hidden, matrix, targets, weights)
    got = chunked_loss(hidden, matrix, targets, weights)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    wanted = torch.autograd.grad(want * 0.37, (hidden, matrix))
    for a, b in zip(torch.autograd.grad(got * 0.37, (hidden, matrix)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert wanted[0][3].abs().max() == 0


def test_chunked_loss_without_gradients(loss_inputs: tuple[Tensor, ...]) -> None:
    hidden, matrix, targets, weights = loss_inputs
    with torch.no_grad():
        got = chunked_loss(hidden, matrix, targets, weights)
    torch.testing.assert_close(got, plain_loss(hidden, matrix, targets, weights))
    only_matrix = chunked_loss(hidden.detach(), matrix, targets, weights)
    (gradient,) = torch.autograd.grad(only_matrix, matrix)
    assert gradient.shape == matrix.shape


def test_head_takes_the_chunked_way_when_the_scores_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    head = OutputHead(6, 13).double()
    nn.init.normal_(head.matrix)
    hidden, targets = random(2, 9, 6), torch.arange(18).view(2, 9) % 13
    weights = torch.ones(2, 9)
    plain = head.loss(hidden, targets, weights)
    taken: list[int] = []
    real = head_module._loss_and_gradients
    monkeypatch.setattr(head_module, "_loss_and_gradients", lambda *a: (taken.append(1), real(*a))[1])
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 40)
    chunked = head.loss(hidden, targets, weights)
    assert taken
    torch.testing.assert_close(plain, chunked)
    assert plain[1] == 18


def test_chunked_loss_under_autocast_and_loss_scaling() -> None:
    hidden, matrix = random(40, 16, dtype=torch.float32), random(50, 16, seed=1, dtype=torch.float32)
    targets, weights = torch.arange(40), torch.ones(40)
    want = torch.autograd.grad(plain_loss(hidden, matrix, targets, weights), (hidden, matrix))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(hidden, matrix, targets, weights)
    assert loss.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(loss * 2.0**20, (hidden, matrix)), want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a / 2.0**20, b, rtol=0.05, atol=0.05)


def test_tied_head_owns_nothing_and_follows_a_replaced_matrix() -> None:
    embedding = nn.Embedding(13, 6)
    head = OutputHead(6, 13, embedding)
    assert list(head.parameters()) == []
    embedding.weight = nn.Parameter(torch.full((13, 6), 2.0))
    assert torch.equal(head(torch.ones(1, 6)), torch.full((1, 13), 12.0))
