"""The plan of layout ``bucketed``: which samples make up the global batch of step s, as a pure function.

One row of a shard is one sequence, so numbers of sequences follow from the manifests and a look-up is O(log windows).
The order inside a window and the weight of a step come from the window's light columns, and media are read by the row
group when their sample is due. No worker count enters. Ray Data, local runs, evaluation and tests use the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.data.mixture import Mixture
from glowflow.data.order import LRU
from glowflow.data.samples.arrange import Arranged, arrange
from glowflow.data.samples.prepare import Planned, Preparer
from glowflow.data.samples.reading import MediaReader, Rows, media_token, read_window
from glowflow.data.samples.sample import PreparedSample, blank_sample
from glowflow.data.samples.sequence import KINDS, Sequencer
from glowflow.data.samples.table import SampleTable

if TYPE_CHECKING:
    from glowflow.data.arguments import Arguments

__all__ = ["SamplePlan"]

_MEDIA_CACHE_BYTES = 96 << 20
_ROWS_CACHE_BYTES = 32 << 20
_WINDOWS_PER_SOURCE = 2  # the one that is read, and the one that a step goes over to

Ints = NDArray[np.int64]


class SamplePlan:
    """See ``glowflow.data.plan.plan()`` with a view. Thread-safe; pickles as its arguments."""

    def __init__(self, arguments: Arguments, cache_bytes: int = _MEDIA_CACHE_BYTES) -> None:
        from glowflow.data.arguments import check, fingerprint

        check(arguments)
        assert arguments.view is not None
        self._arguments, self._cache_bytes, self.view = arguments, cache_bytes, arguments.view
        self.seed, self.context, self.global_batch = arguments.seed, arguments.context, arguments.global_batch
        self.layout, self.split, self.window_tokens = arguments.layout, arguments.split, arguments.window_tokens
        self.manifests = [manifest for manifest, _ in arguments.sources]
        self.weights = [weight for _, weight in arguments.sources]
        seed = self.seed if arguments.shuffle else None
        self._tables = [
            SampleTable(manifest, self.split, self.window_tokens, seed, index)
            for index, manifest in enumerate(self.manifests)
        ]
        self._check_rows()
        self.labels = self._common_labels()
        self._mixture = Mixture(self.weights, self.seed)
        media_tokens = {name: media_token(self.manifests[0], name) for name in MODALITIES}
        self._sequencer = Sequencer(self.view, self.context, media_tokens)
        self._preparer = Preparer(self._sequencer, self.seed, [manifest.name for manifest in self.manifests])
        self._media = MediaReader(self._tables, cache_bytes)
        keep = _WINDOWS_PER_SOURCE * len(self._tables)
        self._rows: LRU[tuple[int, int], Rows] = LRU(_ROWS_CACHE_BYTES, lambda rows: rows.nbytes, keep)
        self._arranged: LRU[tuple[int, int, int], Arranged] = LRU(_ROWS_CACHE_BYTES, lambda one: one.nbytes, keep)
        self._lock = threading.RLock()
        self.windows_opened = 0
        self.fingerprint = fingerprint(arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return SamplePlan, (self._arguments, self._cache_bytes)

    @property
    def sequences_per_epoch(self) -> int:
        """Samples in one epoch of the first source."""
        return self._tables[0].total_rows

    @property
    def num_windows(self) -> int:
        """Windows in one epoch of all sources."""
        return sum(len(table) for table in self._tables)

    @property
    def num_steps(self) -> int | None:
        """Steps of a plan that ends (``eval_plan``), else ``None``."""
        total = self._num_sequences
        return None if total is None else -(-total // self.global_batch)

    @property
    def _num_sequences(self) -> int | None:
        epochs = self._arguments.epochs
        return None if epochs is None else epochs * self.sequences_per_epoch

    @property
    def cached_bytes(self) -> int:
        """Size of the columns and media that are held now."""
        return self._rows.total + self._arranged.total + self._media.nbytes

    def epoch(self, step: int) -> float:
        """How often the first source has been gone through before a step."""
        with self._lock:
            return self._mixture.count_before(0, step * self.global_batch) / self.sequences_per_epoch

    def cursor(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to go on at a step."""
        return {"epoch": int(self.epoch(step)), "step": step, "fingerprint": self.fingerprint}

    def step_weight(self, step: int) -> float:
        """Sum of all weights in the global batch of a step; samples that turn out to be bad are counted."""
        return float(self.step_weights(range(step, step + 1))[0])

    def step_weights(self, steps: range) -> NDArray[np.float64]:
        """``step_weight`` of consecutive steps at once: (len(steps),)."""
        weights = self._sequencer.weights()
        found = np.zeros(len(steps), np.float64)
        with self._lock:
            for index, step in enumerate(steps):
                counts = np.zeros(len(KINDS), np.int64)
                for arranged, rows, *_ in self._located(self._sequences(step, 0, self.global_batch)):
                    counts += arranged.counts[rows].sum(axis=0)
                found[index] = (counts * weights).sum()
        return found

    def sample_bytes(self, step: int) -> int:
        """About how large a prepared sample near a step is."""
        with self._lock:
            located = self._located(self._sequences(step, 0, self.global_batch))
            return int(np.ceil(max((arranged.mean_bytes for arranged, *_ in located), default=1.0)))

    def encoded_bytes(self) -> int:
        """About how many bytes of media a sample has in the shards."""
        totals = [table.media_bytes / max(1, table.total_rows) for table in self._tables]
        return int(np.dot(totals, self.weights) / sum(self.weights))

    def samples(self, steps: range, start: int = 0, stop: int | None = None) -> Iterator[list[PreparedSample]]:
        """Rows [start, stop) of the global batch of each step, by default all; one list per step.

        Rows past the end of a plan that ends are blanks with weight 0 and sample id -1.

        Raises:
            DataError: a shard is missing or damaged, a sample is too long, or bad where none may be.
        """
        stop = self.global_batch if stop is None else stop
        if steps.start < 0 or steps.step != 1 or not 0 <= start <= stop <= self.global_batch:
            raise ValueError(f"rows [{start}, {stop}) of {steps} are not in a global batch of {self.global_batch}")
        for step in steps:
            with self._lock:
                found = self._planned(step, start, stop)
            yield [blank_sample() if one is None else self._finished(one) for one in found]

    def spec(self) -> dict[str, Any]:
        """A JSON-able description from which ``plan_from_spec`` rebuilds the plan in another process."""
        return self._arguments.spec()

    def _planned(self, step: int, start: int, stop: int) -> list[Planned | None]:
        found: list[Planned | None] = [None] * (stop - start)
        sequences = self._sequences(step, start, stop)
        for arranged, rows, at, source, epoch, window in self._located(sequences):
            for row, index in zip(rows.tolist(), at.tolist(), strict=True):
                found[index] = self._preparer.planned(arranged, row, int(sequences[index]), source, epoch, window)
        return found

    def _finished(self, planned: Planned) -> PreparedSample:
        with self._lock:
            files = {
                name: self._media.files(planned.source, planned.window, planned.row, name) for name in planned.wanted
            }
        return self._preparer.finish(planned, files)

    def _sequences(self, step: int, start: int, stop: int) -> Ints:
        """Sequences of the run in rows [start, stop) of a step, without those past the end (which come last)."""
        sequences = step * self.global_batch + np.arange(start, stop, dtype=np.int64)
        return sequences if self._num_sequences is None else sequences[sequences < self._num_sequences]

    def _located(self, sequences: Ints) -> list[tuple[Arranged, Ints, Ints, int, int, int]]:
        """By window: itself, rows in it, which of the sequences they are; its source, epoch and number."""
        found = []
        source_of, index_of = self._mixture.locate(sequences)
        for source in np.unique(source_of).tolist():
            table, mine = self._tables[source], np.flatnonzero(source_of == source)
            epochs, indices = np.divmod(index_of[mine], table.total_rows)
            for epoch in np.unique(epochs).tolist():
                order, here = table.order(epoch), np.flatnonzero(epochs == epoch)
                slots = np.searchsorted(order.rows, indices[here], side="right") - 1
                for slot in np.unique(slots).tolist():
                    inside = here[slots == slot]
                    window, before = int(order.windows[slot]), int(order.rows[slot])
                    arranged = self._window(source, epoch, window, before)
                    found.append(
                        (arranged, arranged.order[indices[inside] - before], mine[inside], source, epoch, window)
                    )
        return found

    def _window(self, source: int, epoch: int, window: int, before: int) -> Arranged:
        """A window in one epoch; ``before``: rows of the epoch that come before it."""
        arranged = self._arranged.get((source, epoch, window))
        if arranged is None:
            table = self._tables[source]
            rows = self._rows.get((source, window))
            if rows is None:
                rows = read_window(table, window, self.labels)
                self.windows_opened += 1
                self._rows.put((source, window), rows)
            arranged = arrange(
                rows,
                self._sequencer,
                key=(self.seed, source, epoch, window),
                shuffle=self._arguments.shuffle,
                base=epoch * table.total_rows + before,
                global_batch=self.global_batch,
                name=table.manifest.name,
            )
            self._arranged.put((source, epoch, window), arranged)
        return arranged

    def _check_rows(self) -> None:
        problems = [
            Problem(str(table.manifest.path), f"the split {self.split!r} has no sample", hint="is it empty?")
            for table in self._tables
            if not table.total_rows
        ]
        if problems:
            raise DataError(problems, title="no plan can be made")

    def _common_labels(self) -> dict[str, int]:
        """Label -> index; only with the task that needs them, all sources must agree."""
        known = {manifest.name: tuple(manifest.media.get("labels", ())) for manifest in self.manifests}
        labelled = {name: labels for name, labels in known.items() if labels}
        first = next(iter(labelled.values()), ())
        if self.view.task == "classification":
            different = [name for name, labels in labelled.items() if labels != first]
            if different or not first:
                rule = f"must have the labels of {next(iter(labelled))}" if different else "must have labels"
                names = different or list(known)
                hint = "name the column with data.columns.label" if not first else "leave these sources out"
                raise DataError([Problem(f"data.sources: {name}", rule, hint=hint) for name in names])
        return {label: index for index, label in enumerate(first)}
