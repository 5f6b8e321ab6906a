"""What every architecture offers to the loop, the strategies, generation and the planner.

An architecture is an ordinary ``nn.Module`` that is cheap to construct (also on the meta device), takes a ``Batch``
and gives back hidden states, a weighted loss sum and its carry. A custom model derives from ``BaseArchitecture``,
sets ``config_class`` and implements ``forward``; the other methods have defaults or say clearly what is missing.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.core.batch import Batch, ModelOutput

__all__ = ["BaseArchitecture", "Carry", "InitSpec"]

Carry: TypeAlias = dict[str, Tensor] | None
"""Recurrent memory by name, each tensor indexed by lane in its first dimension; None for architectures without one."""


@dataclass(frozen=True)
class InitSpec:
    """How one parameter starts: normal with mean 0 and ``std``, all ones, or all zeros."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


class BaseArchitecture(nn.Module):
    """Base of all architectures.

    Args:
        config: the section ``model`` of the experiment, with ``vocab_size`` set.

    Raises:
        ConfigError: ``vocab_size`` is not set.
    """

    config_class: ClassVar[type[ArchitectureConfig]] = ArchitectureConfig
    head: nn.Module

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(
                Problem("model.vocab_size", "must be known to build the model", hint="set it, or name a tokenizer")
            )
        self.config = config
        self.vocab_size: int = config.vocab_size

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        """Hidden states, and with ``compute_loss`` the weighted sums of the loss, of one micro-batch.

        The output's ``loss_sum`` is in nats and not normalised; the caller divides by the global weight.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(batch, carry)")

    def shard_units(self) -> list[nn.Module]:
        """Blocks in order of execution: what is sharded, checkpointed and compiled one by one. Default: none."""
        return []

    def init_spec(self, name: str) -> InitSpec:
        """How the parameter with this qualified name starts. Default: matrices N(0, 0.02), biases 0, others 1."""
        if self.get_parameter(name).ndim > 1:
            return InitSpec("normal", 0.02)
        return InitSpec("zeros" if name.endswith("bias") else "ones")

    def reset_buffers(self) -> None:
        """Recompute the buffers that are functions of the config (rotary tables); needed after ``to_empty``."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_buffers", None)
            if module is not self and reset is not None:
                reset()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (B, T, D) -> (B, T, V)."""
        logits: Tensor = self.head(hidden)
        return logits

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Any:
        """An empty decoding cache for ``batch_size`` sequences of at most ``max_length`` tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not implement cached decoding")

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        """Append ``tokens`` (B, T) to the cache and score what follows.

        Returns:
            (B, T, V) logits, or (B, 1, V) for the last position with ``last_only``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement cached decoding")

    def flops_per_token(self, context: int) -> float:
        """Operations of one training token, forward and backward (PaLM, arXiv:2204.02311, appendix B)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement flops_per_token")

    def num_parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_embedding_parameters(self) -> int:
        """Parameters that are only looked up, never multiplied: the token embedding unless it is tied. Default: 0."""
        return 0
