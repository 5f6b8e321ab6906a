"""What every softmax kernel offers: why it cannot serve, what runs underneath, and the computation.

Legend: q_bhtd queries, k_bksd / v_bksd keys and values (B batch, H heads, K key/value heads, T queries, S keys,
D head width).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glowflow.core.attention.masks import Visibility
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["Backend", "Conditions", "common_reasons"]


@dataclass(frozen=True)
class Conditions:
    """Where and on what a kernel would run; together with the spec all that its reasons may depend on.

    Args:
        device_type: ``cpu``, ``cuda``, ``meta``, ...
        dtype: of queries, keys and values.
        capability: CUDA compute capability; None elsewhere.
        training: gradients are needed.
        documents: a query sees its own document alone.
        padding: some keys are padding.
        decoding: keys come from a cache: more keys than queries, perhaps out of order.
        second_order: gradients of gradients are needed (Hessian-vector products).
    """

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    training: bool = False
    documents: bool = False
    padding: bool = False
    decoding: bool = False
    second_order: bool = False

    @classmethod
    def here(cls, device: torch.device | str, dtype: torch.dtype, **more: bool) -> Conditions:
        """For a device of this machine."""
        device = torch.device(device)
        known = device.type == "cuda" and torch.cuda.is_available()
        capability = torch.cuda.get_device_capability(device) if known else None
        return cls(device.type, dtype, capability, **more)


class Backend(Protocol):
    """One kernel. ``auto`` tries backends in the order that ``dispatch`` gives for the device and the kind."""

    name: str

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        """Why it cannot serve, each a clause without the name; empty when it can. Must be cheap and import nothing
        but what it would use."""

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        """One line about what runs underneath, for the log, ``plan`` and ``attention explain``."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, visibility: Visibility, training: bool = False
    ) -> Tensor:
        """(B, H, T, D), (B, K, S, D), (B, K, S, D) -> (B, H, T, D).

        A query that sees no key at all gets zeros. ``training`` switches dropout on.
        """


def common_reasons(spec: AttentionSpec, conditions: Conditions, kinds: tuple[str, ...]) -> list[str]:
    """What holds for every kernel: the kinds it computes, floating point, heads that divide."""
    reasons = []
    if spec.kind not in kinds:
        reasons.append(f"computes only kind {' or '.join(map(repr, kinds))}, not {spec.kind!r}")
    if not conditions.dtype.is_floating_point:
        reasons.append(f"needs a floating-point dtype, not {conditions.dtype}")
    if spec.heads % spec.kv_heads:
        reasons.append(f"needs kv_heads ({spec.kv_heads}) to divide heads ({spec.heads})")
    return reasons
