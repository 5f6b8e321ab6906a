"""Optimisers of our own: steps by hand, the papers' rules written out over many steps, skips, scaling, state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.optim import build_optimizer, foreach
from glowflow.core.optim.adan import Adan
from glowflow.core.optim.foreach import ForeachOptimizer
from glowflow.core.optim.lion import Lion
from glowflow.core.optim.muon import Muon
from glowflow.core.optim.sophia import SophiaG, SophiaH
from tests.core.orthogonal import by_svd


def lion_rule(
    theta: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, wd: float, o: dict[str, Any]
) -> Tensor:
    beta1, beta2 = o["betas"]
    sign = (beta1 * s["m"] + (1 - beta1) * g).sign()
    s["m"] = beta2 * s["m"] + (1 - beta2) * g
    return (1 - lr * wd) * theta - lr * sign


def adan_rule(
    theta: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, wd: float, o: dict[str, Any]
) -> Tensor:
    beta1, beta2, beta3 = o["betas"]
    d = g - s["before"] if t > 1 else torch.zeros_like(g)
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["v"] = beta2 * s["v"] + (1 - beta2) * d
    s["n"] = beta3 * s["n"] + (1 - beta3) * (g + beta2 * d) ** 2
    s["before"] = g
    step = s["m"] / (1 - beta1**t) + beta2 * s["v"] / (1 - beta2**t)
    step = step / ((s["n"] / (1 - beta3**t)).sqrt() + o["eps"])
    return (theta - lr * step) / (1 + lr * wd) if o["proximal"] else (1 - lr * wd) * theta - lr * step


def muon_rule(
    theta: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, wd: float, o: dict[str, Any]
) -> Tensor:
    if theta.ndim < 2:
        beta1, beta2 = o["betas"]
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
        step = s["m"] / (1 - beta1**t) / ((s["v"] / (1 - beta2**t)).sqrt() + o["eps"])
        return (1 - lr * wd) * theta - lr * step
    s["m"] = o["momentum"] * s["m"] + (1 - o["momentum"]) * g
    ahead = o["momentum"] * s["m"] + (1 - o["momentum"]) * g if o["nesterov"] else s["m"]
    return (1 - lr * wd) * theta - lr * 0.2 * max(theta.shape) ** 0.5 * by_svd(ahead)


def muon_by_shape(params: Any, **options: Any) -> Muon:
    """Muon for what has two dimensions, AdamW for the rest."""
    groups = [{"params": [p]} if isinstance(p, Tensor) else p for p in params]
    rules = ["muon" if group["params"][0].ndim > 1 else "adamw" for group in groups]
    return Muon([{**group, "rule": rule} for group, rule in zip(groups, rules, strict=True)], **options)


def sophia_rule(
    theta: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, wd: float, o: dict[str, Any]
) -> Tensor:
    """Before the first estimate of the Hessian: the sign of the momentum."""
    s["m"] = o["betas"][0] * s["m"] + (1 - o["betas"][0]) * g
    return (1 - lr * wd) * theta - lr * s["m"].sign()


@dataclass
class Rule:
    make: Callable[..., ForeachOptimizer]
    options: dict[str, Any]
    written_out: Callable[..., Tensor]


MUON = {"momentum": 0.9, "betas": (0.8, 0.9), "eps": 1e-8}
ADAN = {"betas": (0.9, 0.8, 0.95), "eps": 1e-8}
RULES = {
    "lion": Rule(Lion, {"betas": (0.95, 0.98)}, lion_rule),
    "adan": Rule(Adan, {**ADAN, "proximal": True}, adan_rule),
    "adan, AdamW's decay": Rule(Adan, {**ADAN, "proximal": False}, adan_rule),
    "muon": Rule(muon_by_shape, {**MUON, "nesterov": True}, muon_rule),
    "muon, no Nesterov": Rule(muon_by_shape, {**MUON, "nesterov": False}, muon_rule),
    "sophia-g": Rule(SophiaG, {"betas": (0.95, 0.9), "rho": 0.1}, sophia_rule),
    "sophia-h": Rule(SophiaH, {"betas": (0.9, 0.95), "gamma": 0.1, "eps": 1e-12}, sophia_rule),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def test_two_steps_of_lion_by_hand() -> None:
    """lr 0.1, wd 0.5, beta 0.9 and 0.8.

    Step 1, g = (1, -2, 0): c = (0.1, -0.2, 0), theta = 0.95 (1, 1, 1) - 0.1 (1, -1, 0) = (0.85, 1.05, 0.95),
    m = (0.2, -0.4, 0). Step 2, g = (-1, -2, 3): c = 0.9 m + 0.1 g = (0.08, -0.56, 0.3),
    theta = 0.95 theta - 0.1 (1, -1, 1) = (0.7075, 1.0975, 0.8025), m = 0.8 m + 0.2 g = (-0.04, -0.72, 0.6).
    """
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Lion([theta], lr=0.1, betas=(0.9, 0.8), weight_decay=0.5)
    follow(optimizer, theta, ([1, -2, 0], [0.85, 1.05, 0.95]), ([-1, -2, 3], [0.7075, 1.0975, 0.8025]))
    momentum = torch.tensor([-0.04, -0.72, 0.6], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[theta]["exp_avg"], momentum, rtol=0, atol=1e-15)


def test_two_steps_of_adan_by_hand() -> None:
    """lr 0.1, wd 1, beta 0.5, 0.5, 0.75, no eps.

    Step 1, g = 2: d = 0, m = 1, v = 0, n = 0.25 x 4 = 1; u = (1 / 0.5 + 0) / sqrt(1 / 0.25) = 1,
    theta = (1 - 0.1) / 1.1 = 9/11. Step 2, g = 4: d = 2, m = 2.5, v = 1, n = 0.75 + 0.25 x 25 = 7;
    u = (2.5 / 0.75 + 0.5 / 0.75) / sqrt(7 / 0.4375) = 4 / 4 = 1, theta = (9/11 - 0.1) / 1.1 = 7.9/12.1.
    """
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Adan([theta], lr=0.1, betas=(0.5, 0.5, 0.75), eps=0.0, weight_decay=1.0)
    follow(optimizer, theta, ([2], [9 / 11]), ([4], [7.9 / 12.1]))
    state = {name: value.item() for name, value in optimizer.state[theta].items()}
    assert state == {"exp_avg": 2.5, "exp_avg_diff": 1.0, "exp_avg_sq": 7.0, "grad_before": 4.0, "step": 2.0}


def follow(optimizer: ForeachOptimizer, theta: nn.Parameter, *steps: tuple[list[float], list[float]]) -> None:
    for gradient, want in steps:
        theta.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(theta.detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)


@every_rule
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fifty_steps_equal_the_rule(rule: Rule, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    params = [nn.Parameter(draw(7, 5)), nn.Parameter(draw(3))]
    groups = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:], "lr": 0.002}]
    optimizer = rule.make(groups, lr=0.01, **rule.options)
    theta = [p.detach().clone() for p in params]
    state = [{name: torch.zeros_like(p) for name in ("m", "v", "n", "before")} for p in theta]
    for t in range(1, 51):
        for index, (lr, decay) in enumerate([(0.01, 0.3), (0.002, 0.0)]):
            g = draw(*theta[index].shape)
            params[index].grad = g.clone()
            theta[index] = rule.written_out(theta[index], g, state[index], t, lr, decay, rule.options)
        optimizer.step()
    for parameter, want in zip(params, theta, strict=True):
        torch.testing.assert_close(parameter.detach(), want, rtol=tolerance, atol=tolerance)


def optimizer_of(module: nn.Module, name: str, **section: object) -> torch.optim.Optimizer:
    return build_optimizer(module, GlowFlowConfig(training={"lr": 0.03, "optimizer": {"name": name, **section}}))


def test_the_config_names_lion_and_vectors_do_not_decay() -> None:
    module = nn.Linear(3, 2)
    optimizer = optimizer_of(module, "lion", betas=(0.8, 0.7), weight_decay=0.6)
    assert isinstance(optimizer, Lion)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["betas"], matrices["weight_decay"]) == (0.03, (0.8, 0.7), 0.6)
    assert vectors["params"] == [module.bias] and vectors["weight_decay"] == 0.0


def test_the_config_names_adan() -> None:
    optimizer = optimizer_of(nn.Linear(3, 2), "adan", betas=(0.9, 0.8, 0.7), eps=1e-6, proximal=False)
    assert isinstance(optimizer, Adan)
    matrices, vectors = optimizer.param_groups
    assert (matrices["betas"], matrices["eps"], matrices["proximal"]) == ((0.9, 0.8, 0.7), 1e-6, False)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.02, 0.0)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "lion", "betas": [0.9, 1.0]}, r"betas.*less than 1"),
        ({"name": "lion", "eps": 1e-8}, "eps"),
        ({"name": "adan", "betas": [0.9, 0.99]}, "betas"),
        ({"name": "adan", "betas": [0.9, -0.1, 0.9]}, r"betas.*at least 0"),
        ({"name": "adan", "rho": 1}, "rho"),
    ],
)
def test_keys_and_values_that_cannot_be_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config({"training": {"optimizer": section}})


@every_rule
def test_nothing_changes_where_gradients_overflowed(rule: Rule) -> None:
    module = nn.Linear(3, 2)
    optimizer = rule.make(module.parameters(), lr=0.1, **rule.options)
    for found in (1.0, 0.0, 1.0, 0.0):
        before = copy.deepcopy([p.detach() for p in module.parameters()]), copy.deepcopy(list(optimizer.state.values()))
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if found else 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)  # type: ignore[attr-defined]
        optimizer.step()
        after = [p.detach() for p in module.parameters()], list(optimizer.state.values())
        assert (str(before) == str(after)) is bool(found)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@every_rule
def test_the_scale_of_the_gradients_is_divided_out(rule: Rule) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = rule.make(module.parameters(), lr=0.1, **rule.options)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())  # type: ignore[attr-defined]
        for seed in (1, 2):
            for parameter in module.parameters():
                generator = torch.Generator().manual_seed(seed)
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        weights.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@every_rule
@pytest.mark.parametrize("shape", [(50,), (10, 5)])
def test_the_skip_that_stays_on_the_device_changes_no_bit(rule: Rule, shape: tuple[int, ...]) -> None:
    """What a GPU runs: the same operations whether there is something to skip or not, from the first step on."""
    generator = torch.Generator().manual_seed(0)
    plain, skipping = (nn.Parameter(torch.linspace(-1, 1, 50).view(shape)) for _ in range(2))
    one, other = (rule.make([p], lr=0.1, weight_decay=0.5, **rule.options) for p in (plain, skipping))
    for skip in (True, True, False, True, False, False, True):
        g = torch.full(shape, float("nan")) if skip else torch.randn(shape, generator=generator)
        if not skip:
            plain.grad = g.clone()
            one.step()
        skipping.grad = g
        with torch.no_grad():
            other.update_group(other.param_groups[0], None, torch.tensor(skip))
        assert torch.equal(plain, skipping)
    for name, value in one.state[plain].items():
        assert torch.equal(value, other.state[skipping][name]), name


@every_rule
def test_state_goes_on_bit_for_bit_after_a_round_trip(rule: Rule) -> None:
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    second = copy.deepcopy(first)
    one, other = (rule.make(module.parameters(), lr=0.01, **rule.options) for module in (first, second))
    x = torch.randn(6, 4)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step(first, one), step(second, other)
    fresh = rule.make(second.parameters(), lr=0.5, **rule.options)
    fresh.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(2):
        step(first, one), step(second, fresh)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@every_rule
def test_loaded_state_lies_where_the_parameter_does(rule: Rule) -> None:
    theta = nn.Parameter(torch.ones(3))
    theta.grad = torch.ones(3)
    optimizer = rule.make([theta], **rule.options)
    optimizer.step()
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    loaded = rule.make([elsewhere], **rule.options)
    loaded.load_state_dict(optimizer.state_dict())
    assert {name: value.device.type for name, value in loaded.state[elsewhere].items()} == dict.fromkeys(
        optimizer.state[theta], "meta"
    )


@every_rule
def test_parameters_that_do_not_fit_into_the_cache_together_are_updated_all(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cached in (1, 20, 10**6):
        monkeypatch.setattr(foreach, "_CACHED", cached)
        params = [nn.Parameter(torch.full((size,), 0.5)) for size in (3, 30, 5, 7, 9)]
        optimizer = rule.make(params, lr=0.1, **rule.options)
        for _ in range(2):
            for parameter in params:
                parameter.grad = torch.linspace(-1, 1, parameter.numel())
            optimizer.step()
        results.append([p.detach() for p in params])
        assert all((p != 0.5).any() for p in params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_rule
def test_a_closure_is_called_and_the_loss_falls(rule: Rule) -> None:
    theta = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = rule.make([theta], lr=0.05, **rule.options)

    def closure() -> float:
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(80)]
    assert losses[0] == 13.0 and min(loss for loss in losses if loss is not None) < 1.0
