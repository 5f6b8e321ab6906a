"""Streams: the steps of a plan as torch batches for one rank, prepared ahead of the training loop.

``local_stream`` prepares them in a thread of this process. ``ray_stream`` is opened inside a Ray Train worker: a lazy
range of items, many steps to an item, is made into arrays by Ray tasks that call the same plan, in order.
Rank r of W takes rows [r G / W, (r + 1) G / W) of every global batch, cut into micro-batches in that order. Plans of
samples with media stream the same way; their items are bounded in bytes, and several may be prepared at once.

Shapes: G global batch, W ranks, B rows of a micro-batch, T context.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from glowflow.config.errors import DataError, GlowFlowError, Problem
from glowflow.core.batch import Batch, StepBatches
from glowflow.data.items import ItemMaker, RankShare, as_data_error
from glowflow.data.payload import unpack
from glowflow.data.plan import Plan, PlanBatch
from glowflow.data.ray_threads import iterate
from glowflow.data.samples.collate import collate
from glowflow.data.samples.payload import unpack_samples
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.policy import BadSampleCount
from glowflow.data.samples.sample import PreparedSample
from glowflow.data.samples.view import MediaView

__all__ = ["local_stream", "ray_stream", "to_batch"]

logger = logging.getLogger(__name__)

_BLOCK_MARGIN = 4  # blocks that Ray Data may hold in flight, beside the prefetched ones
_MAX_ITEM_POSITIONS = 1 << 21  # positions in one item: its arrays stay in the tens of MB
_BYTES_PER_POSITION = 16  # upper estimate for a payload: 4-byte tokens and targets, the rest narrow
_MAX_ITEM_MEDIA_BYTES = 16 << 20  # prepared media in one item
_MAX_ITEM_FILE_BYTES = 4 << 20  # encoded ones: what takes long to decode keeps nobody waiting for a whole item
_MAX_READY_BYTES = 64 << 20  # batches of prepared media that ``local_stream`` keeps ready
_BYTES_PER_PIXEL = 4  # once collated
_PREPARED_AT_ONCE = 2  # items with media, over all workers
_MIN_STORE_BYTES = 16 << 20
_JOIN_SECONDS = 10.0


def to_batch(batch: PlanBatch, document_mask: bool = True) -> Batch:
    """Turn rows of a plan into torch tensors.

    Args:
        batch: rows of a plan.
        document_mask: keep documents apart; otherwise every row counts as one document.
    """
    if document_mask:
        # Padding behind the last target does no harm to a causal row: only documents with a weight count.
        other = batch.document_ids != batch.document_ids[:, :1]
        single = not bool((other & (batch.loss_weights > 0)).any())
        documents, positions = _int64(batch.document_ids), _int64(batch.positions)
    else:
        single = True
        documents = torch.zeros(batch.tokens.shape, dtype=torch.int64)
        positions = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape).contiguous()
    return Batch(
        tokens=_int64(batch.tokens),
        targets=_int64(batch.targets),
        loss_weights=torch.from_numpy(batch.loss_weights.astype(np.float32)),
        positions=positions,
        document_ids=documents,
        sample_ids=_int64(batch.sample_ids),
        reset=torch.from_numpy(batch.reset.astype(np.bool_)),
        single_document=single,
    )


def _micro_batches(share: RankShare, rows: PlanBatch, document_mask: bool) -> list[Batch]:
    """The rank's rows of a step as micro-batches."""
    size = share.micro_batch
    return [to_batch(rows.rows(m * size, (m + 1) * size), document_mask) for m in range(share.grad_accum_steps)]


def _sample_step(
    step: int,
    samples: list[PreparedSample],
    weight: float,
    share: RankShare,
    view: MediaView,
    bad: BadSampleCount,
) -> StepBatches:
    """The rank's samples of a step, each micro-batch padded on its own."""
    size = share.micro_batch
    batches = [collate(samples[m * size : (m + 1) * size], view) for m in range(share.grad_accum_steps)]
    return StepBatches(step, batches, weight, bad_samples=bad.add(samples))


