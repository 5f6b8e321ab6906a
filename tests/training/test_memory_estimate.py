"""The estimate behind `glowflow plan`, against what torch really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glowflow.config.registry import OPTIMIZERS
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.extra import TakesExtraPass
from glowflow.training.memory import GIB, _SavedBytes, estimate_memory, largest_micro_batch
from tests.training.small_run import make_rows, small_config


def config_of(**more: Any) -> Any:
    small = {"model__dim": 32, "data__context": 64, "data__document_mask": False, "training__batch_size": 4}
    return small_config(**{**small, **more})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_equal_those_of_a_real_forward_pass(checkpointed: bool) -> None:
    config = config_of(training__activation_checkpointing=checkpointed)
    module = build_module(config, "cpu").train()
    saved = _SavedBytes(module)
    batch = make_rows(0, config)
    inputs = [tensor for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)]
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        output, _ = module(batch)
    assert output.loss_sum is not None
    estimate = estimate_memory(config)
    assert estimate.activations == pytest.approx(saved.peak(checkpointed), rel=0.02)
    assert estimate.activations > sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS.names())
def test_fixed_parts_equal_the_real_ones(optimizer_name: str) -> None:
    config = config_of(training__optimizer=optimizer_name)
    module = build_module(config, "cpu")
    optimizer = build_optimizer(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    estimate = estimate_memory(config)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert (estimate.parameters, estimate.gradients, estimate.gathered) == (weights, weights, 0)
    copies = optimizer.extra_copies if isinstance(optimizer, TakesExtraPass) else 0
    assert estimate.optimizer == real + copies * estimate.parameters
    assert (copies > 0) is (optimizer_name == "sophia-h")
    assert estimate.total == pytest.approx(sum(estimate.parts().values()))


def test_nothing_is_allocated_for_a_large_model() -> None:
    """12 GiB of weights in a moment: the estimate runs on fake tensors."""
    config = config_of(model__dim=4096, model__depth=16, model__heads=32, training__batch_size=2)
    estimate = estimate_memory(config)
    assert estimate.parameters > 11 * GIB
    assert not estimate.fits(24)


def test_sharding_checkpointing_and_precision_save_memory() -> None:
    plain = estimate_memory(config_of())
    sharded = estimate_memory(config_of(resources__workers=4, training__strategy="fsdp"))
    assert sharded.parameters == plain.parameters / 4
    assert sharded.optimizer == pytest.approx(plain.optimizer / 4)
    assert sharded.gathered > 0
    replicated = estimate_memory(config_of(resources__workers=4, training__strategy="ddp"))
    assert (replicated.parameters, replicated.gathered) == (plain.parameters, 0)
    assert replicated.micro_batch_size == 1
    assert estimate_memory(config_of(training__activation_checkpointing=True)).activations < 0.7 * plain.activations
    assert estimate_memory(config_of(training__precision="bf16")).activations < 0.9 * plain.activations


def test_largest_micro_batch_is_the_largest_that_fits() -> None:
    keys = {"model__dim": 128, "model__depth": 1, "data__context": 256, "training__batch_size": 12}
    config = config_of(**keys)
    sizes = {
        size: estimate_memory(config_of(**keys, training__micro_batch_size=size)).total / GIB for size in (1, 4, 6)
    }
    assert largest_micro_batch(config, (sizes[4] + sizes[6]) / 2) == 4
    assert largest_micro_batch(config, sizes[1] * 0.99) is None
    assert largest_micro_batch(config, 1000) == 12


def test_real_training_is_not_poisoned_by_fake_tensors() -> None:
    config = config_of()
    estimate_memory(config)
    output, _ = build_module(config, "cpu")(make_rows(0, config))
    assert type(output.loss_sum) is torch.Tensor
    assert torch.get_default_dtype() == torch.float32
