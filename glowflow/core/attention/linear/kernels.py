"""The linear kernels by name, and the choice among them."""

from __future__ import annotations

from functools import lru_cache

from glowflow.core.attention.backends.base import Conditions
from glowflow.core.attention.dispatch import choose
from glowflow.core.attention.linear.base import LinearBackend
from glowflow.core.attention.linear.chunked import ChunkBackend
from glowflow.core.attention.linear.fla import FlaBackend
from glowflow.core.attention.linear.recurrent import RecurrentBackend
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["LINEAR_BACKENDS", "linear_candidates", "resolve_linear"]

LINEAR_BACKENDS: dict[str, LinearBackend] = {
    backend.name: backend for backend in (ChunkBackend(), FlaBackend(), RecurrentBackend())
}
"""Name -> kernel of kind ``linear``."""

_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("chunk", "reference"), "cuda": ("fla", "chunk", "reference")}
"""Device -> names in the order in which ``auto`` tries them; a device that is not listed goes by the CPU's."""


def linear_candidates(conditions: Conditions) -> list[LinearBackend]:
    """The linear kernels in the order in which ``auto`` tries them on this device."""
    return [LINEAR_BACKENDS[name] for name in _ORDER.get(conditions.device_type, _ORDER["cpu"])]


@lru_cache(maxsize=1024)
def resolve_linear(spec: AttentionSpec, backend: str, conditions: Conditions) -> tuple[LinearBackend, str]:
    """The linear backend that serves, and why; as ``dispatch.resolve`` for the kinds with a softmax.

    Raises:
        ConfigError: the named backend cannot serve (every reason is listed), or none can.
    """
    admitted = linear_candidates(conditions) if backend == "auto" else list(LINEAR_BACKENDS.values())
    return choose(admitted, spec, backend, conditions)
