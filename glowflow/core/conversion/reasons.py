"""Why a model of ours cannot be written in a foreign format: every reason at once, each naming its config key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glowflow.config.architectures import ArchitectureConfig, TransformerConfig
from glowflow.config.attention import AttentionConfig
from glowflow.config.errors import CheckpointError, Problem

__all__ = ["require"]

_ALWAYS: dict[str, tuple[Any, ...]] = {
    "norm_placement": ("pre",),
    "parallel_block": (False,),
    "qk_norm": (False,),
    "moe": (None,),
    "logit_softcap": (None,),
    "mup": (False,),
}


def require(config: ArchitectureConfig, family: str, wanted: Mapping[str, tuple[Any, ...]]) -> TransformerConfig:
    """The config as a transformer's, where it says what the family can express.

    Args:
        config: the section ``model``.
        family: the format's name, for the message.
        wanted: key -> values that the family has; of ``attention.kind`` too.

    Raises:
        CheckpointError: it says something else; every such key is named.
    """
    if not isinstance(config, TransformerConfig) or config.arch != "transformer":
        raise CheckpointError(Problem("model.arch", f"must be transformer for {family}", config.arch))
    problems = []
    for key, values in {**_ALWAYS, "attention.kind": ("dense",), **wanted}.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            shown = " or ".join("null" if each is None else str(each).lower() for each in values)
            problems.append(Problem(f"model.{key}", f"must be {shown} for {family}", value))
    plain = AttentionConfig()
    for key in ("softcap", "sinks"):
        value = getattr(config.attention, key)
        if value != getattr(plain, key):
            problems.append(Problem(f"model.attention.{key}", f"does not exist in {family}", value))
    if problems:
        raise CheckpointError(problems, title=f"the model cannot be written as {family}")
    return config
