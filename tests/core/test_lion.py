"""Lion: two steps by hand, the rule written out over many steps, skips, scaling, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.lion import Lion, lion_update


def test_two_steps_by_hand() -> None:
    """lr 0.1, wd 0.5, beta 0.9 and 0.8.

    Step 1, g = (1, -2, 0): c = (0.1, -0.2, 0), theta = 0.95 (1, 1, 1) - 0.1 (1, -1, 0) = (0.85, 1.05, 0.95),
    m = (0.2, -0.4, 0). Step 2, g = (-1, -2, 3): c = 0.9 m + 0.1 g = (0.08, -0.56, 0.3),
    theta = 0.95 theta - 0.1 (1, -1, 1) = (0.7075, 1.0975, 0.8025), m = 0.8 m + 0.2 g = (-0.04, -0.72, 0.6).
    """
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Lion([theta], lr=0.1, betas=(0.9, 0.8), weight_decay=0.5)
    for gradient, want in (([1, -2, 0], [0.85, 1.05, 0.95]), ([-1, -2, 3], [0.7075, 1.0975, 0.8025])):
        theta.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(theta.detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)
    momentum = torch.tensor([-0.04, -0.72, 0.6], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[theta]["exp_avg"], momentum, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fifty_steps_equal_the_rule(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    params = [nn.Parameter(draw(7, 5)), nn.Parameter(draw(3))]
    groups = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:], "lr": 0.002}]
    optimizer = Lion(groups, lr=0.01, betas=(0.95, 0.98))
    theta, m = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for _ in range(50):
        for index, (lr, decay) in enumerate([(0.01, 0.3), (0.002, 0.0)]):
            g = draw(*theta[index].shape)
            params[index].grad = g.clone()
            sign = (0.95 * m[index] + 0.05 * g).sign()
            theta[index] = (1 - lr * decay) * theta[index] - lr * sign
            m[index] = 0.98 * m[index] + 0.02 * g
        optimizer.step()
    for parameter, want in zip(params, theta, strict=True):
        torch.testing.assert_close(parameter.detach(), want, rtol=tolerance, atol=tolerance)


def optimizer_of(module: nn.Module, **section: object) -> torch.optim.Optimizer:
    return build_optimizer(module, GlowFlowConfig(training={"lr": 0.03, "optimizer": {"name": "lion", **section}}))


def test_the_config_names_it_and_vectors_do_not_decay() -> None:
    module = nn.Linear(3, 2)
    optimizer = optimizer_of(module, betas=(0.8, 0.7), weight_decay=0.6)
    assert isinstance(optimizer, Lion)
    matrices, vectors = optimizer.param_groups
    assert (matrices["lr"], matrices["betas"], matrices["weight_decay"]) == (0.03, (0.8, 0.7), 0.6)
    assert vectors["params"] == [module.bias] and vectors["weight_decay"] == 0.0
    with pytest.raises(ConfigError, match=r"betas.*less than 1"):
        load_config({"training": {"optimizer": {"name": "lion", "betas": [0.9, 1.0]}}})
    with pytest.raises(ConfigError, match="eps"):
        load_config({"training": {"optimizer": {"name": "lion", "eps": 1e-8}}})


def test_nothing_changes_where_gradients_overflowed() -> None:
    module = nn.Linear(3, 2)
    optimizer = optimizer_of(module)
    for index, found in enumerate((0.0, 1.0, 0.0)):
        before = copy.deepcopy([[p.detach() for p in module.parameters()], [*optimizer.state.values()]])
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if found else 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)  # type: ignore[attr-defined]
        optimizer.step()
        after = [[p.detach() for p in module.parameters()], [*optimizer.state.values()]]
        assert (str(before) == str(after)) is bool(found)
        momenta = [state["exp_avg"] for state in optimizer.state.values()]
        want = [0.01, 0.01, 0.0199][index]  # of gradients that are 1 when the scale is divided out
        assert all(torch.allclose(m, torch.full_like(m, want)) for m in momenta)


def test_the_skip_that_stays_on_the_device_changes_no_bit() -> None:
    """What a GPU runs: the same operations whether there is something to skip or not."""
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    theta, m = torch.randn(2, 50).unbind()
    for skip in (False, True):
        g = torch.full((50,), float("inf")) if skip else torch.randn(50)
        ours, momentum = [theta.clone()], [m.clone()]
        lion_update(ours, [g], momentum, skip=torch.tensor(skip), **options)  # type: ignore[arg-type]
        plain, plain_momentum = [theta.clone()], [m.clone()]
        if not skip:
            lion_update(plain, [g], plain_momentum, **options)  # type: ignore[arg-type]
        assert torch.equal(ours[0], plain[0]) and torch.equal(momentum[0], plain_momentum[0])


def test_state_goes_on_bit_for_bit_after_a_round_trip() -> None:
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    second = copy.deepcopy(first)
    one, other = optimizer_of(first), optimizer_of(second)
    x = torch.randn(6, 4)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(first, one), step(second, other)
    fresh = optimizer_of(second)
    fresh.load_state_dict(copy.deepcopy(other.state_dict()))
    step(first, one), step(second, fresh)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_closure_is_called_and_the_loss_falls() -> None:
    theta = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = Lion([theta], lr=0.05)

    def closure() -> float:
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(80)]
    assert losses[0] == 13.0 and min(loss for loss in losses if loss is not None) < 1.0
