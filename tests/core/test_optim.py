"""AdamW against the update rule written out; the groups; the registry."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from glowflow.config.errors import ConfigError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.transformer import Transformer
from glowflow.core.batch import Batch
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.groups import parameter_groups


def config(**optimizer: object) -> GlowFlowConfig:
    return GlowFlowConfig(training={"lr": 0.03, "optimizer": {"name": "adamw", **optimizer}})


def test_twenty_steps_equal_the_paper_rule(make_module: Callable[..., Transformer]) -> None:
    module = make_module()
    optimizer = build_optimizer(module, config(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3))
    theta = {n: p.detach().clone() for n, p in module.named_parameters()}
    m, v = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 21):
        for name, parameter in module.named_parameters():
            g = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.grad = g.clone()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8**step), v[name] / (1 - 0.9**step)
            decay = 0.3 if parameter.ndim > 1 else 0.0
            theta[name] = theta[name] * (1 - 0.03 * decay) - 0.03 * m_hat / (v_hat.sqrt() + 1e-6)
        optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), theta[name], rtol=1e-9, atol=1e-11)


def test_it_is_the_fused_kernel_and_lr_is_the_peak() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config(betas=(0.9, 0.99), eps=1e-7))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["fused"], group["lr"], group["betas"], group["eps"]) == (True, 0.03, (0.9, 0.99), 1e-7)


def test_vectors_do_not_decay_and_order_is_by_name(make_module: Callable[..., Transformer]) -> None:
    module = make_module(tie_embeddings=False)
    names = {id(p): n for n, p in module.named_parameters()}
    decayed, kept = parameter_groups(module, 0.2)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)
    listed = [names[id(p)] for p in decayed["params"]]
    assert listed == sorted(listed)
    assert {"embedding.weight", "head.weight"} <= set(listed)
    assert all("norm" in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    layer = torch.nn.Linear(2, 3)
    layer.weight.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert [p.shape for p in group["params"]] == [(3,)]


def test_a_nonfinite_step_is_skipped_on_the_device(
    make_module: Callable[..., Transformer], make_batch: Callable[..., Batch]
) -> None:
    module = make_module(torch.float32)
    optimizer = build_optimizer(module, config())
    for scale, found_inf in ((1.0, 0.0), (1.0, 1.0), (8.0, 0.0)):
        before = [p.detach().clone() for p in module.parameters()]
        (module(make_batch())[0].loss_sum * scale).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        optimizer.step()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
        assert all(same) if found_inf else not any(same)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_grad_scale_is_divided_out(make_module: Callable[..., Transformer], make_batch: Callable[..., Batch]) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        module = make_module(torch.float32)
        optimizer = build_optimizer(module, config())
        (module(make_batch())[0].loss_sum * scale).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        optimizer.step()
        weights.append(list(module.parameters()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


def test_state_round_trip_goes_on_bit_for_bit(
    make_module: Callable[..., Transformer], make_batch: Callable[..., Batch]
) -> None:
    def step(module: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
        module(make_batch(seed=seed))[0].loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()

    first = make_module(torch.float32)
    optimizer = build_optimizer(first, config())
    for seed in range(3):
        step(first, optimizer, seed)
    second = make_module(torch.float32, seed=9)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, config())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(first, optimizer, 7)
    step(second, resumed, 7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="adamw"):
        build_optimizer(torch.nn.Linear(2, 2), config(name="lyon"))
