"""Properties of the two layouts, on corpora in which every token is a number of its own.

The target rule: every token but the first of a document is a target exactly once per epoch, and its input is the
token before it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.data import plan as plan_module
from glowflow.data.manifest import Manifest
from glowflow.data.mixture import lane_sources
from glowflow.data.plan import Plan, PlanBatch, eval_plan, plan
from tests.data.synthetic import expected_targets, numbered_documents, write_dataset

common = settings(max_examples=25, deadline=None, derandomize=True)

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=14).filter(lambda n: max(n) > 1)
long_lengths = st.lists(st.integers(20, 60), min_size=8, max_size=16)
shapes = st.tuples(st.integers(1, 4), st.sampled_from([2, 3, 7, 1 << 16]))  # rows per group, tokens per row
windows = st.integers(1, 120)
contexts = st.integers(1, 17)
seeds = st.integers(0, 2**32)


@lru_cache(maxsize=512)
def corpus(lengths: tuple[int, ...], shape: tuple[int, int], first: int = 1) -> tuple[Manifest, tuple[int, ...]]:
    documents = numbered_documents(lengths, first)
    root = Path(tempfile.mkdtemp(dir=corpus_root.name))
    manifest = write_dataset(root, {"train": documents}, rows_per_group=shape[0], max_row_tokens=shape[1])
    return manifest, tuple(expected_targets(documents))


corpus_root = tempfile.TemporaryDirectory()


@pytest.fixture(scope="module", autouse=True)
def _clean_up():
    yield
    corpus_root.cleanup()


def collect(batches: list[PlanBatch]) -> PlanBatch:
    return PlanBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in vars(batches[0])))


def sequences(made: Plan, first: int, last: int) -> PlanBatch:
    """Sequences [first, last) of a packed plan, whatever the steps they fall into."""
    size = made.global_batch
    rows = collect(list(made.batches(range(first // size, -(-last // size)))))
    return rows.rows(first - first // size * size, last - first // size * size)


def check_rows(rows: PlanBatch, seams: bool = True) -> None:
    """What holds in every row: pairs are neighbours, padding is empty, ids and positions follow the documents.

    ``seams``: wherever tokens go on without a break it is one document (in lanes, two windows may happen to fit).
    """
    valid = rows.loss_weights > 0
    assert set(np.unique(rows.loss_weights)) <= {0.0, 1.0}
    assert (rows.targets[valid] == rows.tokens[valid] + 1).all()
    assert not rows.tokens[~valid].any() and not rows.targets[~valid].any()
    assert not (valid[:, 1:] & ~valid[:, :-1]).any(), "padding stands at the end of a row only"
    seam = rows.tokens[:, 1:] == rows.targets[:, :-1]
    same = rows.document_ids[:, 1:] == rows.document_ids[:, :-1]
    both = valid[:, 1:] & valid[:, :-1]
    assert seam[both & same].all()
    assert not seams or same[both & seam].all()
    assert not (same & (valid[:, 1:] != valid[:, :-1])).any(), "padding has an id of its own"
    step = rows.positions[:, 1:] - rows.positions[:, :-1]
    assert (step[both & same] == 1).all()
    assert (rows.positions[:, 1:][both & ~same] == 0).all()


@common
@given(lengths, shapes, windows, contexts, st.integers(1, 7), seeds)
def test_packed_target_rule_in_every_epoch(lengths, shape, window_tokens, context, global_batch, seed) -> None:
    manifest, expected = corpus(tuple(lengths), shape)
    made = plan([(manifest, 1.0)], seed=seed, context=context, global_batch=global_batch, window_tokens=window_tokens)
    per_epoch = made.sequences_per_epoch
    for epoch in range(3):
        rows = sequences(made, epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(rows.targets[rows.loss_weights > 0].tolist()) == sorted(expected)
        assert rows.sample_ids.tolist() == list(range(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert rows.reset.all()
        assert (rows.positions[:, 0] == 0).all() and (rows.document_ids[:, 0] == 0).all()
        check_rows(rows)


@common
@given(lengths, shapes, contexts, st.integers(1, 4), st.integers(1, 3), seeds, st.sampled_from(["packed", "lanes"]))
def test_ranks_share_the_global_batch_without_overlap(lengths, shape, context, ranks, rows, seed, layout) -> None:
    manifest, _ = corpus(tuple(lengths), shape)
    arguments = {"seed": seed, "context": context, "global_batch": ranks * rows, "layout": layout, "window_tokens": 40}
    whole = plan([(manifest, 1.0)], **arguments)
    workers = [plan([(manifest, 1.0)], **arguments) for _ in range(ranks)]
    for step in (0, 1, 5, 1000):
        together = collect([worker.batch(step, r * rows, (r + 1) * rows) for r, worker in enumerate(workers)])
        for name, array in vars(whole.batch(step)).items():
            assert np.array_equal(array, getattr(together, name)), name


@common
@given(lengths, shapes, windows, contexts, st.integers(1, 6), seeds, st.sampled_from(["packed", "lanes"]))
def test_step_weight_and_grouped_look_up_agree_with_single_steps(
    lengths, shape, window_tokens, context, global_batch, seed, layout
) -> None:
    manifest, _ = corpus(tuple(lengths), shape)
    made = plan(
        [(manifest, 1.0)],
        seed=seed,
        context=context,
        global_batch=global_batch,
        layout=layout,
        window_tokens=window_tokens,
    )
    single = [made.batch(step) for step in range(3, 12)]
    assert made.step_weights(range(3, 12)).tolist() == [int(batch.loss_weights.sum()) for batch in single]
    for one, grouped in zip(single, made.batches(range(3, 12)), strict=True):
        assert all(np.array_equal(getattr(one, name), array) for name, array in vars(grouped).items())


@settings(common, max_examples=8)
@given(
    st.lists(st.tuples(long_lengths, st.sampled_from([0.01, 0.3, 1.0, 7.5])), min_size=2, max_size=4),
    shapes,
    st.integers(1, 5),
    st.integers(1, 9),
    seeds,
)
def test_weighted_sources_keep_their_shares_and_their_own_epochs(sources, shape, context, global_batch, seed) -> None:
    built, origin = [], 1
    for length, weight in sources:
        built.append((*corpus(tuple(length), shape, origin), weight, origin))
        origin += 1000
    made = plan([(m, w) for m, _, w, _ in built], seed=seed, context=context, global_batch=global_batch)
    rows = sequences(made, 0, 1500)
    check_rows(rows)
    total = sum(weight for _, _, weight, _ in built)
    for manifest, expected, weight, origin in built:
        mine = (rows.tokens[:, 0] >= origin) & (rows.tokens[:, 0] < origin + 1000)
        # Exact at the ends of the mixture's blocks (test_plan.py); inside one, off by the luck of its permutation.
        assert abs(mine.sum() - 1500 * weight / total) <= 120
        alone = plan([(manifest, 1.0)], seed=seed, context=context, global_batch=1).sequences_per_epoch
        for epoch in range(int(mine.sum()) // alone):
            chosen = np.flatnonzero(mine)[epoch * alone : (epoch + 1) * alone]
            targets = rows.targets[chosen][rows.loss_weights[chosen] > 0]
            assert Counter(targets.tolist()) == Counter(expected)


@common
@given(lengths, shapes, windows, contexts, st.integers(1, 6), seeds)
def test_lanes_are_contiguous_and_keep_the_target_rule(lengths, shape, window_tokens, context, lanes, seed) -> None:
    manifest, expected = corpus(tuple(lengths), shape)
    made = plan(
        [(manifest, 1.0)], seed=seed, context=context, global_batch=lanes, layout="lanes", window_tokens=window_tokens
    )
    steps = made.sequences_per_epoch // lanes
    assert steps == ceil(ceil(len(expected) / lanes) / context)
    for epoch in range(2):
        batches = [made.batch(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert all(batch.reset.all() == (index == 0) for index, batch in enumerate(batches))
        assert sum(batch.reset.any() for batch in batches) == 1
        # A lane's sequences side by side must look like one long row.
        names = [name for name, array in vars(batches[0]).items() if array.ndim == 2]
        fields = {name: np.concatenate([getattr(batch, name) for batch in batches], axis=1) for name in names}
        long = PlanBatch(**fields, sample_ids=batches[0].sample_ids, reset=batches[0].reset)
        check_rows(long, seams=False)
        assert (long.positions[:, 0] == 0).all()
        assert sorted(long.targets[long.loss_weights > 0].tolist()) == sorted(expected)
        counts = (long.loss_weights > 0).sum(axis=1)
        assert counts.max() - counts.min() <= 1
        ids = [batch.sample_ids for batch in batches]
        assert np.concatenate(ids).tolist() == list(range(epoch * steps * lanes, (epoch + 1) * steps * lanes))


@settings(common, max_examples=12)
@given(st.lists(long_lengths, min_size=2, max_size=3), contexts, st.integers(3, 8), seeds)
def test_lanes_of_several_sources(sources, context, lanes, seed) -> None:
    built = [(*corpus(tuple(length), (2, 7), 1 + 1000 * i), float(i + 1)) for i, length in enumerate(sources)]
    made = plan([(m, w) for m, _, w in built], seed=seed, context=context, global_batch=lanes, layout="lanes")
    source_of = lane_sources([w for _, _, w in built], lanes)
    for index, (_, expected, _) in enumerate(built):
        mine = np.flatnonzero(source_of == index)
        steps = ceil(ceil(len(expected) / len(mine)) / context)
        for epoch in range(2):
            batches = list(made.batches(range(epoch * steps, (epoch + 1) * steps)))
            targets = np.concatenate([b.targets[mine][b.loss_weights[mine] > 0] for b in batches])
            assert sorted(targets.tolist()) == sorted(expected)
            assert [b.reset[mine].tolist() for b in batches] == [[s == 0] * len(mine) for s in range(steps)]


@common
@given(lengths, shapes, contexts, st.integers(1, 4), seeds, st.sampled_from(["packed", "lanes"]))
def test_parts_of_windows_give_the_same_batches_as_whole_windows(
    lengths, shape, context, global_batch, seed, layout
) -> None:
    manifest, _ = corpus(tuple(lengths), shape)
    arguments = {"seed": seed, "context": context, "global_batch": global_batch, "layout": layout}
    whole = plan([(manifest, 1.0)], **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_MIN_PART_PAIRS", 1)
        cut = Plan(whole._arguments, cache_bytes=1)
        # Shuffled packed windows are kept whole, because a batch takes sequences from all over them.
        longest = int(cut._tables[0].pairs.max())
        assert cut._reader.part_pairs == (context if layout == "lanes" else max(context, longest))
    for step in range(12):
        one, other = whole.batch(step), cut.batch(step)
        assert all(np.array_equal(array, getattr(other, name)) for name, array in vars(one).items())


@common
@given(lengths, shapes, contexts, st.integers(1, 5), st.sampled_from(["packed", "lanes"]))
def test_evaluation_covers_everything_once_in_order(lengths, shape, context, global_batch, layout) -> None:
    manifest, expected = corpus(tuple(lengths), shape)
    made = eval_plan(manifest, split="train", context=context, global_batch=global_batch, layout=layout)
    assert made.num_steps is not None
    rows = collect([made.batch(step) for step in range(made.num_steps + 2)])
    valid = rows.loss_weights > 0
    targets = rows.targets[valid].tolist()
    assert (targets if layout == "packed" else sorted(targets)) == list(expected)
    blank = ~valid.any(axis=1)
    assert (rows.sample_ids[blank] == -1).all() and (rows.sample_ids[~blank] >= 0).all()
    assert blank[made.num_steps * global_batch :].all()
    assert made.step_weights(range(made.num_steps + 2)).sum() == len(expected)
