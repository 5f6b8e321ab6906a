"""The order of a window's samples and what they weigh, from its light columns.

Rows are permuted. Pools of sixteen global batches of them are sorted by which media they have and then by length, cut
into groups of a global batch, and the groups put in random order: so the samples of a batch are alike and little is
padded, while batches follow each other at random. Everything depends on the plan's arguments alone.

Legend: R rows, G global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.data.order import permutation
from glowflow.data.samples.reading import Rows
from glowflow.data.samples.sequence import KINDS, Sequencer
from glowflow.data.samples.view import MediaView

__all__ = ["Arranged", "arrange", "bucketed", "shuffled_partners"]

_ROW_STREAM = 6  # distinguish the uses of the seed, see table.py
_GROUP_STREAM = 7
_PARTNER_STREAM = 8
_POOL_BATCHES = 16
_BYTES_PER_POSITION = 9  # upper estimate in a payload: tokens, targets and weights

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Arranged:
    """A window in one epoch."""

    rows: Rows
    order: Ints  # (R,) which row comes at each rank
    lengths: Ints  # (R,) positions of each row's sequence
    counts: Ints  # (R, 3) targets of each row by kind, see sequence.KINDS
    partner: Ints  # (R,) whose media each row has
    mean_bytes: float  # of a prepared sample, estimated

    @property
    def nbytes(self) -> int:
        """Bytes beside those of the rows."""
        return sum(array.nbytes for array in (self.order, self.lengths, self.counts, self.partner))


def arrange(
    rows: Rows,
    sequencer: Sequencer,
    *,
    key: tuple[int, ...],
    shuffle: bool,
    base: int,
    global_batch: int,
    name: str,
) -> Arranged:
    """Measure the rows of a window and order them.

    Args:
        rows: of the window.
        sequencer: what sequences they make.
        key: (seed, source, epoch, window).
        shuffle: False keeps the order of the shards.
        base: sequences of the source before this window, over all epochs.
        global_batch: sequences per step.
        name: of the data set, for errors.

    Raises:
        DataError: samples are longer than the context, and the config does not say what to do with them.
    """
    view = sequencer.view
    signature = _signature(rows, view.modalities)
    partner = np.arange(len(rows), dtype=np.int64)
    if view.pairing == "shuffled":
        partner = shuffled_partners(signature, _group_ids(rows), key)
    slots = {modality: np.ones(len(facts), np.int64) for modality, facts in rows.facts.items()}
    media_bytes = 0
    for modality in view.modalities:
        own = _by_facts(rows.facts[modality], partial(view.slots, modality))
        slots[modality] = own[_media_order(rows.first_medium[modality], partner)]
        if modality not in view.without:
            media_bytes += int(_by_facts(rows.facts[modality], partial(_bytes, view, modality)).sum())
    lengths, counts = _measured(rows, sequencer, slots, name)
    order = np.arange(len(rows), dtype=np.int64)
    if shuffle:
        order = bucketed(signature, lengths, base, global_batch, key)
    mean_bytes = (media_bytes + _BYTES_PER_POSITION * int(lengths.sum())) / max(1, len(rows))
    return Arranged(rows, order, lengths, counts, partner, mean_bytes)


def _bytes(view: MediaView, modality: str, facts: Sequence[int]) -> int:
    return view.feature_bytes(modality, view.size(modality, facts))


def bucketed(signature: Ints, lengths: Ints, base: int, global_batch: int, key: tuple[int, ...]) -> Ints:
    """Which row comes at each rank, (R,).

    Args:
        signature: (R,) equal for rows with as many media of each modality.
        lengths: (R,) positions of each row.
        base: sequences of the source before the first of these; groups are cut where global batches are.
        global_batch: sequences of a group.
        key: of the permutations.
    """
    total = len(signature)
    seed, *rest = key
    shuffled = permutation(total, seed, _ROW_STREAM, *rest)
    first = min(total, -base % global_batch)  # rows that fill up a batch begun before
    order = np.empty(total, np.int64)
    for number, (start, stop) in enumerate(_pools(total, first, global_batch)):
        edges = np.unique([start, *range(first, stop, global_batch), stop])
        edges = edges[(edges >= start) & (edges <= stop)]
        sizes = np.diff(edges)
        mine = shuffled[start:stop]
        # lexsort is stable: among equals the random order stays.
        alike = np.lexsort((lengths[mine], signature[mine]))
        at = 0
        for group in permutation(len(sizes), seed, _GROUP_STREAM, *rest, number).tolist():
            chosen = np.sort(alike[at : at + sizes[group]])  # back in random order, or the first rank had the shortest
            order[edges[group] : edges[group + 1]] = mine[chosen]
            at += int(sizes[group])
    return order


def _pools(total: int, first: int, global_batch: int) -> list[tuple[int, int]]:
    """Ranges of ranks that are sorted together; what is less than a batch at the end goes with the pool before."""
    size = _POOL_BATCHES * global_batch
    edges = [0, *range(first + size, total, size), total]
    if len(edges) > 2 and edges[-1] - edges[-2] < global_batch:
        del edges[-2]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def shuffled_partners(signature: Ints, groups: Ints, key: tuple[int, ...]) -> Ints:
    """Whose media each row gets, (R,): a permutation among rows with as many media of each modality.

    Rows of one group (the captions of one picture) do not get each other's as far as that can be: they are laid side
    by side, and everything moves on by the size of the largest group.

    Args:
        signature: (R,) equal for rows that may swap; 0: no media.
        groups: (R,) equal for rows of one group.
        key: of the permutation.
    """
    partner = np.arange(len(signature), dtype=np.int64)
    seed, *rest = key
    shuffled = permutation(len(signature), seed, _PARTNER_STREAM, *rest)
    for kind in np.unique(signature[signature > 0]).tolist():
        mine = shuffled[signature[shuffled] == kind]
        _, first, group = np.unique(groups[mine], return_index=True, return_inverse=True)
        side_by_side = mine[np.argsort(first[group], kind="stable")]  # groups in the random order of their first rows
        largest = int(np.bincount(group).max())
        shift = largest if 2 * largest <= len(mine) else len(mine) // 2
        partner[side_by_side] = np.roll(side_by_side, -shift)
    return partner


def _group_ids(rows: Rows) -> Ints:
    """(R,) equal for rows of one group; a row without is one of its own."""
    numbers: dict[object, int] = {}
    keys = ((row,) if group is None else group for row, group in enumerate(rows.groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _signature(rows: Rows, modalities: tuple[str, ...]) -> Ints:
    """(R,) numbers of media of each modality that is read, as one number; 0: none."""
    signature = np.zeros(len(rows), np.int64)
    for name in modalities:
        counts = np.diff(rows.first_medium[name])
        signature = signature * (int(counts.max(initial=0)) + 1) + counts
    return signature


def _by_facts(facts: Ints, function: Callable[[Sequence[int]], int]) -> Ints:
    """A function of the facts of media, (M,); called once for each size that there is."""
    if not len(facts):
        return np.zeros(0, np.int64)
    different, index = np.unique(facts, axis=0, return_inverse=True)
    return np.array([function(one) for one in different.tolist()], np.int64)[index.reshape(-1)]


def _media_order(first: Ints, partner: Ints) -> Ints:
    """Indices of media in the order of the rows that get them, (M,)."""
    counts = np.diff(first)[partner]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first[:-1][partner], counts) + within


def _measured(rows: Rows, sequencer: Sequencer, slots: dict[str, Ints], name: str) -> tuple[Ints, Ints]:
    """Positions (R,) and targets by kind (R, 3) of every row."""
    view, tokens_of = sequencer.view, np.diff(rows.offsets)
    begin = np.ones(len(rows), np.int64) if view.prompt_loss else np.maximum(1, rows.num_prompt)
    whole, counts = tokens_of.copy(), np.zeros((len(rows), len(KINDS)), np.int64)
    counts[:, 0] = np.maximum(0, tokens_of - begin)
    for kind, modality in enumerate(MODALITIES, 1):
        where = np.flatnonzero(rows.tokens == sequencer.media_tokens[modality])
        row_of = np.searchsorted(rows.offsets, where, side="right") - 1
        whole += np.bincount(row_of, slots[modality] - 1, minlength=len(rows)).astype(np.int64)
        is_target = where - rows.offsets[row_of] >= begin[row_of]
        counts[:, kind] = np.bincount(row_of[is_target], minlength=len(rows))
        counts[:, 0] -= counts[:, kind]
    long = np.flatnonzero(whole > sequencer.limit)
    if len(long) and view.on_long_sample == "error":
        raise _too_long(whole, sequencer, len(long), name)
    if view.task == "classification":
        counts = np.outer(rows.labels >= 0, (1, 0, 0))
    elif view.task == "contrastive":
        counts = np.outer(np.diff(rows.first_medium[view.modalities[0]]) > 0, (1, 0, 0))
    for row in long.tolist():
        counts[row] = _cut_counts(rows, row, sequencer, slots, counts[row])
    counts[rows.bad_rows()] = 0
    return sequencer.length(whole), counts


def _cut_counts(rows: Rows, row: int, sequencer: Sequencer, slots: dict[str, Ints], whole: Ints) -> Ints:
    """Targets by kind of a row whose sequence is cut."""
    tokens = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]]
    first = rows.first_medium
    own = {name: slots[name][first[name][row] : first[name][row + 1]].tolist() for name in MODALITIES}
    view = sequencer.view
    if view.task == "language_modelling":
        return sequencer.counts(sequencer.expand(tokens, int(rows.num_prompt[row]), own)[1])
    if view.task == "contrastive" and not sequencer.places(tokens, own, sequencer.context):
        return np.zeros_like(whole)
    return whole


def _too_long(whole: Ints, sequencer: Sequencer, count: int, name: str) -> DataError:
    longest = int(whole.max()) - (sequencer.limit - sequencer.context)
    rule = f"{count} of {len(whole)} samples of {name} that are shuffled together are longer, the longest has {longest}"
    hint = f"set data.context={longest} or more, or data.on_long_sample=truncate to cut off their ends"
    return DataError(Problem("data.context", rule, sequencer.context, hint))
