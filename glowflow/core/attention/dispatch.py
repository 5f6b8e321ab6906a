"""Chooses the backend of an attention kind: a named one must be able to serve, only ``auto`` chooses by itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.attention.backends import BACKENDS, Backend
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["BackendRow", "explain", "resolve"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendRow:
    """One row of the table that ``glowflow plan`` prints."""

    name: str
    chosen: bool
    reasons: tuple[str, ...]  # why it cannot serve; empty when it can
    advice: str


@lru_cache(maxsize=256)
def resolve(spec: AttentionSpec, backend: str, device_type: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend that serves, and why. Logged once per process and set of arguments.

    Args:
        backend: ``auto`` takes the first that can serve; a name takes that one or fails.

    Raises:
        ConfigError: the named backend cannot serve (every reason is listed), or none can.
    """
    candidates = [b for b in BACKENDS if backend in ("auto", b.name)]
    if not candidates:
        known = ", ".join(["auto", *(b.name for b in BACKENDS)])
        raise ConfigError(Problem("model.attention.backend", f"must be one of {known}", backend))
    problems: list[Problem] = []
    for candidate in candidates:
        reasons = candidate.reasons(spec, device_type, dtype)
        if not reasons:
            how = "named in the config" if backend != "auto" else "first that can serve"
            reason = f"{how}; {candidate.advice(spec, device_type, dtype)}"
            logger.info("attention %s on %s in %s: %s (%s)", spec.kind, device_type, dtype, candidate.name, reason)
            return candidate, reason
        hint = "use model.attention.backend=auto" if backend != "auto" else ""
        problems += [Problem("model.attention.backend", r, candidate.name, hint) for r in reasons]
    raise ConfigError(problems, title="No attention backend can serve")


def explain(spec: AttentionSpec, device_type: str, dtype: torch.dtype, backend: str = "auto") -> list[BackendRow]:
    """Every backend with its reasons, in the order in which ``auto`` tries them."""
    try:
        chosen = resolve(spec, backend, device_type, dtype)[0].name
    except ConfigError:
        chosen = ""
    return [
        BackendRow(
            b.name, b.name == chosen, tuple(b.reasons(spec, device_type, dtype)), b.advice(spec, device_type, dtype)
        )
        for b in BACKENDS
    ]
