"""Proxies: which narrow model stands for which wide one, and what no search on it can answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glowflow.config.errors import Problem
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import load_space
from glowflow.config.spaces.proxy import Proxy, make_proxy, transfer_doubts, transfer_rules
from tests.config.test_space import LR, of, write

WIDE: dict[str, Any] = {"model": {"mup": True, "base_dim": 64, "dim": 512, "heads": 16, "depth": 3}}


def wide(**model: Any) -> GlowFlowConfig:
    return load_config({"model": {**WIDE["model"], **model}})


def proxy(config: GlowFlowConfig, text: str) -> Proxy:
    found, problems = make_proxy(config, text)
    assert found is not None and not problems, problems
    return found


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({}, {"model.dim": 128, "model.heads": 4}),
        ({"kv_heads": 4}, {"model.dim": 128, "model.heads": 4, "model.kv_heads": 1}),
        ({"ffn_dim": 1376}, {"model.dim": 128, "model.heads": 4, "model.ffn_dim": 344}),
        (
            {"moe": {"experts": 4, "ffn_dim": 512}},
            {"model.dim": 128, "model.heads": 4, "model.moe.ffn_dim": 128},
        ),
        ({"arch": "transformer-xl"}, {"model.dim": 128, "model.heads": 4}),
    ],
)
def test_the_proxy_is_the_same_model_but_for_its_width(model: dict[str, Any], changes: dict[str, Any]) -> None:
    config = wide(**model)
    found = proxy(config, "width=128")
    assert (found.width, found.full_width, found.changes) == (128, 512, changes)
    narrow = apply_overrides(config, found.changes)
    assert narrow.model.head_dim == config.model.head_dim == 32  # type: ignore[attr-defined]
    assert narrow.model.base_dim == config.model.base_dim == 64  # type: ignore[attr-defined]
    assert apply_overrides(narrow, found.full) == config, "and the way back"
    assert Proxy.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert str(found) == "found at width 128, for width 512"


@pytest.mark.parametrize(
    ("text", "model", "problems"),
    [
        ("width=100", {}, {"--proxy width": "must be a multiple of the width of a head, 32"}),
        ("width=512", {}, {"--proxy width": "must be less than model.dim, which is 512"}),
        ("width=1024", {}, {"--proxy width": "must be less than model.dim"}),
        ("width=0", {}, {"--proxy width": "a whole number of at least 1"}),
        ("width=12.5", {}, {"--proxy width": "a whole number of at least 1"}),
        ("width=128,width=64", {}, {"--proxy width": "is given twice"}),
        ("width=64", {"kv_heads": 4}, {"--proxy width": "no whole number of key/value heads"}),
        ("128", {}, {"--proxy": "must look like width=128"}),
        ("width=128,", {}, {"--proxy": "must look like width=128"}),
        ("", {}, {"--proxy": "must look like width=128"}),
        ("widht=128", {}, {"--proxy widht": "did you mean 'width'"}),
        ("width=128,depth=2", {}, {"--proxy depth": "by experience only"}),
        ("width=128,max_steps=100", {}, {"--proxy max_steps": "too high a rate looks best"}),
        ("width=128,batch_size=4", {}, {"--proxy batch_size": "by experience only"}),
        ("heads=2", {}, {"--proxy heads": "follows from the width"}),
        ("width=128", {"mup": False, "base_dim": 128}, {"model.mup": "each width has a best learning rate of its own"}),
        (
            "width=100,steps=3,colour=red",
            {"mup": False, "base_dim": 128},
            {
                "--proxy width": "multiple of the width of a head",
                "--proxy steps": "too high a rate",
                "--proxy colour": "known: width",
                "model.mup": "nothing transfers",
            },
        ),
    ],
)
def test_proxies_that_are_none(text: str, model: dict[str, Any], problems: dict[str, str]) -> None:
    found, wrong = make_proxy(wide(**model), text)
    assert found is None
    by_key = {problem.key: str(problem) for problem in wrong}
    assert by_key.keys() == problems.keys() and len(wrong) == len(problems)
    for key, words in problems.items():
        assert words in by_key[key]


def test_an_architecture_of_its_own_has_no_proxy(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from glowflow.config.architectures import ArchitectureConfig\n"
    text += "class Mine: config_class = ArchitectureConfig\n"
    write(tmp_path, text, "own_architecture.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config({"model": {"arch": "own_architecture:Mine"}})
    found, (problem,) = make_proxy(config, "width=128")
    assert found is None and problem.key == "model.arch"


# --- what may be searched ------------------------------------------------------------------------------------------


def refused(raw: Any) -> dict[str, Problem]:
    found = list(transfer_rules(load_space(raw)))
    assert len({problem.key for problem in found}) == len(found)
    return {problem.key: problem for problem in found}


@pytest.mark.parametrize(
    "dimensions",
    [
        LR,
        {"training.min_lr": {"choice": [0.0, 1e-5]}, "training.warmup_steps": {"choice": [0, 10]}},
        {"training.schedule": {"choice": ["wsd"]}, "training.decay_fraction": {"uniform": [0.1, 0.2]}},
        {"training.optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.99]]}, "training.grad_clip": {"choice": [1.0]}},
        {"training.optimizer": {"choice": ["adamw", "lion", "muon"]}, "model.init_std": {"loguniform": [0.01, 0.1]}},
        {"training.optimizer.momentum": {"choice": [0.9, 0.95]}},
        {"training": {"choice": [{"lr": 1e-3, "warmup_steps": 5}, {"lr": 2e-3, "warmup_steps": 10}]}},
    ],
)
def test_what_transfers_may_be_searched(dimensions: dict[str, Any]) -> None:
    assert refused(of(dimensions)) == {}
    assert list(transfer_doubts(load_space(of(dimensions)))) == []


@pytest.mark.parametrize(
    ("key", "values", "reason"),
    [
        ("model.dim", [64, 128], "is a size"),
        ("model.heads", [2, 4], "is a size"),
        ("model.kv_heads", [1, 2], "is a size"),
        ("model.ffn_dim", [64, 128], "is a size"),
        ("model.moe.experts", [2, 4], "is a size"),
        ("model.depth", [2, 4], "is the depth"),
        ("model.dropout", [0.0, 0.1], "regularises"),
        ("training.optimizer.weight_decay", [0.0, 0.1], "regularises"),
        ("model.mup", [True, False], "decides how everything else transfers"),
        ("model.qk_norm", [True, False], "another model"),
        ("model.arch", ["transformer", "transformer-xl"], "another model"),
        ("model.attention.window", [8, 16], "another model"),
        ("data.context", [32, 64], "length of the sequences"),
        ("data.dataset", ["a", "b"], "about the data"),
        ("training.batch_size", [8, 16], "a batch size"),
        ("training.optimizer.hessian_batch_size", [8, 16], "a batch size"),
        ("training.max_steps", [10, 20], "length of the training"),
        ("training.precision", ["fp32", "bf16"], "not among what is known"),
        ("resources.workers", [1, 2], "not among what is known"),
    ],
)
def test_what_does_not_transfer_is_refused_by_name(key: str, values: list[Any], reason: str) -> None:
    for raw, where in (
        (of({key: {"choice": values}}), f"space.{key}"),
        ({"variants": {"a": {key: values[0]}}}, f"variants.a.{key}"),
    ):
        ((place, problem),) = refused(raw).items()
        assert place == where and key in problem.rule and reason in problem.rule and "one value" in problem.hint


def test_a_section_is_judged_by_its_keys(tmp_path: Any) -> None:
    section = {"training.optimizer": {"choice": [{"name": "lion", "weight_decay": 1.0}, "adamw"]}}
    assert set(refused(of(section))) == {"space.training.optimizer"}
    program = "SPACE = {'trials': 2}\ndef space(draw): return {'model.depth': draw.randint('model.depth', 1, 2)}\n"
    assert set(refused(write(tmp_path, program, "mine.py"))) == {"space.model.depth"}


def test_what_all_trials_have_may_be_anything_but_the_width_and_its_rules() -> None:
    fixed = {"training.max_steps": 20, "model.depth": 2, "data.context": 32, "training.optimizer.weight_decay": 0.0}
    assert refused(of(LR, set=fixed)) == {}
    found = refused(of(LR, set={"model": {"dim": 64, "moe": {"experts": 2}}, "model.base_dim": 32}))
    assert set(found) == {"set.model.dim", "set.model.moe.experts", "set.model.base_dim"}


def test_a_population_is_refused() -> None:
    assert set(refused(of(LR, scheduler="pbt"))) == {"scheduler"}


def test_what_is_compared_with_gradients_is_doubted() -> None:
    dimensions = {f"training.optimizer.{key}": {"choice": [1e-8, 1e-6]} for key in ("eps", "rho", "gamma")}
    assert refused(of(dimensions)) == {}
    assert len(list(transfer_doubts(load_space(of(dimensions))))) == 3
