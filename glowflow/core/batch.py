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
    """The media of one modality in a micro-batch: N items of all rows, S tokens of each after its encoder.

    A micro-batch always has at least one item of every modality that the model reads, a blank one where it has none,
    so that all ranks call all encoders. Which token goes where is decided on the host: nothing of it is read back from
    the device, and shapes follow from the host's numbers alone.

    S is ``num_tokens`` of the encoder's config for the padded size of ``features``, and token s of an item is its s-th
    valid one in reading order: the first ``num_tokens`` of its own size are valid.
    """

    features: Tensor  # (N, C, H, W) pixels or (N, F, M) log-mel frames, float32, padded with 0
    sizes: Tensor  # (N, 2) valid height and width, or (N, 1) valid frames, int64
    present: Tensor  # (N,) bool; False: a blank, or an item that was left out (then its slots are there all the same)
    sample_index: Tensor  # (N,) int64, the row that each item belongs to; 0 for a blank of no row
    positions: Tensor  # (N,) int64, where the item stands in its row (its placeholder, or its first slot)
    row_items: Tensor  # (B, I) int64, the items of each row in order; N: none
    slot_index: Tensor  # (K,) int64, flat positions b * T + t that hold a token of a medium; K = 0 without slots
    token_index: Tensor  # (K,) int64, which token goes there, flat n * S + s

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Modality:
        """The same on another device."""
        return Modality(*(tensor.to(device, non_blocking=non_blocking) for tensor in vars(self).values()))


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
    readout: Tensor | None = None  # (B,) int64, last position of each row that is no padding (one sample a row)
    text_index: Tensor | None = None  # (K,) int64, flat positions b * T + t that hold no token of a medium
    label_draws: Tensor | None = None  # (B, T) float32, uniform in [0, 1)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["modalities"] = {name: one.to(device, non_blocking) for name, one in self.modalities.items()}
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
    pooled: Tensor | None = None  # (B, D) what the head reads a sample's class from (classification)
    correct_sum: Tensor | None = None  # () float32, weighted number of right answers (classification)
    pairs: tuple[Tensor, Tensor] | None = None  # (B, E) twice, float32 unit vectors: texts and media (contrastive)
    pair_weights: Tensor | None = None  # (B,) float32, 0: no pair
    logit_scale: Tensor | None = None  # () float32, factor on the similarities of pairs

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
    bad_samples: list[tuple[str, str]] = field(default_factory=list)  # (kind, name) of blanks in this rank's rows
