"""Passes of the multi-modal model: recomputed, compiled, in half precision, differentiated twice, with experts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glowflow.core.batch import ModelOutput
from glowflow.core.differentiation import twice_differentiable
from tests.core.media_batches import media_batch, media_rows
from tests.core.media_models import FUSIONS, TASKS, assert_same, make, objective, readings

# -- blocks one by one -------------------------------------------------------------------------------------------------


def both(first: ModelOutput, parameters: list[nn.Parameter]) -> list[Tensor]:
    value = objective(first)
    return [value, *torch.autograd.grad(value, parameters)]


@pytest.mark.parametrize(("fusion", "task"), TASKS)
def test_recomputing_blocks_changes_nothing(fusion: str, task: str) -> None:
    module = make(fusion, task, dropout=0.1)
    batch, parameters = media_batch(module.config, media_rows()), list(module.parameters())
    torch.manual_seed(0)
    want = both(module(batch)[0], parameters)
    for unit in module.shard_units():
        unit.forward = lambda *a, inner=unit.forward: checkpoint(inner, *a, use_reentrant=False)  # type: ignore[method-assign]
    torch.manual_seed(0)
    torch.testing.assert_close(both(module(batch)[0], parameters), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fusion", "task"),
    [("cross_attention", "language_modelling"), ("bottleneck", "classification"), ("mixture", "language_modelling")],
)
def test_compiled_blocks_are_whole_graphs_and_change_nothing(fusion: str, task: str) -> None:
    more = {"depth": 1, "bottleneck": {"from_layer": 0}, "audio": None}
    module = make(fusion, task, image={"encoder": "vit", "patch": 4, "depth": 1, "heads": 2, "tokens": 2}, **more)
    batch = media_batch(module.config, media_rows())
    want = both(module(batch)[0], list(module.parameters()))
    for unit in module.shard_units():
        unit.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(both(module(batch)[0], list(module.parameters())), want)


@pytest.mark.parametrize(("fusion", "task"), [*TASKS[::2], TASKS[5]])
def test_half_precision_is_near(fusion: str, task: str) -> None:
    module = make(fusion, task, dtype=torch.float32)
    batch = media_batch(module.config, media_rows())
    want = objective(module(batch)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(batch)[0]
        got = objective(output)
    got.backward()
    torch.testing.assert_close(got.float(), want, rtol=0.06, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    if output.pairs is not None:
        assert output.pairs[0].dtype == output.logit_scale.dtype == torch.float32
    half = copy.deepcopy(module).to(torch.bfloat16)
    output = half(batch)[0]
    objective(output).backward()
    assert output.hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_pass_can_be_differentiated_twice(fusion: str) -> None:
    module = make(fusion, depth=1, bottleneck={"from_layer": 0})
    assert module.second_order_reasons() == []
    batch = media_batch(module.config, media_rows()[:1])
    parameters = list(module.parameters())
    with twice_differentiable():
        gradients = torch.autograd.grad(objective(module(batch)[0]), parameters, create_graph=True)
        total = sum((gradient.square().sum() for gradient in gradients), torch.zeros(()))
        second = torch.autograd.grad(total, parameters, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in second)


def test_dropout_follows_the_generator_and_is_off_in_evaluation() -> None:
    for fusion in FUSIONS:
        module = make(fusion, dropout=0.3, image={"encoder": "vit", "patch": 4, "depth": 1, "dropout": 0.3})
        batch, losses = media_batch(module.config, media_rows()), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(module(batch)[0].loss_sum.item())
        assert losses[0] == losses[1] != losses[2]
        module.eval()
        assert module(batch)[0].loss_sum.item() == module(batch)[0].loss_sum.item()


# -- mixtures of experts, classes drawn from the model -----------------------------------------------------------------


@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "mixture"])
def test_the_balance_of_experts_does_not_count_padding(fusion: str) -> None:
    module = make(fusion, moe={"experts": 3})
    rows = media_rows()
    short, long = media_batch(module.config, rows), media_batch(module.config, rows, length=64)
    want, got = module(short)[0], module(long)[0]
    torch.testing.assert_close(got.aux_sum, want.aux_sum, rtol=1e-9, atol=0)
    assert_same(readings(got, long), readings(want, short))


def test_labels_can_be_drawn_from_the_model_s_own_classes() -> None:
    module = make("bottleneck", "classification")
    batch = media_batch(module.config, media_rows())
    draws = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    output, _ = module(replace(batch, label_draws=draws))
    chances = module.head(output.pooled).softmax(-1).cumsum(-1)
    drawn = draws.gather(1, batch.readout[:, None])
    labels = torch.tensor([int((row < draw).sum()) for row, draw in zip(chances, drawn, strict=True)])
    targets = batch.targets.scatter(1, batch.readout[:, None], labels[:, None])
    torch.testing.assert_close(output.loss_sum, module(replace(batch, targets=targets))[0].loss_sum)
