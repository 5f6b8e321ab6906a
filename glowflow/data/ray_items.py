"""The items of one rank's stream as a lazy source of Ray Data: a task makes a run of consecutive items, one to a block.

A source of our own, since ``ray.data.range`` always asks for a whole CPU, which workers may have left none of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from glowflow.data.items import ItemMaker

__all__ = ["ItemSource"]


class ItemSource(Datasource):
    """Items 0..num_items-1 in order.

    Args:
        maker: makes the table of one item.
        item_bytes: about how large an item is.
        max_tasks: how many tasks the items are spread over at most.
    """

    def __init__(self, maker: ItemMaker, item_bytes: int, max_tasks: int) -> None:
        super().__init__()
        self._maker, self._item_bytes = maker, item_bytes
        self._items_per_task = -(-maker.num_items // max_tasks)

    def get_name(self) -> str:
        return "Items"

    @property
    def num_tasks(self) -> int:
        return -(-self._maker.num_items // self._items_per_task)

    def estimate_inmemory_data_size(self) -> int | None:
        return self._maker.num_items * self._item_bytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task for each run of items; how parallel Ray would like it does not change the runs."""
        starts = range(0, self._maker.num_items, self._items_per_task)
        return [self._task(start, min(start + self._items_per_task, self._maker.num_items)) for start in starts]

    def _task(self, first: int, last: int) -> ReadTask:
        maker = self._maker

        def tables() -> Iterator[pa.Table]:
            for item in range(first, last):
                yield maker.table(item)

        metadata = BlockMetadata(
            num_rows=last - first, size_bytes=(last - first) * self._item_bytes, input_files=None, exec_stats=None
        )
        return ReadTask(tables, metadata)