def _planned_steps(
    plan: Plan | SamplePlan, share: RankShare, steps: range, document_mask: bool
) -> Iterator[StepBatches]:
    """Steps prepared here, one when it is asked for."""
    if isinstance(plan, SamplePlan):
        bad = BadSampleCount(plan.fingerprint, plan.view.max_bad_fraction)
        for step, samples in zip(steps, plan.samples(steps, *share.rows), strict=True):
            yield _sample_step(step, samples, plan.step_weight(step), share, plan.view, bad)
        return
    for step, rows in zip(steps, plan.batches(steps, *share.rows), strict=True):
        micro_batches = _micro_batches(share, rows, document_mask)
        yield StepBatches(step, micro_batches, float(plan.step_weight(step)))


def local_stream(
    plan: Plan | SamplePlan,
    start_step: int,
    stop_step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    grad_accum_steps: int = 1,
    document_mask: bool = True,
    prefetch: int = 8,
) -> Iterator[StepBatches]:
    """Steps [start_step, stop_step) for one rank, prepared by a thread of this process.

    Args:
        plan: the plan.
        start_step: first step, for example from a checkpoint's cursor.
        stop_step: step after the last.
        rank: number of this rank.
        world_size: number of ranks.
        grad_accum_steps: micro-batches per step.
        document_mask: keep documents apart (see ``to_batch``).
        prefetch: steps that are kept ready; fewer where their media are large.

    Raises:
        DataError: the data cannot be read, or the global batch cannot be divided.
    """
    share = RankShare(plan.global_batch, rank, world_size, grad_accum_steps)
    if isinstance(plan, SamplePlan) and start_step < stop_step:
        step_bytes = plan.sample_bytes(start_step) * _rows(share) * _BYTES_PER_PIXEL
        prefetch = max(1, min(prefetch, _MAX_READY_BYTES // step_bytes))
    return _local_steps(plan, share, start_step, stop_step, document_mask, prefetch)


def _rows(share: RankShare) -> int:
    first, last = share.rows
    return last - first


def _local_steps(
    plan: Plan | SamplePlan, share: RankShare, start: int, stop: int, document_mask: bool, prefetch: int
) -> Iterator[StepBatches]:
    ready: queue.Queue[StepBatches | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
    closed = threading.Event()
    producer = threading.Thread(
        target=_produce,
        args=(plan, share, start, stop, document_mask, ready, closed),
        name="glowflow-data",
        daemon=True,
    )
    began = time.perf_counter()
    producer.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise as_data_error(item) from item
            item.wait_seconds = time.perf_counter() - began
            yield item
            began = time.perf_counter()
    finally:
        closed.set()
        while not ready.empty():  # a producer that waits for room must see that nobody will take more
            ready.get_nowait()
        producer.join(_JOIN_SECONDS)


def _produce(
    plan: Plan | SamplePlan,
    share: RankShare,
    start: int,
    stop: int,
    document_mask: bool,
    ready: queue.Queue[StepBatches | BaseException | None],
    closed: threading.Event,
) -> None:
    """Fill the queue with steps, then ``None``; an exception is handed over as the last item."""

    def hand_over(item: StepBatches | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for step in _planned_steps(plan, share, range(start, stop), document_mask):
            if not hand_over(step):
                return
        hand_over(None)
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        hand_over(error)


def ray_stream(
    plan: Plan | SamplePlan,
    start_step: int,
    stop_step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    grad_accum_steps: int = 1,
    document_mask: bool = True,
    steps_per_item: int = 32,
    prefetch_items: int = 2,
    parallel_items: int | None = None,
) -> Iterator[StepBatches]:
    """Steps [start_step, stop_step) for one rank, prepared by tasks of Ray Data; yields what ``local_stream`` yields.

    Every rank runs a data set of its own over the items of its own rows. Nothing is read before ``start_step``.

    Args:
        steps_per_item: steps whose batches one item carries at most (fewer where steps are large, and at the end).
        prefetch_items: items that are kept ready in this process.
        parallel_items: items that tasks prepare at once; default: 1, with media 2 over the ranks.

    Other arguments and errors as for ``local_stream``.
    """
    share = RankShare(plan.global_batch, rank, world_size, grad_accum_steps)
    settings = {"steps_per_item": steps_per_item, "prefetch_items": prefetch_items, "parallel_items": parallel_items}
    problems = [
        Problem(f"data.{key}", "must be at least 1", value)
        for key, value in settings.items()
        if value is not None and value < 1
    ]
    if problems:
        raise DataError(problems)
    if start_step >= stop_step:
        return iter(())
    if isinstance(plan, SamplePlan):
        step_bytes = plan.sample_bytes(start_step) * _rows(share)
        most = min(
            _MAX_ITEM_MEDIA_BYTES // step_bytes, _MAX_ITEM_FILE_BYTES // max(1, plan.encoded_bytes() * _rows(share))
        )
        parallel = parallel_items or max(1, _PREPARED_AT_ONCE // world_size if plan.view.modalities else 1)
    else:
        positions = _rows(share) * plan.context
        step_bytes, most = positions * _BYTES_PER_POSITION, _MAX_ITEM_POSITIONS // positions
        parallel = parallel_items or 1
    steps_per_item = max(1, min(steps_per_item, most))
    maker = ItemMaker(plan.spec(), share, start_step, stop_step, steps_per_item)
    return _ray_steps(maker, steps_per_item * step_bytes, document_mask, prefetch_items, parallel)


def _ray_steps(
    maker: ItemMaker, item_bytes: int, document_mask: bool, prefetch_items: int, parallel: int
) -> Iterator[StepBatches]:
    dataset = _dataset(maker, item_bytes, prefetch_items, parallel)
    open_item = _item_opener(maker, document_mask)
    tables = iterate(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_items))
    began, expected = time.perf_counter(), 0
    try:
        for table in _ray_errors(tables):
            for item, payload, error in zip(*(table[name] for name in ("id", "payload", "error")), strict=True):
                if error.as_py():
                    raise DataError(error.as_py())
                if item.as_py() != expected:
                    raise DataError(f"Ray Data gave item {item.as_py()} of the stream where {expected} was due")
                for step in open_item(payload.as_buffer(), expected):
                    step.wait_seconds = time.perf_counter() - began
                    yield step
                    began = time.perf_counter()
                expected += 1
        if expected != maker.num_items:
            raise DataError(f"Ray Data ended the stream after {expected} of {maker.num_items} items")
    finally:
        tables.close()


def _item_opener(maker: ItemMaker, document_mask: bool) -> Callable[[Any, int], Iterator[StepBatches]]:
    """The function that takes the steps out of the payload of an item of this number."""
    if "view" not in maker.spec:
        return lambda payload, item: _unpacked(payload, maker, item, document_mask)
    view = MediaView.from_plain(maker.spec["view"])
    bad = BadSampleCount(maker.spec["fingerprint"], view.max_bad_fraction)

    def steps(payload: Any, item: int) -> Iterator[StepBatches]:
        for step, (samples, weight) in zip(maker.steps(item), unpack_samples(payload), strict=True):
            yield _sample_step(step, samples, weight, maker.share, view, bad)

    return steps


def _unpacked(payload: Any, maker: ItemMaker, item: int, document_mask: bool) -> Iterator[StepBatches]:
    arrays = unpack(payload)
    weights = arrays.pop("global_weight")
    for index, step in enumerate(maker.steps(item)):
        rows = PlanBatch(**{name: array[index] for name, array in arrays.items()})
        yield StepBatches(step, _micro_batches(maker.share, rows, document_mask), float(weights[index]))


def _dataset(maker: ItemMaker, item_bytes: int, prefetch_items: int, parallel: int) -> Any:
    """The lazy data set of one rank: its items in order, one to a block."""
    import ray

    from glowflow.data.ray_items import items_dataset

    # The data set takes a copy of the current context: other data sets of this process keep theirs.
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a block is handed on as soon as it holds one item
    context.execution_options.preserve_order = True
    held = prefetch_items + _BLOCK_MARGIN + parallel - 1
    context.execution_options.resource_limits = _limits(maker.share.world_size, item_bytes * held)
    for name, level in (("ray.data", logging.WARNING), ("ray.data._internal.progress", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    with ray.data.DataContext.current(context):
        return items_dataset(maker, item_bytes, parallel)


def _limits(world_size: int, wanted: int) -> Any:
    """What one rank's executor may take: every rank runs its own, and each would think that all is its own."""
    import ray
    from ray.data import ExecutionResources

    store = ray.cluster_resources().get("object_store_memory", 0.0) / world_size / 2
    wanted = max(_MIN_STORE_BYTES, wanted)
    return ExecutionResources.for_limits(object_store_memory=min(wanted, store) if store else wanted)


def _ray_errors(tables: Iterator[Any]) -> Iterator[Any]:
    """Pass tables on; turn an error of Ray into one of ours."""
    try:
        yield from tables
    except GlowFlowError:
        raise
    except Exception as error:
        raise as_data_error(error) from error


def _int64(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
