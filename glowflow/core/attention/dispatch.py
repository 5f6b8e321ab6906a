"""Chooses the backend of an attention kind: a named one must be able to serve, only ``auto`` chooses by itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

from glowflow.config.errors import ConfigError, Problem
from glowflow.core.attention.backends.base import Backend, Conditions
from glowflow.core.attention.backends.blocked import BlockedBackend
from glowflow.core.attention.backends.flash import FlashAttention2, FlashAttention3, FlashAttention4
from glowflow.core.attention.backends.flex import FlexBackend
from glowflow.core.attention.backends.gather import GatherBackend
from glowflow.core.attention.backends.reference import ReferenceBackend
from glowflow.core.attention.backends.sdpa import SdpaBackend
from glowflow.core.attention.backends.xformers import XformersBackend
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["SOFTMAX_BACKENDS", "BackendRow", "candidates", "explain", "resolve"]

logger = logging.getLogger(__name__)

SOFTMAX_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        SdpaBackend(),
        BlockedBackend(),
        GatherBackend(),
        FlexBackend(),
        FlashAttention2(),
        FlashAttention3(),
        FlashAttention4(),
        XformersBackend(),
        ReferenceBackend(),
    )
}
"""Name -> kernel, of the kinds that weigh values by a softmax."""

_ORDER: dict[tuple[str, str], tuple[str, ...]] = {
    ("cpu", "dense"): ("sdpa", "reference"),
    ("cpu", "windowed"): ("blocked", "sdpa", "reference"),
    ("cpu", "sparse"): ("gather", "sdpa", "reference"),
    # flash_attn_3 changes torch's operators for the whole process: by its name alone.
    ("cuda", "dense"): ("sdpa", "flash_attn_2", "xformers", "flex", "flash_attn_4", "reference"),
    ("cuda", "windowed"): ("flash_attn_2", "xformers", "flex", "flash_attn_4", "blocked", "sdpa", "reference"),
    ("cuda", "sparse"): ("flex", "gather", "sdpa", "reference"),
}
"""(device, kind) -> names in the order in which ``auto`` tries them; a device that is not listed goes by the CPU's."""


class _Kernel(Protocol):
    name: str

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]: ...

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str: ...


K = TypeVar("K", bound=_Kernel)


@dataclass(frozen=True)
class BackendRow:
    """One row of the table that ``glowflow plan`` and ``glowflow attention explain`` print."""

    name: str
    chosen: bool
    reasons: tuple[str, ...]  # why it cannot serve; empty when it can
    advice: str


def candidates(spec: AttentionSpec, conditions: Conditions) -> list[Backend]:
    """The softmax kernels of the spec's kind in the order in which ``auto`` tries them on this device."""
    order = _ORDER.get((conditions.device_type, spec.kind)) or _ORDER["cpu", spec.kind]
    return [SOFTMAX_BACKENDS[name] for name in order]


@lru_cache(maxsize=1024)
def resolve(spec: AttentionSpec, backend: str, conditions: Conditions) -> tuple[Backend, str]:
    """The backend that serves, and why. Logged once per process and set of arguments.

    Args:
        backend: ``auto`` takes the first that can serve; a name takes that one or fails.

    Raises:
        ConfigError: the named backend cannot serve (every reason is listed), or none can.
    """
    named = list(SOFTMAX_BACKENDS.values()) if backend != "auto" else candidates(spec, conditions)
    return choose(named, spec, backend, conditions)


def choose(kernels: Sequence[K], spec: AttentionSpec, backend: str, conditions: Conditions) -> tuple[K, str]:
    """The first kernel that can serve among those that ``backend`` admits; see ``resolve``."""
    admitted = [kernel for kernel in kernels if backend in ("auto", kernel.name)]
    if not admitted:
        known = ", ".join(["auto", *(kernel.name for kernel in kernels)])
        rule = f"must be one of {known} for kind {spec.kind}"
        raise ConfigError(Problem("model.attention.backend", rule, backend))
    problems: list[Problem] = []
    for kernel in admitted:
        reasons = kernel.reasons(spec, conditions)
        if not reasons:
            how = "named in the config" if backend != "auto" else "first that can serve"
            reason = f"{how}; {kernel.advice(spec, conditions)}"
            where = f"{conditions.device_type} in {conditions.dtype}"
            logger.info("attention %s on %s: %s (%s)", spec.kind, where, kernel.name, reason)
            return kernel, reason
        hint = "use model.attention.backend=auto" if backend != "auto" else ""
        problems += [Problem("model.attention.backend", reason, kernel.name, hint) for reason in reasons]
    raise ConfigError(problems, title="No attention backend can serve")


def explain(spec: AttentionSpec, conditions: Conditions, backend: str = "auto") -> list[BackendRow]:
    """Every backend with its reasons, of any kind: first those that ``auto`` tries on this device, in its order."""
    tried, known, choice = _kernels(spec, conditions)
    chosen = ""
    with contextlib.suppress(ConfigError):
        chosen = choice(spec, backend, conditions)[0].name
    others = [kernel for kernel in known if kernel not in tried]
    rows = [
        BackendRow(b.name, b.name == chosen, tuple(b.reasons(spec, conditions)), b.advice(spec, conditions))
        for b in [*tried, *others]
    ]
    if backend not in ("auto", *(row.name for row in rows)):
        what = "relative positions" if spec.relative else f"kind {spec.kind}"
        rows.append(BackendRow(backend, False, (f"is not a kernel of {what}",), ""))
    return rows


def _kernels(
    spec: AttentionSpec, conditions: Conditions
) -> tuple[Sequence[_Kernel], Sequence[_Kernel], Callable[[AttentionSpec, str, Conditions], tuple[_Kernel, str]]]:
    """Of the spec's kind: what ``auto`` tries, in its order; all that there are; how one is chosen."""
    if spec.kind == "linear":
        from glowflow.core.attention.linear import kernels as linear  # which imports this module

        return linear.linear_candidates(conditions), [*linear.LINEAR_BACKENDS.values()], linear.resolve_linear
    if spec.relative:
        from glowflow.core.attention import relative  # the same

        kernels = [*relative.RELATIVE_BACKENDS.values()]
        return kernels, kernels, relative.resolve_relative
    return candidates(spec, conditions), [*SOFTMAX_BACKENDS.values()], resolve
