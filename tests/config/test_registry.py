"""Names, lazy paths and entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from glowflow.config import registry as registry_module
from glowflow.config.architectures import TransformerConfig
from glowflow.config.base import StrictModel
from glowflow.config.errors import ConfigError
from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS, Registry, load_object


class PluginConfig(StrictModel):
    """Keys of the plug-in below."""


class Plugin:
    """Stands for a class in somebody's package."""

    config_class = PluginConfig


def test_built_in_names() -> None:
    assert "transformer" in ARCHITECTURES.names()
    assert "adamw" in OPTIMIZERS.names()
    entry = ARCHITECTURES.get("transformer")
    assert entry is not None and entry.builtin and entry.schema() is TransformerConfig
    assert ARCHITECTURES.get("nothing") is None


def test_every_registered_target_exists_and_carries_its_schema() -> None:
    for entry in ARCHITECTURES.entries(builtin_only=True):
        assert entry.target().config_class is entry.schema()
    for entry in OPTIMIZERS.entries(builtin_only=True):
        assert callable(entry.target())


def test_entry_points_add_names_but_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("plugin", f"{__name__}:Plugin", "some.group"),
        EntryPoint("mine", f"{__name__}:Plugin", "some.group"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == "some.group" else [])
    registry = Registry("thing", "some.group")
    registry.register("mine", schema="glowflow.config.base:StrictModel", target="glowflow.config.base:StrictModel")
    assert registry.names() == ["mine", "plugin"]
    plugin, mine = registry.get("plugin"), registry.get("mine")
    assert plugin is not None and plugin.target() is Plugin and plugin.schema() is PluginConfig
    assert mine is not None and mine.target() is StrictModel
    assert [entry.name for entry in registry.entries(builtin_only=True)] == ["mine"]


def test_a_name_is_registered_once() -> None:
    registry = Registry("thing", "no.group")
    registry.register("a", schema="m:S", target="m:T")
    registry.register("a", schema="m:S", target="m:T")
    with pytest.raises(ValueError, match="already registered"):
        registry.register("a", schema="m:S", target="m:Other")


@pytest.mark.parametrize("path", ["no_such_module_here:X", "os:no_such_name", "os", ":x", ""])
def test_load_object_reports_what_cannot_be_imported(path: str) -> None:
    with pytest.raises(ConfigError, match=r"the\.key: cannot be imported"):
        load_object(path, key="the.key")
