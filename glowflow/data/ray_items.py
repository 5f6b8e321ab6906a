"""The items of one rank's stream as a lazy data set of Ray: its items in order, one to a block.

One at a time, a task makes a run of consecutive items. Several at a time, a task only counts them, and each item is
made by one of as many actors, which keep what they have opened. A source of our own, since ``ray.data.range`` always
asks for a whole CPU, which workers may have left none of. All tasks of a rank together never ask for more than
``_TASK_CPUS``: what preflight leaves for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from glowflow.data.items import ItemMaker

__all__ = ["ItemSource", "items_dataset"]

_TASK_CPUS = 0.25  # small enough that a task runs beside workers that hold most of the CPUs
_COUNTING_CPUS = 0.01
_NUMBER_BYTES = 64  # of the table of one number
_MAX_TASKS = 256  # tasks of one stream, each for a run of consecutive items, so that it stays in its windows
# Between two tasks Ray may end the idle process, and the next one has to import and to open its windows again; but what
# a task that dies has made is made again.
_ITEMS_PER_TASK = 16


class ItemSource(Datasource):
    """Numbers 0..num_items-1 in order, and what is made of each.

    Args:
        num_items: how many.
        table: makes the table of one number.
        table_bytes: about how large it is.
    """

    def __init__(self, num_items: int, table: Callable[[int], Any], table_bytes: int) -> None:
        super().__init__()
        self._num_items, self._table, self._table_bytes = num_items, table, table_bytes
        self._items_per_task = max(_ITEMS_PER_TASK, -(-num_items // _MAX_TASKS))

    def get_name(self) -> str:
        return "Items"

    @property
    def num_tasks(self) -> int:
        return -(-self._num_items // self._items_per_task)

    def estimate_inmemory_data_size(self) -> int | None:
        return self._num_items * self._table_bytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task for each run of items; how parallel Ray would like it does not change the runs."""
        starts = range(0, self._num_items, self._items_per_task)
        return [self._task(start, min(start + self._items_per_task, self._num_items)) for start in starts]

    def _task(self, first: int, last: int) -> ReadTask:
        table = self._table

        def tables() -> Iterator[pa.Table]:
            for item in range(first, last):
                yield table(item)

        metadata = BlockMetadata(
            num_rows=last - first, size_bytes=(last - first) * self._table_bytes, input_files=None, exec_stats=None
        )
        return ReadTask(tables, metadata)


def items_dataset(maker: ItemMaker, item_bytes: int, parallel: int) -> Any:
    """The lazy data set, under the current data context.

    Args:
        maker: makes the table of one item.
        item_bytes: about how large an item is.
        parallel: items that are made at the same time.
    """
    if parallel == 1:
        # One task at a time: its successor could only fill the store with what is not yet due.
        source = ItemSource(maker.num_items, maker.table, item_bytes)
        return _read(source, _TASK_CPUS)
    counted = _read(ItemSource(maker.num_items, _number, _NUMBER_BYTES), _COUNTING_CPUS)
    # Another amount of CPU than that of counting, or Ray would fuse the two into one task after the other.
    cpus = (_TASK_CPUS - _COUNTING_CPUS) / parallel
    return counted.map_batches(
        _Making,
        fn_constructor_args=(maker,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(size=parallel, max_tasks_in_flight_per_actor=1),
    )


def _read(source: ItemSource, cpus: float) -> Any:
    return ray.data.read_datasource(source, num_cpus=cpus, concurrency=1, override_num_blocks=source.num_tasks)


def _number(item: int) -> pa.Table:
    return pa.table({"id": pa.array([item], pa.int64())})


class _Making:
    """Makes the items of a table of numbers."""

    def __init__(self, maker: ItemMaker) -> None:
        self._maker = maker

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables([self._maker.table(item) for item in numbers["id"].to_pylist()])
