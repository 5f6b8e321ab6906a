"""The coordinate check: it passes where it must, and notices every part of the parametrisation that is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import InitSpec, ParameterRole
from glowflow.core.architectures.decoder import Decoder
from glowflow.core.layers.head import OutputHead
from glowflow.training.coordinates import LIMIT, LR, CoordinateCheck, coordinate_check, default_widths

WIDE, NARROW = (64, 128, 256, 512), (64, 128, 256)


def config_of(optimizer: str = "adamw", **model: Any) -> GlowFlowConfig:
    section = {"dim": 64, "heads": 4, "depth": 2, **model}
    return load_config({"model": section, "training": {"optimizer": optimizer}})


def slopes(check: CoordinateCheck) -> dict[str, float]:
    return {place: round(check.slope(place), 3) for place in check.changes}


def steepest(check: CoordinateCheck) -> float:
    return max(abs(slope) for slope in slopes(check).values())


def test_changes_do_not_depend_on_the_width_and_do_without() -> None:
    config = config_of()
    ours = coordinate_check(config, WIDE)
    assert ours.ok and steepest(ours) <= LIMIT, slopes(ours)
    parts = [f"block {block} {part}" for block in (1, 2) for part in ("attention", "feed-forward", "residual")]
    assert list(ours.changes) == ["embedding", *parts, "logits"]
    initial = {place: ours.size_slope(place, 0) for place in ours.sizes}
    assert all(abs(slope) <= LIMIT for slope in initial.values()), initial
    standard = coordinate_check(config, NARROW, mup=False, seeds=1)
    assert not standard.ok and "block 1 feed-forward" in standard.failures
    assert standard.slope("block 1 feed-forward") > 0.3 and standard.slope("logits") > 0.3


def test_initial_scores_of_an_untied_matrix_shrink_and_are_not_judged() -> None:
    found = coordinate_check(config_of(depth=1, tie_embeddings=False), WIDE, steps=1, seeds=2)
    assert found.size_slope("logits", 0) == pytest.approx(-0.5, abs=0.15)
    assert abs(found.slope("logits")) <= LIMIT


@pytest.mark.parametrize("name", ["lion", "adan", "muon", "sophia-g"])
def test_every_optimizer(name: str) -> None:
    config = config_of(name)
    ours = coordinate_check(config, NARROW if name == "muon" else WIDE, steps=3, seeds=2)
    assert ours.ok, slopes(ours)
    assert steepest(coordinate_check(config, NARROW, mup=False, steps=3, seeds=1)) > 0.3


@pytest.mark.parametrize(
    "keys",
    [
        {"arch": "transformer-xl"},
        {"tie_embeddings": False, "kv_heads": 2, "bias": True, "norm": "layernorm", "ffn": "gelu"},
        {"norm_placement": "post", "qk_norm": True},
        {"norm_placement": "sandwich", "position": "learned"},
        {"parallel_block": True, "position": "alibi"},
        {"moe": {"experts": 4, "shared": 1}},
        {"attention": {"kind": "linear"}},
        {"attention": {"kind": "linear", "linear": {"variant": "feature_map"}}},
        {"attention": {"kind": "linear", "linear": {"variant": "retention"}}},
        {"attention": {"kind": "linear", "linear": {"variant": "gated_delta"}}},
        {"attention": {"kind": "adaptive", "window": 4, "adaptive": {"policy": "gated"}}},
    ],
    ids=str,
)
def test_every_sort_of_layer(keys: dict[str, Any]) -> None:
    ours = coordinate_check(config_of(**keys), WIDE, steps=3, seeds=2)
    assert ours.ok, slopes(ours)


def _rates_of(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder.parameter_role

    def role(self: Decoder, name: str) -> ParameterRole:
        found = original(self, name)
        return replace(found, width_ratio=1.0) if name.endswith(part) else found

    spec = Decoder.init_spec

    def init(self: Decoder, name: str) -> InitSpec:  # as it was, since it reads the roles
        with pytest.MonkeyPatch.context() as whole:
            whole.setattr(Decoder, "parameter_role", original)
            return spec(self, name)

    monkeypatch.setattr(Decoder, "parameter_role", role)
    monkeypatch.setattr(Decoder, "init_spec", init)


def _first_values_of(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder.init_spec

    def init(self: Decoder, name: str) -> InitSpec:
        found = original(self, name)
        return replace(found, std=found.std * self.config.width_ratio**0.5) if name.endswith(part) else found

    monkeypatch.setattr(Decoder, "init_spec", init)


@pytest.mark.parametrize(
    ("part", "what", "place"),
    [
        ("out.weight", _rates_of, "block 1 attention"),
        ("down.weight", _rates_of, "block 2 feed-forward"),
        ("gate_up.weight", _rates_of, "block 1 feed-forward"),
        ("down.weight", _first_values_of, "block 1 feed-forward"),
    ],
)
def test_one_tensor_that_is_not_scaled_is_found(
    part: str, what: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what(part, monkeypatch)
    found = coordinate_check(config_of(), WIDE, steps=3, seeds=2)
    assert place in found.failures, slopes(found)


def test_scores_that_are_not_scaled_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputHead, "_scaled", lambda _, hidden: hidden)
    found = coordinate_check(config_of(), NARROW, steps=1, seeds=1)
    assert "logits" in found.failures, slopes(found)


def test_slopes_of_known_numbers() -> None:
    values = {"flat": [3.0, 3.0, 3.0], "root": [1.0, 2.0**0.5, 2.0], "lost": [1.0, math.nan, 1.0], "dead": [0.0] * 3}
    changes = {place: [[0.0] * 3, row] for place, row in values.items()}
    check = CoordinateCheck(True, "adamw", 0.1, 1, (64, 128, 256), changes, changes)
    assert check.steps == 1
    assert check.slope("flat") == pytest.approx(0.0) and check.slope("root") == pytest.approx(0.5)
    assert math.isnan(check.slope("lost")) and math.isnan(check.slope("dead")) and math.isnan(check.slope("flat", 0))
    assert check.failures == ["root", "lost", "dead"] and not check.ok


def test_it_is_repeatable_and_leaves_the_generator_alone() -> None:
    configs = config_of(depth=1), config_of(depth=1, dropout=0.5, mup=True, base_dim=32)
    before = torch.random.get_rng_state()
    first, second = (coordinate_check(config, (128, 64, 64), steps=1, seeds=1) for config in configs)
    assert first == second and first.widths == (64, 128) and first.lr == LR
    assert torch.equal(torch.random.get_rng_state(), before)


def test_widths_that_do_not_fit_are_told_at_once() -> None:
    config = config_of(dim=96, heads=2)
    with pytest.raises(ConfigError) as caught:
        coordinate_check(config, [64, 96, 100])
    assert [problem.value for problem in caught.value.problems] == [64, 100]
    assert "multiple of the width of a head, 48" in str(caught.value)
    with pytest.raises(ConfigError, match="widths: must be two different ones at least"):
        coordinate_check(config, [96, 96])
    assert default_widths(config) == (96, 192, 384, 768)
    assert default_widths(config_of()) == WIDE
    assert default_widths(config_of(dim=512, heads=8, kv_heads=2)) == (256, 512, 1024, 2048)


def test_an_architecture_that_does_not_know_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_for_mup.py").write_text(
        "from glowflow.core.architectures.base import BaseArchitecture\nclass Model(BaseArchitecture): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config({"model": {"arch": "stranger_for_mup:Model"}})
    for ask in (default_widths, lambda config: coordinate_check(config, WIDE)):
        with pytest.raises(ConfigError, match=r"model\.arch: .*does not know maximal-update"):
            ask(config)
