"""The mixture of experts against a loop over tokens: outputs, gradients, balance; nothing dropped, nothing left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glowflow.config.architectures import MoeConfig
from glowflow.core.layers import moe as moe_module
from glowflow.core.layers.moe import MixtureOfExperts, balance_loss, grouped_linear

DIM, HIDDEN = 6, 5


def build(ffn: str = "swiglu", seed: int = 0, **config: Any) -> MixtureOfExperts:
    module = MixtureOfExperts(DIM, HIDDEN, ffn, MoeConfig(**{"experts": 4, "active": 2, **config})).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def inputs(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=generator).requires_grad_()


FUNCTIONS = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu, "gelu": F.gelu, "relu": F.relu}


def one_expert(x_d: Tensor, up: Tensor, down: Tensor, ffn: str) -> Tensor:
    hidden = up @ x_d
    if ffn.endswith("glu"):
        gate, hidden = hidden.chunk(2)
        return down @ (FUNCTIONS[ffn](gate) * hidden)
    return down @ FUNCTIONS[ffn](hidden)


def token_by_token(module: MixtureOfExperts, x_btd: Tensor, ffn: str, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """The paper, one token after the other: outputs (B, T, D) and the balance loss of each sequence (B,)."""
    outputs, balances = [], []
    for sequence in x_btd:
        chosen = [0.0] * config.experts
        share = [torch.zeros((), dtype=x_btd.dtype)] * config.experts
        for x_d in sequence:
            affinity = torch.sigmoid(module.router.weight @ x_d)
            best = sorted(range(config.experts), key=lambda e: -affinity[e].item())[: config.active]
            total = sum(affinity[e] for e in best) if config.active > 1 else 1.0
            y_d = sum(
                affinity[e] / total * one_expert(x_d, module.up.weight[e], module.down.weight[e], ffn) for e in best
            )
            if module.shared is not None:
                first = module.shared.gate_up if ffn.endswith("glu") else module.shared.up
                y_d = y_d + one_expert(x_d, first.weight, module.shared.down.weight, ffn)
            outputs.append(y_d)
            for e in range(config.experts):
                chosen[e] += e in best
                share[e] = share[e] + affinity[e] / affinity.sum() / len(sequence)
        scale = config.experts / (config.active * len(sequence))
        balances.append(config.balance * sum(scale * f * p for f, p in zip(chosen, share, strict=True)))
    return torch.stack(outputs).view_as(x_btd), torch.stack(balances)


@pytest.mark.parametrize(
    ("ffn", "config"),
    [
        ("swiglu", {}),
        ("geglu", {"experts": 7, "active": 3, "shared": 2}),
        ("reglu", {"active": 1}),
        ("gelu", {"shared": 1}),
        ("relu", {"active": 4}),
    ],
)
def test_outputs_balance_and_gradients_equal_a_loop_over_tokens(ffn: str, config: dict[str, int]) -> None:
    module, x = build(ffn, **config), inputs(3, 5)
    settings = MoeConfig(**{"experts": 4, "active": 2, **config})
    got, balance = module(x)
    want, wanted_balance = token_by_token(module, x, ffn, settings)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(balance, wanted_balance, rtol=1e-12, atol=1e-12)
    direction, per_sequence = inputs(3, 5, seed=2).detach(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    wrt = [x, *module.parameters()]
    ours = torch.autograd.grad((got * direction).sum() + (balance * per_sequence).sum(), wrt)
    theirs = torch.autograd.grad((want * direction).sum() + (wanted_balance * per_sequence).sum(), wrt)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_expert_that_no_token_came_to_has_gradients_of_zero() -> None:
    module, x = build(), inputs(2, 4)
    with torch.no_grad():
        x.abs_()
        module.router.weight[2] = -50.0  # never among the best two
    output, _ = module(x)
    output.sum().backward()
    for parameter in (module.up.weight, module.down.weight):
        assert parameter.grad is not None
        per_expert = parameter.grad.abs().amax(dim=(1, 2))
        assert per_expert[2] == 0
        assert (per_expert > 0).sum() >= 2


def test_no_token_is_dropped_when_all_choose_the_same_experts() -> None:
    module, x = build(), inputs(2, 16)
    with torch.no_grad():
        x.abs_()
        module.router.weight[:2], module.router.weight[2:] = 5.0, -5.0
    output, balance = module(x)
    want, _ = token_by_token(module, x, "swiglu", MoeConfig(experts=4, active=2))
    torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
    assert (balance / module.balance > 1.9).all(), "as unbalanced as can be: E / K"


def test_balance_is_one_when_experts_are_chosen_equally() -> None:
    affinity = torch.eye(4, dtype=torch.float64).repeat(1, 2).view(1, 8, 4) * 0.5 + 0.25
    chosen = torch.stack((affinity.argmax(-1), (affinity.argmax(-1) + 1) % 4), dim=-1)
    torch.testing.assert_close(balance_loss(affinity, chosen), torch.ones(1, dtype=torch.float64))


def test_padding_does_not_count_for_the_balance() -> None:
    module, x = build(), inputs(2, 7).detach()
    valid = torch.arange(7) < torch.tensor([[7], [4]])
    _, padded = module(x, valid)
    torch.testing.assert_close(padded[1:], module(x[1:, :4])[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(padded[:1], module(x[:1])[1], rtol=1e-12, atol=0)
    assert module(x, torch.zeros(2, 7, dtype=torch.bool))[1].tolist() == [0.0, 0.0]


def test_without_gradients_or_weight_there_is_no_balance_loss() -> None:
    x = inputs(1, 3)
    with torch.no_grad():
        assert build()(x)[1] is None
    assert build(balance=0.0)(x)[1] is None


def test_a_lone_gate_lets_the_router_learn_from_the_loss() -> None:
    module = build(active=1, balance=0.0)
    module(inputs(2, 3))[0].sum().backward()
    assert module.router.weight.grad is not None and module.router.weight.grad.abs().max() > 0


def test_grouped_linear_passes_gradcheck_with_empty_runs() -> None:
    x, weight = inputs(7), torch.randn(4, 3, DIM, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))
    want = torch.cat((x[:3] @ weight[1].T, x[3:] @ weight[3].T))
    torch.testing.assert_close(grouped_linear(x, weight, ends), want, rtol=1e-13, atol=1e-13)


def test_torchs_grouped_product_computes_the_same_as_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    x = torch.randn(11, 16).bfloat16().requires_grad_()
    weight = torch.randn(3, 8, 16).bfloat16().requires_grad_()
    ends, direction = torch.tensor([4, 4, 11], dtype=torch.int32), torch.randn(11, 8).bfloat16()
    want = grouped_linear(x, weight, ends)
    monkeypatch.setattr(moe_module, "_no_kernel", lambda *_: "")
    got = grouped_linear(x, weight, ends)
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    wanted = torch.autograd.grad((want * direction).sum(), (x, weight))
    for a, b in zip(torch.autograd.grad((got * direction).sum(), (x, weight)), wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_gradients_of_empty_runs_are_zero_whatever_torchs_kernel_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Blackwell (pytorch#172439), where the product of nothing is what was in memory."""
    real = torch._grouped_mm

    def dirty(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        product = real(a, b, offs=offs)
        if product.dim() == 3:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return product

    monkeypatch.setattr(moe_module, "_no_kernel", lambda *_: "")
    monkeypatch.setattr(torch, "_grouped_mm", dirty)
    x, weight = torch.randn(11, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16().requires_grad_()
    grouped_linear(x, weight, torch.tensor([4, 4, 11], dtype=torch.int32)).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert weight.grad[1].abs().max() == 0 < weight.grad[0].abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("experts", [4, 64])
def test_on_a_gpu_nothing_waits_for_the_device_and_numbers_are_those_of_the_cpu(experts: int) -> None:
    torch.manual_seed(0)
    module = MixtureOfExperts(64, 96, "swiglu", MoeConfig(experts=experts, active=2, shared=1)).cuda()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, reference = torch.randn(3, 21, 64, device="cuda", requires_grad=True), copy.deepcopy(module).cpu()
    for attempt in range(2):  # the first call loads kernels
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output, balance = module(x)
            gradients = torch.autograd.grad(output.float().square().sum() + balance.sum(), list(module.parameters()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, wanted_balance = reference(x.detach().cpu())
    wanted = torch.autograd.grad(want.float().square().sum() + wanted_balance.sum(), list(reference.parameters()))
    torch.testing.assert_close(balance.cpu(), wanted_balance, rtol=1e-4, atol=0)
    for a, b in zip((output, *gradients), (want, *wanted), strict=True):
        assert (a.cpu().float() - b.float()).norm() < 0.02 * b.float().norm()


def test_the_grouped_product_is_refused_with_a_reason() -> None:
    assert moe_module._no_kernel("cpu", torch.bfloat16, 8, 8) == "it is for CUDA"
    assert "bfloat16, not torch.float32" in moe_module._no_kernel("cuda", torch.float32, 8, 8)
    assert "multiples of 16 bytes" in moe_module._no_kernel("cuda", torch.bfloat16, 8, 12)
    assert moe_module._no_kernel("cuda", torch.bfloat16, 8, 16) == ""


def test_a_torch_without_the_grouped_product_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert moe_module._no_kernel("cuda", torch.bfloat16, 16, 32) == "this torch has none"
    assert "waits for the device" in caplog.text
    moe_module._no_kernel.cache_clear()


def test_routing_is_exact_under_autocast() -> None:
    module, x = build().float(), inputs(2, 9).detach().float()
    seen: list[Tensor] = []
    real = module._affinity
    module._affinity = lambda x_nd: seen.append(real(x_nd)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    want, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, balance = module(x)
    assert torch.equal(seen[0], seen[1]) and seen[1].dtype == torch.float32
    assert balance.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_recomputation_and_compilation_keep_gradients() -> None:
    module, x = build(shared=1), inputs(2, 6)

    def gradients(call: Any, of: MixtureOfExperts) -> list[Tensor]:
        output, balance = call(x)
        return list(torch.autograd.grad(output.square().sum() + balance.sum(), list(of.parameters())))

    want = gradients(module, module)
    again = gradients(lambda value: checkpoint(module, value, use_reentrant=False), module)
    compiled = copy.deepcopy(module)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for a, b, c in zip(want, again, gradients(compiled, compiled), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_idle_parameters_are_those_of_experts_not_taken() -> None:
    each = 3 * HIDDEN * DIM
    assert build().num_idle_parameters() == 2 * each
    assert build(experts=8, active=1, shared=1).num_idle_parameters() == 7 * each
