"""Maximal-update parametrisation: what changes with the width, and that nothing does at the base width."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glowflow.config.errors import CheckpointError, ConfigError
from glowflow.config.loader import load_config, warnings
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import Batch
from glowflow.core.initialization import initialize
from glowflow.core.layers import head as head_module
from glowflow.core.layers.head import OutputHead
from glowflow.core.model import GlowFlowModel, build_module
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.groups import parameters_with_roles

MakeBatch = Callable[..., Batch]
SMALL: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "vocab_size": 37}

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped, untied": {"kv_heads": 2, "tie_embeddings": False},
    "windowed": {"attention": {"kind": "windowed", "window": 4}},
    "sparse": {"attention": {"kind": "sparse"}},
    "linear": {"attention": {"kind": "linear", "linear": {"variant": "gated_delta"}}},
    "gated": {"attention": {"kind": "adaptive", "window": 4, "adaptive": {"policy": "gated"}}},
    "experts": {"moe": {"experts": 3}},
    "transformer-xl": {"arch": "transformer-xl", "memory": 8},
}


def config_of(optimizer: str = "adamw", **model: Any) -> GlowFlowConfig:
    return load_config({"model": {**SMALL, **model}, "training": {"optimizer": optimizer, "lr": 1e-3}})


def drawn(config: GlowFlowConfig, dtype: torch.dtype = torch.float32) -> BaseArchitecture:
    module = build_module(config, "cpu").to(dtype)
    initialize(module, 0)
    return module


def trained(config: GlowFlowConfig, batch: Batch) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Losses and weights over two steps, and the groups' options."""
    module = drawn(config)
    optimizer = build_optimizer(module, config)
    losses = []
    for _ in range(2):
        output, _ = module(batch)
        losses.append(output.objective.detach().clone())
        output.objective.backward()
        optimizer.step()
        optimizer.zero_grad()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [*losses, *module.state_dict().values()], groups


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_base_width_it_is_the_standard_parametrisation_bit_for_bit(kind: str, make_batch: MakeBatch) -> None:
    standard = trained(config_of(**KINDS[kind]), make_batch())
    ours = trained(config_of(**KINDS[kind], mup=True, base_dim=64, base_head_dim=16), make_batch())
    assert ours[1] == standard[1]
    assert all(torch.equal(a, b) for a, b in zip(ours[0], standard[0], strict=True))
    wider = trained(config_of(**KINDS[kind], mup=True, base_dim=16), make_batch())
    assert not all(torch.equal(a, b) for a, b in zip(wider[0], standard[0], strict=True))


PAIR: tuple[dict[str, Any], ...] = ({}, {"mup": True, "base_dim": 16})
HIDDEN = {"qkv", "q", "kv", "r", "out", "gate_up", "down", "up", "router", "decay", "beta", "gate", "mix"}


