"""The JSON Schema of the experiment file, so that editors complete and check it.

pydantic writes the schema of the fixed sections; ``model`` and ``training.optimizer`` become a choice between the
registered names, each with its own keys. Written by ``glowflow config schema`` and ``make docs``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS, Registry
from glowflow.config.schema import GlowFlowConfig

__all__ = ["json_schema", "write_json_schema"]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(*, builtin_only: bool = False) -> dict[str, Any]:
    """The schema as a plain mapping.

    Args:
        builtin_only: leave out architectures and optimisers that other installed packages have registered.
    """
    schemas = [entry.schema() for r in (ARCHITECTURES, OPTIMIZERS) for entry in r.entries(builtin_only=builtin_only)]
    _, result = models_json_schema([(schema, "validation") for schema in [GlowFlowConfig, *schemas]])
    definitions = result["$defs"]
    root = definitions.pop("GlowFlowConfig")
    custom = {
        "title": "Custom architecture",
        "type": "object",
        "properties": {"arch": {"type": "string", "pattern": ":", "description": "`module:Class`"}},
        "required": ["arch"],
    }
    _choose(root, "model", [*_choices(ARCHITECTURES, "arch", definitions, builtin_only), custom])
    names = [entry.name for entry in OPTIMIZERS.entries(builtin_only=builtin_only)]
    optimizers = _choices(OPTIMIZERS, "name", definitions, builtin_only)
    _choose(definitions["TrainingConfig"], "optimizer", [{"enum": names}, *optimizers])
    for base in ("ArchitectureConfig", "OptimizerConfig"):
        definitions.pop(base, None)
    return {"$schema": _DRAFT, "title": "GlowFlow experiment", **_without_title(root), "$defs": definitions}


def _choose(schema: dict[str, Any], key: str, options: list[dict[str, Any]]) -> None:
    """Replace one property by a choice, keeping its description."""
    schema["properties"][key] = {"description": schema["properties"][key]["description"], "anyOf": options}


def _choices(
    registry: Registry, selector: str, definitions: dict[str, Any], builtin_only: bool
) -> list[dict[str, str]]:
    """A reference per registered name; the definition behind it admits that name only."""
    references = []
    for entry in registry.entries(builtin_only=builtin_only):
        title = entry.schema().__name__
        definition = definitions[title]
        definition["properties"][selector] = {"const": entry.name, "default": entry.name}
        references.append({"$ref": f"#/$defs/{title}"})
    return references


def _without_title(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}


def write_json_schema(path: str | Path, *, builtin_only: bool = False) -> None:
    """Write the schema to a file."""
    text = json.dumps(json_schema(builtin_only=builtin_only), indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_json_schema(sys.argv[1], builtin_only=True)
