"""The batch record: one typed shape of input for every architecture, and what a forward pass gives back.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "Modality", "ModelOutput", "StepBatches"]


@dataclass
class Modality:
    """Encoded media of one modality in a batch (N items over all sequences)."""

    features: Tensor  # (N, ...) whatever the encoder takes
    mask: Tensor  # (N, S) bool, valid feature positions
    sample_index: Tensor  # (N,) int64, the sequence that each item belongs to
    slot_positions: Tensor  # (N, S) int64, positions in the sequence; empty where fusion uses no slots


@dataclass
class Batch:
    """One micro-batch on one rank.

    A padded position has ``loss_weights`` 0. ``single_document`` is decided on the host: every row holds one
    document only, so that a plain causal mask is exact and no document mask need be built. With ``label_draws`` the
    loss is that of labels which the model draws from its own distribution with these numbers, and not of ``targets``
    (architectures with ``samples_labels``).
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, the next token of the same document
    loss_weights: Tensor  # (B, T) float32
    positions: Tensor  # (B, T) int64, position inside the document's piece in this sequence
    document_ids: Tensor  # (B, T) int64, equal inside one document, different across documents
    sample_ids: Tensor  # (B,) int64, global index of the sequence in the run
    reset: Tensor  # (B,) bool, lanes: forget the carry before this sequence
    single_document: bool = False
    modalities: dict[str, Modality] = field(default_factory=dict)
    label_draws: Tensor | None = None  # (B, T) float32, uniform in [0, 1)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["modalities"] = {
            key: Modality(*(t.to(device, non_blocking=non_blocking) for t in vars(m).values()))
            for key, m in self.modalities.items()
        }
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """Positions in the batch, padding included (known on the host)."""
        return self.tokens.numel()


@dataclass
class ModelOutput:
    """What ``forward(batch, carry)`` gives back beside the new carry."""

    hidden: Tensor  # (B, T, D) after the last norm
    loss_sum: Tensor | None = None  # () float32, weighted sum of the negative log-likelihoods in nats
    weight_sum: Tensor | None = None  # () float32, sum of the weights
    aux_sum: Tensor | None = None  # () what is trained on beside the loss (balance of experts), normalised as loss_sum

    @property
    def objective(self) -> Tensor:
        """What is back-propagated: the loss and, where there is one, the auxiliary loss."""
        assert self.loss_sum is not None
        return self.loss_sum if self.aux_sum is None else self.loss_sum + self.aux_sum


@dataclass
class StepBatches:
    """All micro-batches of one optimiser step on one rank.

    ``global_weight`` is the sum of ``loss_weights`` over the whole global batch (all ranks and micro-batches), known
    on the host from the plan; ``wait_seconds`` is how long the consumer waited for this item.
    """

    step: int
    micro_batches: list[Batch]
    global_weight: float
    wait_seconds: float = 0.0
