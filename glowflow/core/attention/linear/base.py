"""What every linear kernel takes and offers: the recurrence's inputs, why it cannot serve, and the computation.

The recurrence of one head, with a state S of (Dk, Dv), a decay a_t = exp(decay_t) and o_t = scale * q_t S_t:

    gated, retention    S_t = a_t S_{t-1} + k_t v_t^T                                (arXiv:2312.06635, 2307.08621)
    feature_map         the same with a_t = 1 and o_t / (q_t z_t), z_t = z_{t-1} + k_t, scale = 1    (arXiv:2006.16236)
    gated_delta         S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T               (arXiv:2412.06464)

Feature maps, rotations and norms of q and k are the layer's business, not the kernel's.

Legend: B batch, H heads, T positions, K width of keys, V width of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glowflow.core.attention.backends.base import Conditions, common_reasons
from glowflow.core.attention.spec import AttentionSpec

__all__ = ["LinearBackend", "LinearInputs", "linear_reasons"]


@dataclass
class LinearInputs:
    """One layer's recurrence.

    Args:
        q, k: (B, H, T, K); the kernel multiplies q by the spec's scale, except for ``feature_map``.
        v: (B, H, T, V).
        decay: (B or 1, H, T) logarithm of the decay, <= 0; None: 1 (``feature_map``).
        beta: (B, H, T) in [0, 1], ``gated_delta`` alone.
        documents: (B, T) int64; the state is forgotten where the document changes. None: one document. With a state
            the first position goes on with the document that the state comes from.
        key_valid: (B, T) bool, False for padding: it neither adds to the state nor decays it. None: no padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    documents: Tensor | None = None
    key_valid: Tensor | None = None


class LinearBackend(Protocol):
    """One kernel of kind ``linear``."""

    name: str

    def reasons(self, spec: AttentionSpec, conditions: Conditions) -> list[str]:
        """Why it cannot serve, each a clause without the name; empty when it can."""

    def advice(self, spec: AttentionSpec, conditions: Conditions) -> str:
        """One line about what runs underneath."""

    def run(self, inputs: LinearInputs, spec: AttentionSpec, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and the state after the last position.

        A spec that is not causal adds a pass from the right and takes off the own position, which both passes count;
        ``gated_delta`` is the mean of both passes, since its updates do not add up. It takes no state.

        Args:
            state: (B, H, K, V), for ``feature_map`` (B, H, K, V + 1), whose last column is z; None: zeros.

        Returns:
            (B, H, T, V) in the dtype of v; the state of the pass from the left in fp32, or fp64 for inputs in fp64.
        """


def linear_reasons(spec: AttentionSpec, conditions: Conditions) -> list[str]:
    """What holds for every linear kernel: the kind, floating point, heads that divide."""
    reasons = common_reasons(spec, conditions, ("linear",))
    if spec.kind == "linear" and spec.linear is None:
        reasons.append("must be told the recurrence (spec.linear)")
    return reasons
