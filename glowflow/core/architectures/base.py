"""What every architecture offers to the loop, the strategies, generation and the planner.

An architecture is an ordinary ``nn.Module`` that is cheap to construct (also on the meta device), takes a ``Batch``
and gives back hidden states, a weighted loss sum and its carry. A custom model derives from ``BaseArchitecture``,
sets ``config_class`` and implements ``forward``; the other methods have defaults or say clearly what is missing.
docs/custom-architecture.md is the guide, ``validation.py`` tries such a model before it is trained.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError, Problem
from glowflow.core.batch import Batch, ModelOutput

__all__ = ["BaseArchitecture", "Carry", "InitSpec", "MissingMethodError", "ParameterRole", "default_role"]

ConfigT = TypeVar("ConfigT", bound=ArchitectureConfig)

Carry: TypeAlias = dict[str, Tensor] | None
"""Recurrent memory by name, each tensor indexed by lane in its first dimension; None for architectures without one."""


@dataclass(frozen=True)
class InitSpec:
    """How one parameter starts: normal with mean 0 and ``std``, all ones, or all zeros."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class ParameterRole:
    """What a parameter is for; its weight decay and learning rate follow from it (arXiv:2203.03466, table 8).

    Args:
        kind: ``embedding``: rows that are looked up (a tied output matrix too); ``hidden``: a matrix between widths;
            ``output``: the matrix that scores the vocabulary; ``vector``: gains, biases, everything else whose size
            grows with one width only. A vector does not decay.
        fan_in: number of inputs that each output of a hidden or output matrix sums over.
        lr_scale: learning rate of this parameter over ``training.lr``, at every step.
        rows: heights of the matrices that are stacked in this one (queries, keys, values); empty: it is one matrix.
        width_ratio: under maximal-update parametrisation the fan-in of a hidden matrix over that of the base width.
    """

    kind: Literal["embedding", "hidden", "output", "vector"]
    fan_in: int | None = None
    lr_scale: float = 1.0
    rows: tuple[int, ...] = ()
    width_ratio: float = 1.0

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.kind != "vector"


class MissingMethodError(ConfigError, NotImplementedError):
    """A custom architecture leaves out a method that what was asked for needs."""


class BaseArchitecture(nn.Module):
    """Base of all architectures.

    Class attributes:
        config_class: the schema of the keys under ``model:``, derived from ``ArchitectureConfig``.
        samples_labels: ``forward`` heeds ``batch.label_draws`` (as ``OutputHead.sample`` draws), which Sophia-G needs.
        head: what turns hidden states into scores: an ``OutputHead``, or any module (..., D) -> (..., V).

    Args:
        config: the section ``model`` of the experiment, with ``vocab_size`` set.

    Raises:
        ConfigError: ``vocab_size`` is not set.
    """

    config_class: ClassVar[type[ArchitectureConfig]] = ArchitectureConfig
    samples_labels: ClassVar[bool] = False
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

        Args:
            batch: B sequences of T positions; a position counts as much as its ``loss_weights`` says.
            carry: what the pass over the sequences before gave back for the same lanes; None before the first.
            compute_loss: False where only the hidden states are wanted.

        Returns:
            The output, whose ``loss_sum`` is in nats and not normalised (the caller divides by the global weight), and
            the carry: detached, lanes in the first dimension; None without recurrent memory.
        """
        raise self._missing("forward(batch, carry)")

    def shard_units(self) -> list[nn.Module]:
        """Blocks in order of execution: what is sharded, checkpointed and compiled one by one. Default: none.

        Each is a submodule that ``forward`` calls as ``block(...)``, since FSDP gathers its weights at that call.
        """
        return []

    def second_order_reasons(self) -> list[str]:
        """Why a pass within ``twice_differentiable()`` cannot be differentiated twice; empty: it can. Default: unknown.

        Operations of torch can be, all but fused attention; an ``autograd.Function`` of one's own often cannot.
        """
        return [f"{type(self).__name__} does not say that it can be differentiated twice (second_order_reasons)"]

    def parameter_role(self, name: str) -> ParameterRole:
        """What the parameter with this qualified name is for. Default: see ``default_role``."""
        return default_role(self, name)

    def init_spec(self, name: str) -> InitSpec:
        """How the parameter with this qualified name starts. Default: matrices N(0, 0.02), biases 0, others 1."""
        if self.get_parameter(name).ndim > 1:
            return InitSpec("normal", 0.02)
        return InitSpec("zeros" if name.endswith("bias") else "ones")

    def initial_weights(self) -> Mapping[str, Tensor]:
        """Whole weights, by name, that take the place of drawn ones when the model starts. Default: none."""
        return {}

    def reset_buffers(self) -> None:
        """Recompute the buffers that are functions of the config (rotary tables); needed after ``to_empty``."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_buffers", None)
            if module is not self and reset is not None:
                reset()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) -> (..., V)."""
        if getattr(self, "head", None) is None:
            raise self._missing("logits(hidden), and has no head")
        logits: Tensor = self.head(hidden)
        return logits

    def new_cache(
        self, batch_size: int, max_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Any:
        """An empty decoding cache for ``batch_size`` sequences of at most ``max_length`` tokens."""
        raise self._missing("cached decoding (new_cache)")

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        """Append ``tokens`` (B, T) to the cache and score what follows.

        Returns:
            (B, T, V) logits, or (B, 1, V) for the last position with ``last_only``.
        """
        raise self._missing("cached decoding (decode)")

    def flops_per_token(self, context: int) -> float:
        """Operations of one training token, forward and backward (PaLM, arXiv:2204.02311, appendix B)."""
        raise self._missing("flops_per_token(context)")

    @classmethod
    def small_config(cls, config: ConfigT) -> ConfigT:
        """A smaller config of the same shape, on which a custom model is tried before training. Default: the same."""
        return config

    def num_parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_embedding_parameters(self) -> int:
        """Parameters that are only looked up, never multiplied: the token embedding unless it is tied. Default: 0."""
        return 0

    def _missing(self, method: str) -> MissingMethodError:
        hint = "docs/custom-architecture.md shows what a custom model implements"
        rule = f"{type(self).__name__} does not implement {method}"
        return MissingMethodError(Problem("model.arch", rule, hint=hint))


def default_role(module: nn.Module, name: str) -> ParameterRole:
    """The role that shape and place of a parameter suggest.

    At most one dimension, or named ``bias``: vector. The weight of an ``nn.Embedding``: embedding. Of the submodule
    ``head``: output. All others: hidden, with the inputs of a convolution or else the last dimension as fan-in; the
    module that owns the matrix may say by ``stacked_rows`` where one ends and the next begins.
    """
    shape = module.get_parameter(name).shape
    if len(shape) <= 1 or name.endswith("bias"):
        return ParameterRole("vector")
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        return ParameterRole("embedding")
    convolution = isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    fan_in = shape[1:].numel() if convolution else shape[-1]
    if name.startswith("head."):
        return ParameterRole("output", fan_in)
    return ParameterRole("hidden", fan_in, rows=getattr(owner, "stacked_rows", ()))
