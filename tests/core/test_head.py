"""The output head: the chunked loss against the plain one, the soft-cap, tied weights, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from glowflow.core.layers import head as head_module
from glowflow.core.layers.head import OutputHead, chunked_loss, plain_loss


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def loss_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets = torch.randint(0, 13, (29,), generator=torch.Generator().manual_seed(5))
    weights = torch.rand(29, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weights[3] = 0.0
    return random(29, 6), random(13, 6, seed=1), targets, weights


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("elements", [13, 13 * 7, 10**6])
def test_chunked_loss_equals_the_plain_one(
    loss_inputs: tuple[Tensor, ...], elements: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
    hidden, matrix, targets, weights = loss_inputs
    want = plain_loss(hidden, matrix, targets, weights, softcap)
    got = chunked_loss(hidden, matrix, targets, weights, softcap)
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


def test_the_softcap_is_its_formula_and_the_chunked_loss_passes_gradcheck(loss_inputs: tuple[Tensor, ...]) -> None:
    hidden, matrix, targets, weights = loss_inputs
    scores = 0.8 * torch.tanh(hidden @ matrix.T / 0.8)
    nll = scores.logsumexp(-1) - scores.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(chunked_loss(hidden, matrix, targets, weights, 0.8), (nll * weights).sum())
    few = [value[:5] for value in (hidden, targets, weights)]
    assert torch.autograd.gradcheck(
        lambda h, m: chunked_loss(h, m, few[1], few[2], 0.8), (few[0].detach().requires_grad_(), matrix)
    )


def test_a_capped_head_caps_scores_and_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    head = OutputHead(6, 13, softcap=0.5).double()
    nn.init.normal_(head.matrix, generator=torch.Generator().manual_seed(3))
    hidden, targets, weights = random(2, 9, 6), torch.arange(18).view(2, 9) % 13, torch.ones(2, 9)
    assert head(hidden).abs().max() <= 0.5
    torch.testing.assert_close(head(hidden), 0.5 * torch.tanh(hidden @ head.matrix.T / 0.5))
    plain = head.loss(hidden, targets, weights)[0]
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 40)
    torch.testing.assert_close(head.loss(hidden, targets, weights)[0], plain, rtol=1e-13, atol=0)
    uncapped = plain_loss(hidden.flatten(0, 1), head.matrix, targets.flatten(), weights.flatten())
    assert not torch.allclose(plain, uncapped)


def test_the_capped_loss_in_bf16_is_capped_in_fp32() -> None:
    hidden, matrix = random(40, 16, dtype=torch.float32), random(50, 16, seed=1, dtype=torch.float32)
    targets, weights = torch.arange(40), torch.ones(40)
    want = torch.autograd.grad(plain_loss(hidden, matrix, targets, weights, 3.0), (hidden, matrix))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [loss(hidden, matrix, targets, weights, 3.0) for loss in (chunked_loss, plain_loss)]
    for loss in losses:
        assert loss.dtype == torch.float32
        for a, b in zip(torch.autograd.grad(loss, (hidden, matrix)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