@pytest.mark.parametrize("kind", KINDS)
def test_rates_decays_and_first_values_of_every_tensor(kind: str) -> None:
    """m = 4: std / 2, rate / 4 and decay x 4 for hidden matrices, and for nothing else."""
    standard, ours = (config_of(**KINDS[kind], **keys) for keys in PAIR)
    plain, module = build_module(standard, "cpu"), build_module(ours, "cpu")
    groups = build_optimizer(module, ours).param_groups
    options = {id(p): (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter, role in parameters_with_roles(module):
        before, spec = plain.init_spec(name), module.init_spec(name)
        owner = name.rpartition(".")[0].rpartition(".")[2]
        if owner in HIDDEN and parameter.ndim > 1:
            assert role.kind == "hidden" and role.width_ratio == 4.0, name
            assert spec.kind == before.kind and spec.std == pytest.approx(before.std / 2), name
            assert options[id(parameter)] == (0.25, 0.4), name
        else:
            assert role.kind != "hidden" and role.width_ratio == 1.0, name
            assert spec == before, name
            assert options[id(parameter)] == (1.0, 0.1 if role.decays else 0.0), name
    out = module.init_spec("blocks.0.attention.out.weight")
    assert out.std == pytest.approx(0.02 / math.sqrt(2 * 2) / math.sqrt(4))


def test_drawn_weights_have_the_spread_that_is_asked_for() -> None:
    module = drawn(config_of(mup=True, base_dim=16))
    qkv = module.get_parameter("blocks.0.attention.qkv.weight")
    assert qkv.std().item() == pytest.approx(0.01, rel=0.05)
    assert module.get_parameter("embedding.weight").std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scores_are_divided_by_the_width_ratio_before_the_cap(
    tied: bool, softcap: float | None, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch()
    keys: dict[str, Any] = {"tie_embeddings": tied, "logit_softcap": softcap, "init_std": 1.0}
    module = drawn(config_of(mup=True, base_dim=16, **keys), torch.float64)
    assert isinstance(module.head, OutputHead)
    output, _ = module(batch)
    scores = output.hidden @ module.head.matrix.T / 4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    torch.testing.assert_close(module.logits(output.hidden), scores)
    nll = -scores.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    torch.testing.assert_close(output.loss_sum, (nll * batch.loss_weights).sum())
    whole = torch.autograd.grad(output.objective, list(module.parameters()), retain_graph=True)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 37 * 5)
    chunked, _ = module(batch)
    torch.testing.assert_close(chunked.loss_sum, output.loss_sum)
    torch.testing.assert_close(torch.autograd.grad(chunked.objective, list(module.parameters())), whole)
    draws = torch.rand(batch.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by_hand = (scores.softmax(-1).cumsum(-1) < draws[..., None]).sum(-1)
    assert torch.equal(module.head.sample(output.hidden, draws), by_hand)


def with_longer_queries(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same weights, but for queries (and the biases that are added to them) times a factor."""
    state = copy.deepcopy(state)
    for name, value in state.items():
        if name.endswith("attention.qkv.weight"):
            value[:64] *= factor
        elif name.endswith(("attention.q.weight", "content_bias", "position_bias")):
            value *= factor
    return state


@pytest.mark.parametrize(
    "keys",
    [
        *({"attention": {"backend": backend}} for backend in ("reference", "sdpa")),
        *({"attention": {"kind": "windowed", "window": 4, "backend": b}} for b in ("reference", "blocked")),
        *({"attention": {"kind": "sparse", "sparse": {"stride": 3}, "backend": b}} for b in ("reference", "gather")),
        {"attention": {"kind": "linear", "linear": {"conv": 0}}},
        *({"arch": "transformer-xl", "memory": 8, "attention": {"backend": b}} for b in ("reference", "sdpa")),
    ],
    ids=str,
)
def test_the_scale_of_attention_holds_for_every_kernel(keys: dict[str, Any], make_batch: MakeBatch) -> None:
    """Scores times sqrt(base_head_dim) / head_dim = (1 / 4) / sqrt(16) x 2: as with queries half as long."""
    ours = drawn(config_of(**keys, mup=True, base_dim=64, base_head_dim=4, init_std=0.3), torch.float64)
    standard = drawn(config_of(**keys, init_std=0.3), torch.float64)
    batch = make_batch(length=16)
    as_drawn = standard(batch)[0].hidden
    standard.load_state_dict(with_longer_queries(ours.state_dict(), 0.5))
    got, want = ours(batch)[0].hidden, standard(batch)[0].hidden
    assert "linear" in str(keys) or not torch.allclose(got, as_drawn, rtol=1e-3)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("head_dim", "base_head_dim", "scale"),
    [(16, None, None), (16, 16, None), (16, 64, 0.5), (64, 16, 4 / 64), (32, 64, 8 / 32)],
)
def test_attention_scale_of_the_config(head_dim: int, base_head_dim: int | None, scale: float | None) -> None:
    config = config_of(dim=128, heads=128 // head_dim, mup=True, base_head_dim=base_head_dim)
    assert config.model.attention_scale == scale  # type: ignore[attr-defined]


def test_base_keys_without_mup_are_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(base_dim=32, base_head_dim=8)
    assert {problem.key for problem in caught.value.problems} == {"model.base_dim", "model.base_head_dim"}
    assert "has no effect without model.mup" in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.base_dim: .*at least 1"):
        config_of(mup=True, base_dim=0)
    again = load_config(config_of().model_dump(mode="json"))
    assert again.model.width_ratio == 1.0  # type: ignore[attr-defined]


def test_the_keys_of_another_width() -> None:
    model = config_of(dim=128, heads=8, kv_heads=4, ffn_dim=300, moe={"experts": 2, "ffn_dim": 80}).model
    at_width: Callable[[int], dict[str, int]] = model.at_width  # type: ignore[attr-defined]
    assert at_width(64) == {"dim": 64, "heads": 4, "kv_heads": 2, "ffn_dim": 150, "moe.ffn_dim": 40}
    assert at_width(128) == {"dim": 128, "heads": 8, "kv_heads": 4, "ffn_dim": 300, "moe.ffn_dim": 80}
    with pytest.raises(ConfigError, match="multiple of the width of a head, 16"):
        at_width(40)
    with pytest.raises(ConfigError, match="no whole number of key/value heads"):
        at_width(48)


def test_weights_of_another_parametrisation_are_refused(tmp_path: Path) -> None:
    standard, path = GlowFlowModel(config_of()), tmp_path / "standard.pt"
    standard.save(path)
    ours = GlowFlowModel(config_of(mup=True, base_dim=16))
    with pytest.raises(CheckpointError, match=r"are from under the standard parametrisation.*model\.base_dim 16"):
        ours.load_weights(path)
    assert not ours.touched
    mup_path = tmp_path / "mup.pt"
    ours.save(mup_path)
    others: list[dict[str, Any]] = [
        {},
        {"mup": True, "base_dim": 32},
        {"mup": True, "base_dim": 16, "base_head_dim": 4},
    ]
    for keys in others:
        with pytest.raises(CheckpointError, match=r"model\.base_dim 16, this model is under"):
            GlowFlowModel(config_of(**keys)).load_weights(mup_path)
    again = GlowFlowModel(config_of(mup=True, base_dim=16, base_head_dim=16))
    again.load_weights(mup_path)
    assert torch.equal(again.module.state_dict()["embedding.weight"], ours.module.state_dict()["embedding.weight"])
    GlowFlowModel(config_of(mup=True, base_dim=64)).load_weights(path)  # where both are the same
    with pytest.raises(CheckpointError, match="must have the shape"):
        GlowFlowModel(config_of(mup=True, dim=32)).load_weights(path)


def test_what_nobody_has_checked_is_said() -> None:
    def told(optimizer: str = "adamw", **model: Any) -> str:
        return "\n".join(
            text for text in warnings(config_of(optimizer, mup=True, **model)) if "base" in text or "mup" in text
        )

    assert told() == "" and told("muon") == "" and told(**KINDS["gated"], moe={"experts": 2}) == ""
    assert "how far the others transfer is not known" in told("sophia-g")
    assert "muon and model.moe and linear attention is not tested" in told(
        "muon", **KINDS["linear"], moe={"experts": 2}
    )
    assert "cannot check the scale of attention" in told(base_head_dim=4)
    assert not [text for text in warnings(config_of("sophia-g")) if "mup" in text]
