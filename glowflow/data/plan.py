"""The plan: which tokens make up the global batch of step s, as a pure function of its arguments.

sources, seed, context, global batch, layout -> ``batch(step)``. Every argument enters the fingerprint and no worker
count does, so a run can go on from (step, fingerprint) on any number of workers. Windows of row groups are permuted
per epoch, documents inside a window; sequence counts follow from the manifests, so a look-up is O(log windows) and
opens only the windows it needs. One function serves Ray Data, local runs and tests. Layout ``bucketed`` has a class of
its own, ``samples.plan.SamplePlan``.

Shapes: B rows asked for, T context.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.data.arguments import Arguments, check, fingerprint
from glowflow.data.layouts import LanesLayout, Layout, PackedLayout, Stretch
from glowflow.data.manifest import Manifest
from glowflow.data.order import LRU
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.view import MediaView
from glowflow.data.windows import Part, WindowReader, WindowTable

__all__ = ["DEFAULT_WINDOW_TOKENS", "Plan", "PlanBatch", "eval_plan", "plan", "plan_from_spec", "shared_plan"]

DEFAULT_WINDOW_TOKENS = 4_194_304
_CACHE_BYTES = 32 << 20
_MIN_PART_PAIRS = 1 << 16
_PARTS_PER_STREAM = 2  # the one that is read, and the one that a step goes over to
_BYTES_PER_ROW = 16  # of a decoded part, beside its tokens
_LAYOUTS: dict[str, type[PackedLayout] | type[LanesLayout]] = {"packed": PackedLayout, "lanes": LanesLayout}
_SHARED_PLANS = 4
_GATHERED_POSITIONS = 1 << 14  # small batches are gathered together up to this many positions


@dataclass
class PlanBatch:
    """Rows of a global batch in numpy. Where ``loss_weights`` is 0, ``tokens`` and ``targets`` are 0 too."""

    tokens: NDArray[np.int32]  # (B, T)
    targets: NDArray[np.int32]  # (B, T) the next token of the same document
    loss_weights: NDArray[np.float32]  # (B, T) 1 or 0
    positions: NDArray[np.int32]  # (B, T) from the start of the document's piece in this sequence, or in this lane
    document_ids: NDArray[np.int32]  # (B, T) packed: 0, 1, 2 ... along the row; lanes: unique in the epoch
    sample_ids: NDArray[np.int64]  # (B,) global index of the sequence in the run; -1: past the end
    reset: NDArray[np.bool_]  # (B,) nothing before this sequence belongs to it

    def rows(self, start: int, stop: int) -> PlanBatch:
        """Rows [start, stop) as views."""
        return PlanBatch(**{name: array[start:stop] for name, array in vars(self).items()})


class Plan:
    """See ``plan()``. Thread-safe; pickles as its arguments."""

    def __init__(self, arguments: Arguments, cache_bytes: int = _CACHE_BYTES) -> None:
        check(arguments)
        self._arguments = arguments
        self._cache_bytes = cache_bytes
        self.seed, self.context, self.global_batch = arguments.seed, arguments.context, arguments.global_batch
        self.layout, self.split, self.window_tokens = arguments.layout, arguments.split, arguments.window_tokens
        self.manifests = [manifest for manifest, _ in arguments.sources]
        self.weights = [weight for _, weight in arguments.sources]
        seed = arguments.seed if arguments.shuffle else None
        self._tables = [
            WindowTable(manifest, arguments.split, arguments.window_tokens, arguments.context, seed, index)
            for index, manifest in enumerate(self.manifests)
        ]
        _check_targets(arguments, self._tables)
        self._schedule: Layout = _LAYOUTS[arguments.layout](
            self._tables,
            self.weights,
            seed=arguments.seed,
            context=self.context,
            global_batch=self.global_batch,
            epochs=arguments.epochs,
        )
        part_pairs = _part_pairs(self._tables, self._schedule.streams, self.context, cache_bytes)
        if arguments.layout == "packed" and arguments.shuffle:
            # A batch takes sequences from all over a window, so that parts of one would be decoded again and again.
            part_pairs = max(part_pairs, *(int(table.pairs.max()) for table in self._tables), self.context)
        self._reader = WindowReader(self._tables, part_pairs, cache_bytes, _PARTS_PER_STREAM * self._schedule.streams)
        self._lock = threading.RLock()
        self.fingerprint = fingerprint(arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self._arguments, self._cache_bytes)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one epoch of the first source."""
        return self._schedule.sequences_per_epoch

    @property
    def targets_per_epoch(self) -> int:
        """Target tokens in one epoch of the first source."""
        return self._tables[0].total_pairs

    @property
    def num_windows(self) -> int:
        """Windows in one epoch of all sources."""
        return sum(len(table) for table in self._tables)

    @property
    def num_lanes(self) -> int:
        """Rows of the global batch; with layout ``lanes`` each is one contiguous stream."""
        return self.global_batch

    @property
    def num_steps(self) -> int | None:
        """Steps of a plan that ends (``eval_plan``), else ``None``."""
        return self._schedule.num_steps

    @property
    def windows_opened(self) -> int:
        """How often a window was decoded so far."""
        return self._reader.windows_opened

    @property
    def cached_bytes(self) -> int:
        """Size of the decoded tokens that are held now."""
        return self._reader.nbytes

    def epoch(self, step: int) -> float:
        """How often the first source has been gone through before a step."""
        return self._schedule.epoch(step)

    def cursor(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to go on at a step."""
        return {"epoch": int(self.epoch(step)), "step": step, "fingerprint": self.fingerprint}

    def step_weight(self, step: int) -> int:
        """Number of target tokens in the global batch of a step, from the manifests' counts alone."""
        return int(self.step_weights(range(step, step + 1))[0])

    def step_weights(self, steps: range) -> NDArray[np.int64]:
        """``step_weight`` of consecutive steps at once: (len(steps),)."""
        with self._lock:
            return self._schedule.weights(steps)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> PlanBatch:
        """Rows [start, stop) of the global batch of a step; by default all of them.

        Raises:
            DataError: a shard is missing, damaged or not what the manifest says.
        """
        return next(self.batches(range(step, step + 1), start, stop))

    def batches(self, steps: range, start: int = 0, stop: int | None = None) -> Iterator[PlanBatch]:
        """``batch`` of consecutive steps; several small ones are gathered at once, which is cheaper."""
        stop = self.global_batch if stop is None else stop
        if steps.start < 0 or steps.step != 1 or not 0 <= start <= stop <= self.global_batch:
            raise ValueError(f"rows [{start}, {stop}) of {steps} are not in a global batch of {self.global_batch}")
        rows = stop - start
        at_once = max(1, _GATHERED_POSITIONS // max(1, rows * self.context))
        for first in range(steps.start, steps.stop, at_once):
            chunk = range(first, min(first + at_once, steps.stop))
            with self._lock:
                segments = self._schedule.segments(chunk, start, stop)
                gathered = self._filled(segments.stretches, segments.sample_ids, segments.reset)
            for index in range(len(chunk)):
                yield gathered.rows(index * rows, (index + 1) * rows)

    def spec(self) -> dict[str, Any]:
        """A JSON-able description from which ``plan_from_spec`` rebuilds the plan in another process."""
        return self._arguments.spec()

    def _filled(self, stretches: list[Stretch], sample_ids: NDArray[np.int64], reset: NDArray[np.bool_]) -> PlanBatch:
        shape = (len(sample_ids), self.context)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights, documents = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        column = np.arange(self.context, dtype=np.int32)
        positions = np.tile(column, (shape[0], 1))
        flat = [array.reshape(-1) for array in (tokens, targets, weights, documents, positions)]
        for part, group in self._by_part(stretches):
            self._fill(part, group, flat)
        if self.layout == "packed":
            documents, positions = _renumbered(documents, column)
        else:
            # Padding of a lane gets a number that no row of any epoch has.
            documents[weights == 0] = max(table.total_rows for table in self._tables)
        return PlanBatch(tokens, targets, weights, positions, documents, sample_ids, reset)

    def _by_part(self, stretches: list[Stretch]) -> list[tuple[Part, list[Stretch]]]:
        """Stretches cut at the borders of the parts that the reader keeps, and collected by part."""
        size = self._reader.part_pairs
        groups: dict[tuple[int, int, int, int], list[Stretch]] = {}
        for whole in stretches:
            done = 0
            while done < whole.length:
                first = whole.first + done
                number = first // size
                count = min(whole.length - done, (number + 1) * size - first)
                piece = whole
                if count != whole.length:
                    piece = whole._replace(column=whole.column + done, first=first, length=count)
                groups.setdefault((whole.source, whole.epoch, whole.window, number), []).append(piece)
                done += count
        return [(self._reader.part(*key), group) for key, group in groups.items()]

    def _fill(self, part: Part, group: list[Stretch], flat: list[NDArray[Any]]) -> None:
        """Gather the pairs of all stretches of one part into the flat arrays of the batch."""
        tokens, targets, weights, documents, positions = flat
        row, column, _, _, _, first, count, floor, base = np.array(group, dtype=np.int64).T
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        place = within + np.repeat(row * self.context + column, count)
        # The same type as row_end, else searchsorted would convert that whole array.
        pair = (within + np.repeat(first, count)).astype(part.row_end.dtype)
        rank = np.searchsorted(part.row_end, pair, side="right")
        index = pair + part.shift[rank]
        tokens[place] = part.tokens[index]
        targets[place] = part.tokens[index + 1]
        weights[place] = 1.0
        documents[place] = part.document_row[rank] + np.repeat(base, count)
        positions[place] = pair - np.maximum(part.document_start[rank], np.repeat(floor, count))


@overload
def plan(
    sources: Sequence[tuple[Manifest, float]],
    *,
    seed: int,
    context: int,
    global_batch: int,
    layout: str = "packed",
    split: str = "train",
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: None = None,
) -> Plan: ...


@overload
def plan(
    sources: Sequence[tuple[Manifest, float]],
    *,
    seed: int,
    context: int,
    global_batch: int,
    layout: str,
    split: str = "train",
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: MediaView,
) -> SamplePlan: ...


def plan(
    sources: Sequence[tuple[Manifest, float]],
    *,
    seed: int,
    context: int,
    global_batch: int,
    layout: str = "packed",
    split: str = "train",
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: MediaView | None = None,
) -> Plan | SamplePlan:
    """An endless shuffled plan over weighted sources.

    Every token but the first of a document is a target exactly once per epoch. A step may cross an epoch's end, so
    no tail is dropped; each source has its own epochs.

    Args:
        sources: data sets with their shares of the sequences (``packed``, ``bucketed``) or of the lanes (``lanes``).
        seed: seed of all permutations.
        context: sequence length T in tokens; of ``bucketed`` the longest.
        global_batch: sequences per step, over all workers and accumulation steps.
        layout: ``packed`` sequences, contiguous ``lanes`` for recurrent architectures, or ``bucketed`` samples.
        split: name of the split in every source.
        window_tokens: about how many tokens are shuffled together (windows are whole row groups).
        view: what the model sees of a sample; of ``bucketed``, and of no other layout.

    Raises:
        DataError: a split or its tokens are missing, tokenizers differ, or an argument is out of range.
    """
    return _made(Arguments(tuple(sources), seed, context, global_batch, layout, split, window_tokens, view=view))


@overload
def eval_plan(
    manifest: Manifest,
    *,
    split: str,
    context: int,
    global_batch: int,
    layout: str = "packed",
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: None = None,
) -> Plan: ...


@overload
def eval_plan(
    manifest: Manifest,
    *,
    split: str,
    context: int,
    global_batch: int,
    layout: str,
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: MediaView,
) -> SamplePlan: ...


def eval_plan(
    manifest: Manifest,
    *,
    split: str,
    context: int,
    global_batch: int,
    layout: str = "packed",
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    view: MediaView | None = None,
) -> Plan | SamplePlan:
    """One epoch in the order of the shards, ``num_steps`` steps long; arguments and errors as for ``plan()``.

    Rows past the end are blanks with weight 0 and sample id -1, so that every rank takes every step.
    """
    counts = (0, context, global_batch, layout, split, window_tokens)
    return _made(Arguments(((manifest, 1.0),), *counts, shuffle=False, epochs=1, view=view))


def plan_from_spec(spec: dict[str, Any]) -> Plan | SamplePlan:
    """Rebuild a plan from its ``spec()``.

    Raises:
        DataError: a manifest is gone, or is no longer the one that the plan was made from.
    """
    return _made(Arguments.from_spec(spec))


def _made(arguments: Arguments) -> Plan | SamplePlan:
    return SamplePlan(arguments) if arguments.layout == "bucketed" else Plan(arguments)


_shared: LRU[str, Plan | SamplePlan] = LRU(_SHARED_PLANS)
_shared_lock = threading.Lock()


def shared_plan(spec: dict[str, Any]) -> Plan | SamplePlan:
    """``plan_from_spec``, but one plan per process, so that tasks that follow each other reuse its windows."""
    with _shared_lock:
        found = _shared.get(spec["fingerprint"])
        if found is None:
            found = plan_from_spec(spec)
            _shared.put(spec["fingerprint"], found)
        return found


def _renumbered(documents: NDArray[np.int32], column: NDArray[np.int32]) -> tuple[Any, Any]:
    """Number the runs of equal ids along each row 0, 1, 2 ..., and count positions from the start of each run."""
    change = np.zeros(documents.shape, np.bool_)
    np.not_equal(documents[:, 1:], documents[:, :-1], out=change[:, 1:])
    if not change.any():
        return np.zeros_like(documents), np.tile(column, (len(documents), 1))
    starts = np.maximum.accumulate(np.where(change, column, np.int32(0)), axis=1)
    return np.cumsum(change, axis=1, dtype=np.int32), column - starts


def _part_pairs(tables: list[WindowTable], streams: int, context: int, cache_bytes: int) -> int:
    """Pairs to keep together for each of the streams read side by side: their share of the cache, whole sequences."""
    rows, pairs = (sum(getattr(table, name) for table in tables) for name in ("total_rows", "total_pairs"))
    itemsize = max(np.dtype(table.manifest.token_dtype).itemsize for table in tables)
    bytes_per_pair = itemsize + (itemsize + _BYTES_PER_ROW) * rows / pairs
    share = int(cache_bytes / (_PARTS_PER_STREAM * streams) / bytes_per_pair)
    return max(_MIN_PART_PAIRS, share, context) // context * context


def _check_targets(arguments: Arguments, tables: list[WindowTable]) -> None:
    problems = []
    for (manifest, _), table in zip(arguments.sources, tables, strict=True):
        if table.total_pairs == 0:
            rule = f"the split {arguments.split!r} has no target token: it needs a document of two tokens or more"
            problems.append(Problem(str(manifest.path), rule, hint="is the corpus, or this split of it, empty?"))
    if problems:
        raise DataError(problems, title="no plan can be made")
