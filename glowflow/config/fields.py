"""Walks the schemas: every dotted key with its type, default and description.

One walk serves the did-you-mean on unknown keys, the generated reference page and the tests.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from glowflow.config.errors import ConfigError, RuleError
from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS, Registry
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.selection import architecture_schema, optimizer_schema

__all__ = ["Key", "describe_type", "known_keys", "nested_model", "siblings_of", "suggest", "walk"]

# What other projects call our keys.
_SYNONYMS = {
    "block_size": "context",
    "d_model": "dim",
    "gradient_clip": "grad_clip",
    "hidden_size": "dim",
    "learning_rate": "lr",
    "max_seq_len": "context",
    "n_embd": "dim",
    "n_head": "heads",
    "n_layer": "depth",
    "num_heads": "heads",
    "num_layers": "depth",
    "num_workers": "workers",
    "seq_len": "context",
    "steps": "max_steps",
}


@dataclass(frozen=True)
class Key:
    """One key of the experiment file, ready to print."""

    name: str
    type: str
    default: str
    description: str


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key below a schema, depth first; keys of a nested section follow the section's own key.

    The entries of a list of mappings are written `data.sources[].weight`. The two sections whose schema depends on
    a name (``model``, ``training.optimizer``) are not entered.
    """
    for name, info in schema.model_fields.items():
        dotted = f"{prefix}{name}"
        yield Key(dotted, describe_type(info.annotation) + _bounds(info), _default(info), info.description or "")
        nested, many = nested_model(info.annotation), typing.get_origin(info.annotation) is list
        if nested is not None and dotted not in ("model", "training.optimizer"):
            yield from walk(nested, f"{dotted}[]." if many else f"{dotted}.")


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The schema behind an annotation that is a section (or null), or a list of sections, else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, list):
        return nested_model(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        sections = [nested_model(member) for member in typing.get_args(annotation) if member is not type(None)]
        return sections[0] if len(sections) == 1 else None
    return None


def describe_type(annotation: Any) -> str:
    """A type in the words of YAML: `integer`, `number or null`, `"a" | "b"`, ..."""
    if annotation is type(None):
        return "null"
    simple = {int: "integer", float: "number", bool: "true or false", str: "text"}
    if annotation in simple:
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {len(arguments)} {describe_type(arguments[0])}s"
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    return "mapping" if origin is dict else "any"


def _bounds(info: FieldInfo) -> str:
    """The range that a number must lie in, as in `, > 0`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [(sign, getattr(item, name, None)) for item in info.metadata for name, sign in signs.items()]
    return "".join(f", {sign} {bound:g}" for sign, bound in bounds if bound is not None)


def _default(info: FieldInfo) -> str:
    if info.default is not PydanticUndefined:
        return _plain(info.default)
    if info.default_factory is None:
        return "required"
    made = info.default_factory()  # type: ignore[call-arg]  # none of ours takes the validated data
    if isinstance(made, BaseModel):
        return "see below"
    if isinstance(made, dict) and made:
        return _plain(next(iter(made.values())))
    return _plain(made)


def _plain(value: Any) -> str:
    """A default the way one would type it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return "{}" if value == {} else str(value)


def known_keys(data: dict[str, Any] | None = None) -> list[str]:
    """All dotted keys that a config may use.

    Args:
        data: the user's mapping; where it selects a usable architecture or optimiser, only that one's keys count,
            otherwise the keys of all registered ones.
    """
    data = data or {}
    keys = [key.name for key in walk(GlowFlowConfig)]
    for schema in _selected(data, "model"):
        keys += [key.name for key in walk(schema, "model.")]
    for schema in _selected(data, "training.optimizer"):
        keys += [key.name for key in walk(schema, "training.optimizer.")]
    return sorted(set(keys))


def _selected(data: dict[str, Any], section: Literal["model", "training.optimizer"]) -> list[type[BaseModel]]:
    """The schema that the data selects for a section, or those of all registered names."""
    registry: Registry
    try:
        if section == "model":
            registry = ARCHITECTURES
            return [architecture_schema(data["model"].get("arch", "transformer"))]
        registry = OPTIMIZERS
        value = data["training"]["optimizer"]
        return [optimizer_schema(value if isinstance(value, str) else value.get("name", "adamw"))]
    except (KeyError, TypeError, AttributeError, RuleError, ConfigError):
        return [entry.schema() for entry in registry.entries(builtin_only=True)]


def suggest(key: str, candidates: list[str]) -> str:
    """The known key that an unknown one most likely means, or an empty string.

    A slip inside the right section comes first (`model.dept`), then the right name in a wrong section or in none
    (`lr`, `model.lr`), then, where there is no such section, anything that looks alike as a whole (`trainng.lr`).
    """
    indices = re.findall(r"\.(\d+)(?=\.)", key)
    generic = re.sub(r"\.\d+(?=\.)", "[]", key)
    leaf = generic.rpartition(".")[2]
    leaf = _SYNONYMS.get(leaf, leaf)
    siblings = {c.rpartition(".")[2]: c for c in siblings_of(generic, candidates)}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)
    same_leaf = [c for c in candidates if c.rpartition(".")[2] == leaf]
    if close:
        found = siblings[close[0]]
    elif same_leaf:
        found = min(same_leaf, key=lambda c: (_levels(c, generic), -_likeness(generic, c), c))
    else:
        # In a section that exists, keys look alike as wholes for its name's sake: `training.optimizer.rho` is no `eps`.
        found = "" if siblings else next(iter(difflib.get_close_matches(generic, candidates, n=1, cutoff=0.8)), "")
    for index in indices:
        found = found.replace("[]", f".{index}", 1)
    return found


def _levels(candidate: str, key: str) -> int:
    """How deep a candidate lies, where the key says nothing of it: `n_layer` is the model's, not one of its parts'."""
    return 0 if "." in key else candidate.count(".")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def siblings_of(key: str, candidates: list[str]) -> list[str]:
    """The known keys of the section in which a key stands."""
    parent = re.sub(r"\.\d+(?=\.)", "[]", key).rpartition(".")[0]
    return [candidate for candidate in candidates if candidate.rpartition(".")[0] == parent]
