"""Names that YAML may use, each with the schema of its keys and the place where its code lives.

The schema is imported when a config is checked; the code (which needs torch) only when it is built. A third
party adds names through the entry-point groups ``glowflow.architectures`` and ``glowflow.optimizers``.
"""

from __future__ import annotations

import importlib
import operator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from glowflow.config.errors import ConfigError, Problem

__all__ = ["ARCHITECTURES", "OPTIMIZERS", "Entry", "Registry", "load_object"]


def load_object(path: str, key: str = "model.arch") -> Any:
    """Import ``package.module:attribute`` (the attribute may be dotted).

    Args:
        path: where the object lives.
        key: the config key to name when that fails.

    Raises:
        ConfigError: the module or the attribute does not exist, or importing the module fails.
    """
    module_name, _, attribute = path.partition(":")
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module_name))
    except Exception as error:  # a module of the user's own may raise anything while it is imported
        rule = f"cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(Problem(key, rule, path)) from error


@dataclass(frozen=True)
class Entry:
    """One registered name: where its pydantic schema and its implementation live (``module:attribute``)."""

    name: str
    schema_path: str
    target_path: str

    def schema(self) -> Any:
        """The pydantic class of the keys."""
        return load_object(self.schema_path)

    def target(self) -> Any:
        """The implementation; importing it may need torch."""
        return load_object(self.target_path)

    @property
    def builtin(self) -> bool:
        """Whether the name comes with GlowFlow rather than through an entry point."""
        return self.target_path.startswith("glowflow.")


class Registry:
    """A mapping from the names of one kind of component to their entries."""

    def __init__(self, kind: str, entry_point_group: str) -> None:
        self.kind = kind
        self._group = entry_point_group
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def register(self, name: str, *, schema: str, target: str) -> None:
        """Add a name; ``schema`` and ``target`` are lazy ``module:attribute`` paths.

        Raises:
            ValueError: the name is taken by something else.
        """
        entry = Entry(name, schema, target)
        if self._entries.get(name, entry) != entry:
            raise ValueError(f"{self.kind} {name!r} is already registered as {self._entries[name].target_path}")
        self._entries[name] = entry

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> Entry | None:
        """The entry of a name, or None."""
        self._discover()
        return self._entries.get(name)

    def entries(self, *, builtin_only: bool = False) -> list[Entry]:
        """All entries by name; ``builtin_only`` leaves out what other packages added (generated docs)."""
        self._discover()
        return [entry for _, entry in sorted(self._entries.items()) if entry.builtin or not builtin_only]

    def _discover(self) -> None:
        """Entry points name a class that carries its own ``config_class``; they never replace a built-in name."""
        if self._discovered:
            return
        self._discovered = True
        for point in entry_points(group=self._group):
            module, _, attribute = point.value.partition(":")
            self._entries.setdefault(point.name, Entry(point.name, f"{module}:{attribute}.config_class", point.value))


ARCHITECTURES = Registry("architecture", "glowflow.architectures")
ARCHITECTURES.register(
    "transformer",
    schema="glowflow.config.architectures:TransformerConfig",
    target="glowflow.core.architectures.transformer:Transformer",
)
ARCHITECTURES.register(
    "transformer-xl",
    schema="glowflow.config.architectures:TransformerXLConfig",
    target="glowflow.core.architectures.transformer_xl:TransformerXL",
)
ARCHITECTURES.register(
    "multimodal",
    schema="glowflow.config.multimodal:MultimodalConfig",
    target="glowflow.core.architectures.multimodal:Multimodal",
)

OPTIMIZERS = Registry("optimizer", "glowflow.optimizers")
OPTIMIZERS.register(
    "adamw", schema="glowflow.config.optimizers:AdamWConfig", target="glowflow.core.optim.adamw:build_adamw"
)
OPTIMIZERS.register(
    "lion", schema="glowflow.config.optimizers:LionConfig", target="glowflow.core.optim.lion:build_lion"
)
OPTIMIZERS.register(
    "adan", schema="glowflow.config.optimizers:AdanConfig", target="glowflow.core.optim.adan:build_adan"
)
OPTIMIZERS.register(
    "muon", schema="glowflow.config.optimizers:MuonConfig", target="glowflow.core.optim.muon:build_muon"
)
OPTIMIZERS.register(
    "sophia-g", schema="glowflow.config.optimizers:SophiaGConfig", target="glowflow.core.optim.sophia:build_sophia_g"
)
OPTIMIZERS.register(
    "sophia-h", schema="glowflow.config.optimizers:SophiaHConfig", target="glowflow.core.optim.sophia:build_sophia_h"
)
