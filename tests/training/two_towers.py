"""A model of two towers in small, whose media are a second text: for tests of contrastive training without media.

The text of row b is ``tokens[b]``, its medium ``targets[b]``; the pair counts as the last loss weight says.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture, Carry, InitSpec
from glowflow.core.batch import Batch, ModelOutput
from tests.training.small_run import small_config

PAIRS, LENGTH, VOCABULARY = 8, 6, 23


class Keys(ArchitectureConfig):
    """Keys of the model below."""

    dim: int = 12
    dropout: float = 0.0
    task: str = "contrastive"


class Tower(nn.Module):
    """A text's mean, through a small network."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x_btd: Tensor) -> Tensor:
        hidden_bd = F.dropout(torch.tanh(self.up(x_btd.mean(1))), self.dropout, self.training)
        embedded: Tensor = self.down(hidden_bd)
        return F.normalize(embedded, dim=-1)


class TwoTowers(BaseArchitecture):
    """Texts and media each through a tower of their own into one space."""

    config_class: ClassVar[type[ArchitectureConfig]] = Keys

    def __init__(self, config: Keys) -> None:
        super().__init__(config)
        self.texts, self.media = nn.Embedding(VOCABULARY, config.dim), nn.Embedding(VOCABULARY, config.dim)
        self.towers = nn.ModuleList(Tower(config.dim, config.dropout) for _ in range(2))
        self.log_scale = nn.Parameter(torch.empty(1))

    def forward(self, batch: Batch, carry: Carry = None, *, compute_loss: bool = True) -> tuple[ModelOutput, Carry]:
        texts_btd, media_btd = self.texts(batch.tokens), self.media(batch.targets)
        pairs = self.towers[0](texts_btd), self.towers[1](media_btd)
        scale = (1.0 + self.log_scale[0]).exp()
        return ModelOutput(texts_btd, pairs=pairs, pair_weights=batch.loss_weights[:, -1], logit_scale=scale), carry

    def init_spec(self, name: str) -> InitSpec:
        return InitSpec("zeros") if name == "log_scale" else InitSpec("normal", 0.3)

    def shard_units(self) -> list[nn.Module]:
        return list(self.towers)

    def flops_per_token(self, context: int) -> float:
        return 6.0 * self.num_parameters()


def tower_config(**overrides: Any) -> GlowFlowConfig:
    """8 pairs a step for 3 steps, one of them without weight; other keys as for ``small_config``."""
    base = small_config(
        training__batch_size=PAIRS, training__max_steps=3, training__log_interval=1, training__checkpoint_interval=2,
        training__val_interval=3, training__schedule="constant", training__warmup_steps=0, data__context=LENGTH,
    )  # fmt: skip
    keys = {"vocab_size": VOCABULARY} | {
        key.removeprefix("model__"): overrides.pop(key) for key in list(overrides) if key.startswith("model__")
    }
    values = {key: value for key, value in base.model_dump(mode="json").items() if key != "model"}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return GlowFlowConfig(model={"arch": f"{__name__}:TwoTowers", **keys}, **values)


def make_pairs(step: int, config: GlowFlowConfig) -> Batch:
    """The global batch of a step; a pair without weight at a place that changes, in step 1 the first half."""
    generator = torch.Generator().manual_seed(step)
    size = config.training.batch_size
    texts, media = torch.randint(0, VOCABULARY, (2, size, LENGTH), generator=generator)
    weights = torch.zeros(size, LENGTH)
    weights[:, -1] = 1.0
    weights[step % size, -1] = 0.0
    if step == 1:
        weights[: size // 2] = 0.0  # the first of two ranks has no pair at all
    return Batch(
        tokens=texts,
        targets=media,
        loss_weights=weights,
        positions=torch.arange(LENGTH).repeat(size, 1),
        document_ids=torch.zeros(size, LENGTH, dtype=torch.int64),
        sample_ids=torch.arange(step * size, (step + 1) * size),
        reset=torch.zeros(size, dtype=torch.bool),
        single_document=True,
    )
