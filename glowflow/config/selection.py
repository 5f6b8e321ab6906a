"""Chooses the schema that a name selects: ``model.arch`` and ``training.optimizer``.

Problems are raised as ``RuleError`` or pydantic's own error inside a validator, so that they are reported together
with all others of the file.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError, Problem, RuleError
from glowflow.config.optimizers import OptimizerConfig
from glowflow.config.registry import ARCHITECTURES, OPTIMIZERS, Registry, load_object

__all__ = ["architecture_schema", "optimizer_schema", "select_architecture", "select_optimizer"]

logger = logging.getLogger(__name__)

_announced: set[str] = set()


def select_architecture(value: Any) -> Any:
    """Turn the mapping under ``model:`` into the config of the architecture that ``arch`` names."""
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a mapping with the key `arch`")
    arch = value.get("arch", "transformer")
    return architecture_schema(arch).model_validate({**value, "arch": arch})


def select_optimizer(value: Any) -> Any:
    """Turn a name, or a mapping with ``name``, into that optimiser's config."""
    if isinstance(value, BaseModel):
        return value
    key = "name"
    if isinstance(value, str):
        value, key = {"name": value}, ""
    if not isinstance(value, dict):
        raise ValueError("must be a registered name, or a mapping with the key `name`")
    name = value.get("name", "adamw")
    return optimizer_schema(name, key).model_validate({**value, "name": name})


def architecture_schema(arch: Any) -> Any:
    """The schema of a registered architecture, or of a custom one given as ``module:Class``.

    Raises:
        RuleError: the name is not registered, or the class cannot be used.
    """
    if isinstance(arch, str) and ":" in arch:
        return _custom_schema(arch)
    return _lookup(ARCHITECTURES, arch, "arch")


def optimizer_schema(name: Any, key: str = "name") -> Any:
    """The schema of a registered optimiser; ``key`` is where the name stands inside ``training.optimizer``."""
    return _lookup(OPTIMIZERS, name, key)


def _custom_schema(path: str) -> Any:
    """Import the user's class; the only place where YAML can name code, so it is always announced."""
    if path not in _announced:
        logger.warning("model.arch names code outside GlowFlow: %s is imported", path)
        _announced.add(path)
    if os.getcwd() not in sys.path:
        # A console script does not put the current directory on the path; last, so that it hides nothing.
        sys.path.append(os.getcwd())
    return _foreign_schema(lambda: getattr(load_object(path), "config_class", None), ArchitectureConfig, "arch", path)


def _lookup(registry: Registry, name: Any, key: str) -> Any:
    entry = registry.get(name) if isinstance(name, str) else None
    if entry is None:
        close = difflib.get_close_matches(str(name), registry.names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        rule = f"is not a registered {registry.kind} (registered: {', '.join(registry.names())})"
        raise RuleError(Problem(key, rule, name, hint))
    if entry.builtin:
        return entry.schema()
    base = ArchitectureConfig if registry is ARCHITECTURES else OptimizerConfig
    return _foreign_schema(entry.schema, base, key, entry.target_path)


def _foreign_schema(load: Callable[[], Any], base: type[BaseModel], key: str, path: str) -> Any:
    """The schema that somebody else's code carries; it may be anything, or fail to be imported."""
    try:
        schema = load()
    except ConfigError as error:
        raise RuleError(Problem(key, error.problems[0].rule, path)) from None
    if not (isinstance(schema, type) and issubclass(schema, base)):
        rule = f"must name a class whose `config_class` derives from {base.__module__}.{base.__name__}"
        raise RuleError(Problem(key, rule, path))
    return schema
