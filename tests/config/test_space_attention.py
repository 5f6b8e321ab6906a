"""tune_spaces/attention.yaml: what each variant is, and that a variant may be another architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import ConfigError
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space, check_space, load_space

CHARACTERS = 65  # of tiny Shakespeare


@pytest.fixture(scope="module")
def config(repository: Path) -> GlowFlowConfig:
    return load_config(repository / "configs" / "shakespeare_char.yaml")


@pytest.fixture(scope="module")
def table(repository: Path) -> Space:
    return load_space(repository / "tune_spaces" / "attention.yaml")


def of(table: Space, config: GlowFlowConfig, label: str) -> GlowFlowConfig:
    return apply_overrides(config, {**table.fixed, **table.variants[label], "model.vocab_size": CHARACTERS})


def test_the_table_compares_the_whole_validation_part_over_three_seeds(table: Space, config: GlowFlowConfig) -> None:
    assert table.seed_values(0) == (0, 1, 2) and table.metrics == ("val_loss",)
    assert of(table, config, "dense").training.val_batches is None
    assert of(table, config, "dense").training.max_steps == config.training.max_steps == 2000


def test_what_the_variants_are(table: Space, config: GlowFlowConfig) -> None:
    kinds = {
        label: [model.attention.layer_kind(layer) for layer in range(model.depth)]
        for label in table.variants
        if (model := of(table, config, label).model)
    }
    assert kinds == {
        "dense": ["dense"] * 4,
        "windowed": ["windowed"] * 4,
        "linear": ["linear"] * 4,
        "sparse": ["sparse"] * 4,
        "hybrid": ["linear", "linear", "linear", "dense"],
        "transformer-xl": ["dense"] * 4,
    }
    assert of(table, config, "windowed").model.attention.window == 32
    assert of(table, config, "linear").model.attention.linear.conv == 4
    sparse = of(table, config, "sparse").model.attention.sparse
    assert (sparse.pattern, sparse.local, sparse.stride) == ("strided", 16, 8)


def test_a_variant_may_be_another_architecture_with_its_own_keys(table: Space, config: GlowFlowConfig) -> None:
    recurrent = of(table, config, "transformer-xl")
    assert recurrent.model.arch == "transformer-xl" and recurrent.model.memory == 64
    assert recurrent.layout == "lanes" and of(table, config, "dense").layout == "packed"
    assert recurrent.model.ffn_dim == config.model.ffn_dim  # what both know stays as it was


@pytest.mark.parametrize(
    ("point", "key", "rule"),
    [
        ({"model.memory": 64}, "variants.new.model.memory", "is not a known key"),
        ({"model.arch": "transformer-xl", "model.rope_theta": 100}, "variants.new.model.rope_theta", "not a known key"),
        ({"model.arch": "tranformer"}, "variants.new.model.arch", "tranformer"),
    ],
)
def test_keys_that_the_architecture_of_a_variant_does_not_know_are_refused(
    point: dict[str, Any], key: str, rule: str, config: GlowFlowConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_space(load_space({"variants": {"old": {}, "new": point}}), config)
    (problem,) = caught.value.problems
    assert problem.key == key and rule in str(problem)


def test_the_variants_cost_about_as_many_parameters(table: Space, config: GlowFlowConfig) -> None:
    from glowflow.core.model import build_module

    sizes = {label: build_module(of(table, config, label), "meta").num_parameters() for label in table.variants}
    own = sizes["dense"]
    assert all(sizes[label] == own for label in ("windowed", "sparse"))
    assert sizes["linear"] == pytest.approx(own, rel=0.03) and sizes["hybrid"] == pytest.approx(own, rel=0.03)
    assert own < sizes["transformer-xl"] <= 1.1 * own  # a projection of the distances in each layer
