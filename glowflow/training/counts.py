"""What the loop counts beside its steps: tokens of samples of unequal length, and samples that could not be read.

Both are known on the host, each rank's own; ranks add them up at log steps. With sequences of one length nothing need
be counted, since every step has as many tokens. Bad samples are named, and limited, by the stream.
"""

from __future__ import annotations

import torch

from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, StepBatches
from glowflow.training.strategies import Strategy

__all__ = ["Counts", "num_positions"]


class Counts:
    """Tokens and bad samples of a run, over all ranks.

    Args:
        config: the whole experiment; its layout says whether sequences are of one length.

    Attributes:
        tokens_per_step: of sequences of one length; None where they differ.
        bad_samples: how many samples were blank because they could not be read, as of the last log step.
    """

    def __init__(self, config: GlowFlowConfig) -> None:
        training, data = config.training, config.data
        self.tokens_per_step = None if config.layout == "bucketed" else training.batch_size * data.context
        self.bad_samples = 0
        self._tokens = 0
        self._mine = [0, 0]  # tokens and bad samples of this rank since ranks last agreed

    def tokens(self, step: int) -> int:
        """Tokens of the first ``step`` steps, padding included where sequences are of one length; else those of all
        steps until the last log step."""
        return self._tokens if self.tokens_per_step is None else step * self.tokens_per_step

    def add(self, batches: StepBatches) -> None:
        """Count a step of this rank; reads no device."""
        if self.tokens_per_step is not None:
            return
        self._mine[0] += sum(num_positions(batch) for batch in batches.micro_batches)
        self._mine[1] += len(batches.bad_samples)

    def agree(self, strategy: Strategy, steps: int) -> int:
        """Add up over ranks; collective, at log steps.

        Args:
            steps: since the last call.

        Returns:
            The tokens of these steps.
        """
        if self.tokens_per_step is not None:
            return steps * self.tokens_per_step
        mine = torch.tensor(self._mine, dtype=torch.float64, device=strategy.device)
        tokens, bad = (round(value) for value in strategy.all_reduce(mine).tolist())
        self._mine = [0, 0]
        self._tokens += tokens
        self.bad_samples += bad
        return tokens

    def metrics(self) -> dict[str, float]:
        """``bad_samples``, once there are any."""
        return {"bad_samples": float(self.bad_samples)} if self.bad_samples else {}

    def restore(self, tokens: int, bad_samples: int) -> None:
        """Go on from what a checkpoint holds."""
        self._tokens, self.bad_samples = tokens, bad_samples


def num_positions(batch: Batch) -> int:
    """Positions of a micro-batch on the host, without padding where its rows say how long they are."""
    return batch.num_tokens if batch.readout is None else int(batch.readout.sum()) + len(batch.readout)
