"""data.layout: what the architecture needs unless it is given; what contradicts the architecture is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError
from glowflow.config.loader import apply_overrides, load_config, to_dict
from glowflow.config.schema import GlowFlowConfig


class Recurrent(ArchitectureConfig):
    """A stranger's architecture that carries something."""

    layout: ClassVar[Any] = "lanes"


def xl(**model: Any) -> dict[str, Any]:
    return {"model": {"arch": "transformer-xl", **model}}


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ({}, "packed"),
        ({"data": {"layout": "lanes"}}, "lanes"),
        (xl(), "lanes"),
        (xl(memory=0), "packed"),
        (xl(memory=0, eval_memory=64), "lanes"),
        ({**xl(), "data": {"layout": "lanes"}}, "lanes"),
        ({**xl(memory=0), "data": {"layout": "lanes"}}, "lanes"),
        ({**xl(memory=0), "data": {"layout": "packed"}}, "packed"),
    ],
)
def test_default_by_architecture(data: dict[str, Any], layout: str) -> None:
    config = load_config(data)
    assert config.layout == layout
    assert config.data.layout == data.get("data", {}).get("layout")
    assert load_config(to_dict(config)).layout == layout


def test_another_architecture_takes_another_layout() -> None:
    config = load_config({})
    assert apply_overrides(config, ["model.arch=transformer-xl"]).layout == "lanes"
    assert GlowFlowConfig(model=Recurrent(arch="my:Model")).layout == "lanes"


@pytest.mark.parametrize("more", [{}, {"memory": 0, "eval_memory": 8}])
def test_packed_with_memory_is_refused_with_the_reason(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**xl(**more), "data": {"layout": "packed"}, "training": {"max_steps": 0}})
    problems = {problem.key: problem for problem in caught.value.problems}
    assert problems.keys() == {"data.layout", "training.max_steps"}
    problem = problems["data.layout"]
    assert "carries memory" in problem.rule and "model.memory=0" in problem.hint
    with pytest.raises(ValidationError, match="carries memory"):
        GlowFlowConfig(model=Recurrent(arch="my:Model"), data={"layout": "packed"})


@pytest.mark.parametrize(
    ("attention", "key"),
    [({"kind": "linear"}, "model.attention.kind"), ({"backend": "flex"}, "model.attention.backend")],
)
def test_transformer_xl_is_dense_with_kernels_that_know_distances(attention: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(xl(attention=attention))
    assert [problem.key for problem in caught.value.problems] == [key]
