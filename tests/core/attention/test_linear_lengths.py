"""`by_length`: dense up to a recorded length, windowed above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.architectures import TransformerConfig
from glowflow.config.errors import ConfigError
from glowflow.core.attention.build import build_attention, layer_specs
from glowflow.core.attention.cache import FullKV, RingKV
from glowflow.core.attention.layer import SelfAttention
from glowflow.core.attention.lengths import SHIPPED, dense_up_to


def layer(**adaptive: Any) -> SelfAttention:
    attention = {"kind": "adaptive", "adaptive": {"policy": "by_length", **adaptive}, "window": 8}
    module = build_attention(TransformerConfig(dim=16, heads=4, vocab_size=7, attention=attention), 0)
    assert isinstance(module, SelfAttention)
    return module


def write(tmp_path: Path, content: str) -> str:
    path = tmp_path / "lengths.json"
    path.write_text(content)
    return str(path)


def test_the_kind_changes_at_the_length_and_so_does_the_cache() -> None:
    module = layer(dense_up_to=20)
    assert module.spec_at(20).kind == "dense" and module.spec_at(21).kind == "windowed"
    assert module.spec_at(21).window == 8
    assert isinstance(module.new_cache(1, 20, "cpu", torch.float32), FullKV)
    assert isinstance(module.new_cache(1, 21, "cpu", torch.float32), RingKV)


def test_both_specs_are_planned_for() -> None:
    attention = {"kind": "adaptive", "adaptive": {"policy": "by_length", "dense_up_to": 9}, "window": 8}
    config = TransformerConfig(dim=16, heads=4, vocab_size=7, attention=attention)
    assert [spec.kind for spec in layer_specs(config)] == ["dense", "windowed"]


def test_other_kinds_never_change() -> None:
    module = build_attention(TransformerConfig(dim=16, heads=4, vocab_size=7), 0)
    assert isinstance(module, SelfAttention) and module.spec_at(1 << 20).kind == "dense"


def test_the_shipped_file_names_a_measured_length() -> None:
    content = json.loads(SHIPPED.read_text())
    assert layer().dense_up_to == max(content["dense_up_to"].values()) > 0


def test_another_file_and_the_largest_of_its_devices(tmp_path: Path) -> None:
    path = write(tmp_path, '{"benchmark": "attention", "dense_up_to": {"cpu": 512, "cuda": 4096}}')
    assert layer(benchmark=path).dense_up_to == 4096


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"dense_up_to": {}}', '{"dense_up_to": {"cpu": 0}}', '{"dense_up_to": {"cpu": true}}']
)
def test_a_file_without_a_length_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention\.adaptive\.benchmark"):
        dense_up_to(write(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        dense_up_to(str(tmp_path / "none.json"))
