"""Items of a Ray stream: many steps' rows of one rank in one payload, made by the plan inside a Ray task.

No torch here: the tasks that make items start quickly and stay small.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from glowflow.config.errors import DataError, GlowFlowError, Problem
from glowflow.data.payload import pack
from glowflow.data.plan import Plan, PlanBatch, shared_plan
from glowflow.data.samples.payload import pack_samples
from glowflow.data.samples.plan import SamplePlan

__all__ = ["ItemMaker", "RankShare", "as_data_error"]


@dataclass(frozen=True)
class RankShare:
    """The rows of the global batch that one rank takes, and how it cuts them.

    Raises:
        DataError: the global batch does not divide over ranks and accumulation steps.
    """

    global_batch: int
    rank: int
    world_size: int
    grad_accum_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world_size}")
        parts = self.world_size * self.grad_accum_steps
        if self.grad_accum_steps < 1 or self.global_batch % parts:
            rule = f"must be a multiple of workers x accumulation steps, {self.world_size} x {self.grad_accum_steps}"
            raise DataError(Problem("training.batch_size", rule, self.global_batch))

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the row after the last."""
        size = self.global_batch // self.world_size
        return self.rank * size, (self.rank + 1) * size

    @property
    def micro_batch(self) -> int:
        return self.global_batch // self.world_size // self.grad_accum_steps


@dataclass(frozen=True)
class ItemMaker:
    """Number of an item -> payload with the rank's rows of its steps."""

    spec: dict[str, Any]
    share: RankShare
    start: int
    stop: int
    steps_per_item: int

    @property
    def num_items(self) -> int:
        return -(-(self.stop - self.start) // self.steps_per_item)

    def steps(self, item: int) -> range:
        first = self.start + item * self.steps_per_item
        return range(first, min(first + self.steps_per_item, self.stop))

    def payload(self, plan: Plan | SamplePlan, item: int) -> bytes:
        """The rows of the item's steps, one after the other, and the weight of each global batch."""
        steps = self.steps(item)
        if isinstance(plan, SamplePlan):
            return pack_samples(list(plan.samples(steps, *self.share.rows)), plan.step_weights(steps))
        batches = list(plan.batches(steps, *self.share.rows))
        arrays = {field.name: np.stack([getattr(b, field.name) for b in batches]) for field in fields(PlanBatch)}
        arrays["global_weight"] = plan.step_weights(steps)
        return pack(arrays)

    def table(self, item: int) -> Any:
        """An item as an Arrow table of one row: ``id``, ``payload``, ``error``."""
        import pyarrow as pa

        payload, text = b"", ""
        # An error travels as data: the reader raises it with its own text, and Ray prints no stack of a task.
        try:
            payload = self.payload(shared_plan(self.spec), item)
        except Exception as error:
            text = str(as_data_error(error))
        columns = [pa.array([item], pa.int64()), pa.array([payload], pa.large_binary()), pa.array([text], pa.string())]
        return pa.table(columns, names=["id", "payload", "error"])


def as_data_error(error: BaseException) -> GlowFlowError:
    """An error of ours as it is, any other one as a ``DataError`` that names it."""
    if isinstance(error, GlowFlowError):
        return error
    return DataError(f"reading the data failed: {type(error).__name__}: {error}")
