"""Custom architectures for tests: a sound one with everything that the interface has, a small one, broken ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture, Carry, ParameterRole
from glowflow.core.batch import Batch, ModelOutput
from glowflow.core.layers.head import OutputHead

VOCABULARY, DIM = 13, 6


class Keys(ArchitectureConfig):
    """Keys of the models below."""

    dim: int = DIM


class Block(nn.Module):
    """Mixes in the sum of everything before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x_btd: Tensor, before_bd: Tensor) -> tuple[Tensor, Tensor]:
        sums_btd = before_bd[:, None] + x_btd.cumsum(1)
        return x_btd + self.mix(sums_btd), sums_btd[:, -1]


class Sound(BaseArchitecture):
    """Everything that the interface has, in small: sums of embeddings, also over the sequences before."""

    config_class: ClassVar[type[ArchitectureConfig]] = Keys

    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(self.vocab_size, config.dim)
        self.block = Block(config.dim)
        self.head = OutputHead(config.dim, self.vocab_size)

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        before = torch.zeros(len(batch.tokens), DIM, device=batch.tokens.device)
        if carry is not None:
            before = torch.where(batch.reset[:, None], before, carry["sum"])
        hidden, after = self.block(self.embedding(batch.tokens), before)
        loss = self.loss(hidden, batch) if compute_loss else ()
        return ModelOutput(hidden, *loss), {"sum": after.detach()}

    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        return self.head.loss(hidden, batch.targets, batch.loss_weights)

    def new_cache(self, batch_size: int, max_length: int, device: Any = "cpu", dtype: Any = torch.float32) -> Any:
        return [torch.zeros(batch_size, DIM, device=device, dtype=dtype)]

    def decode(self, tokens: Tensor, cache: Any, *, last_only: bool = False) -> Tensor:
        hidden, cache[0] = self.block(self.embedding(tokens), cache[0])
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def shard_units(self) -> list[nn.Module]:
        return [self.block]

    def flops_per_token(self, context: int) -> float:
        return 6.0 * self.num_parameters()


def arch(target: type) -> str:
    """What ``model.arch`` says."""
    return f"{target.__module__}:{target.__name__}"


def config(target: type) -> GlowFlowConfig:
    """A whole experiment with this model."""
    return GlowFlowConfig(model={"arch": arch(target), "vocab_size": VOCABULARY})


class OnlyTrained(Sound):
    """The least that can be trained: the rest of the interface is limits, not mistakes."""

    new_cache = BaseArchitecture.new_cache
    decode = BaseArchitecture.decode
    flops_per_token = BaseArchitecture.flops_per_token
    shard_units = BaseArchitecture.shard_units

    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        del self.head

    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        return (hidden.square().mean(-1) * batch.loss_weights).sum(), batch.loss_weights.sum()


class Scaled(Sound):
    """With roles of its own."""

    def parameter_role(self, name: str) -> ParameterRole:
        if name == "embedding.weight":
            return ParameterRole("vector", lr_scale=0.5)
        return ParameterRole("hidden", DIM, 4.0) if "mix" in name else super().parameter_role(name)


class Unused(Sound):
    """One layer never runs."""

    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.spare = nn.Linear(2, 2)


class EverythingAtOnce(Unused):
    """Six mistakes in six places."""

    new_cache = BaseArchitecture.new_cache

    def loss(self, hidden: Tensor, batch: Batch) -> Any:
        loss, weight = super().loss(hidden, batch)
        return loss / weight, weight

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def shard_units(self) -> list[nn.Module]:
        return [nn.Linear(1, 1)]

    def flops_per_token(self, context: int) -> float:
        return float("nan")


class SeesTheFuture(Sound):
    """Reads from right to left."""

    new_cache = BaseArchitecture.new_cache
    decode = BaseArchitecture.decode

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        hidden, _ = self.block(self.embedding(batch.tokens).flip(1), torch.zeros(len(batch.tokens), DIM))
        return ModelOutput(hidden.flip(1), *(self.loss(hidden.flip(1), batch) if compute_loss else ())), None
