"""The plan as a function: fingerprint, look-up cost, rebuilding in other processes, mixture, errors."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.data import plan as plan_module
from glowflow.data.manifest import Manifest
from glowflow.data.mixture import Mixture, lane_sources
from glowflow.data.order import LRU, permutation
from glowflow.data.plan import Plan, eval_plan, plan, plan_from_spec, shared_plan
from tests.data.synthetic import numbered_documents, write_dataset

BASE = {"seed": 3, "context": 8, "global_batch": 4, "window_tokens": 64}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    lengths = [2 + (7 * i) % 23 for i in range(80)]
    documents = numbered_documents(lengths)
    splits = {"train": documents, "validation": documents[:9], "empty": [], "blank": [[1], [2]]}
    return write_dataset(tmp_path_factory.mktemp("plan"), splits, max_row_tokens=9)


def same(one: Plan, other: Plan, steps: int = 12) -> bool:
    pairs = ((one.batch(step), other.batch(step)) for step in range(steps))
    return all(np.array_equal(array, getattr(b, name)) for a, b in pairs for name, array in vars(a).items())


def test_two_plans_with_equal_arguments_are_equal_and_another_seed_differs(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], **BASE)
    assert same(made, plan([(manifest, 1.0)], **BASE))
    assert not same(made, plan([(manifest, 1.0)], **{**BASE, "seed": 4}))


def test_order_of_reading_does_not_matter(manifest: Manifest) -> None:
    forward, backward = plan([(manifest, 1.0)], **BASE), plan([(manifest, 1.0)], **BASE)
    steps = list(range(0, 60, 7))
    there = {step: forward.batch(step).tokens for step in steps}
    back = {step: backward.batch(step).tokens for step in reversed(steps)}
    assert all(np.array_equal(there[step], back[step]) for step in steps)


@pytest.mark.parametrize("layout", ["packed", "lanes"])
def test_epochs_are_shuffled_differently(manifest: Manifest, layout: str) -> None:
    made = plan([(manifest, 1.0)], **BASE, layout=layout)
    epoch = made.sequences_per_epoch // made.global_batch
    first, second = ([made.batch(e * epoch + s).tokens for s in range(epoch)] for e in range(2))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))


def test_the_order_is_the_published_one(manifest: Manifest) -> None:
    """Changing it breaks the resume of running experiments: raise ``ALGORITHM`` in arguments.py with these values."""
    digests = {}
    for layout in ("packed", "lanes"):
        made = plan([(manifest, 2.0), (manifest, 1.0)], **BASE, layout=layout)
        tokens = np.concatenate([made.batch(step).targets for step in range(40)])
        digests[layout] = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16]
    assert digests == {"packed": "e86c09a58e74ae28", "lanes": "14b4b3e16687f344"}
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]


def test_every_argument_enters_the_fingerprint(manifest: Manifest, tmp_path: Path) -> None:
    other = write_dataset(tmp_path, {"train": numbered_documents([30, 30]), "validation": numbered_documents([9])})
    base = dict(sources=[(manifest, 1.0), (other, 1.0)], layout="packed", split="train", **BASE)
    changes = [
        {"sources": [(manifest, 1.0)]},
        {"sources": [(other, 1.0), (manifest, 1.0)]},
        {"sources": [(manifest, 1.0), (other, 1.5)]},
        {"seed": 5},
        {"context": 9},
        {"global_batch": 5},
        {"layout": "lanes"},
        {"split": "validation"},
        {"window_tokens": 65},
    ]
    prints = [plan(**{**base, **change}).fingerprint for change in [{}, *changes]]
    prints.append(eval_plan(manifest, split="train", context=8, global_batch=4).fingerprint)
    assert len(set(prints)) == len(prints)
    assert plan(**base).fingerprint == prints[0]


def test_epoch_and_cursor(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], **BASE)
    halfway = made.sequences_per_epoch / made.global_batch / 2
    assert made.epoch(0) == 0.0
    assert made.epoch(int(halfway)) == pytest.approx(0.5, abs=0.05)
    step = made.sequences_per_epoch  # after as many epochs as the batch has sequences
    assert made.cursor(step) == {"epoch": 4, "step": step, "fingerprint": made.fingerprint}
    assert json.loads(json.dumps(made.cursor(3)))["step"] == 3


def test_a_look_up_opens_only_its_own_windows(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], **BASE)
    assert made.num_windows > 10
    made.batch(10_000, 0, 1)
    assert made.windows_opened == 1
    made.step_weights(range(0, 1000))
    made.epoch(77)
    assert made.windows_opened == 1


def test_one_epoch_opens_every_window_once(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], **BASE)
    for _ in made.batches(range(made.sequences_per_epoch // made.global_batch)):
        pass
    assert made.windows_opened <= made.num_windows


def test_windows_keep_to_their_size(manifest: Manifest) -> None:
    table = plan([(manifest, 1.0)], **BASE)._tables[0]
    largest_group = max(g.tokens for s in manifest.split("train").shards for g in s.row_groups)
    assert (table.pairs + table.rows).max() < BASE["window_tokens"] + largest_group
    assert table.total_pairs == manifest.split("train").tokens - manifest.split("train").rows


def test_memory_stays_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 30_000).astype(np.uint8) for _ in range(200)]
    big = write_dataset(tmp_path, {"train": documents}, rows_per_group=5, token_dtype="uint8")
    limit = 1 << 20
    arguments = plan([(big, 1.0)], seed=0, context=512, global_batch=8, window_tokens=300_000)._arguments
    made = Plan(arguments, cache_bytes=limit)
    tracemalloc.start()
    for _ in made.batches(range(0, 1500, 1)):
        assert made.cached_bytes <= limit + 600_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.windows_opened >= 20, "the whole corpus of 6 MB was read"
    assert peak < 5 << 20


def test_lanes_side_by_side_do_not_push_each_other_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_MIN_PART_PAIRS", 512)
    lanes, total = 8, 300 * 199
    documents = numbered_documents([200] * 300)
    built = write_dataset(tmp_path, {"train": documents}, rows_per_group=10)
    arguments = {"seed": 0, "context": 16, "global_batch": lanes, "layout": "lanes", "window_tokens": 4000}
    made = Plan(plan([(built, 1.0)], **arguments)._arguments, cache_bytes=1)
    steps = made.sequences_per_epoch // lanes
    for step in range(steps):
        made.batch(step)
    assert made._reader.part_pairs == 512
    parts = total / 512 + made.num_windows  # a window's last part is shorter
    assert made.num_windows <= made.windows_opened <= parts + lanes


@pytest.mark.parametrize("layout", ["packed", "lanes"])
def test_rebuilt_from_a_pickle_and_from_its_spec(manifest: Manifest, layout: str) -> None:
    made = plan([(manifest, 1.0), (manifest, 2.0)], **BASE, layout=layout)
    made.batch(0)
    spec = json.loads(json.dumps(made.spec()))
    for other in (pickle.loads(pickle.dumps(made)), plan_from_spec(spec), shared_plan(spec)):
        assert other.fingerprint == made.fingerprint
        assert same(made, other, 5)
    assert shared_plan(spec) is shared_plan(dict(spec))
    assert len(pickle.dumps(made)) < 60_000, "decoded windows stay behind"
    evaluation = eval_plan(manifest, split="validation", context=8, global_batch=2, layout=layout)
    assert same(plan_from_spec(evaluation.spec()), evaluation)


def test_spec_of_a_data_set_that_changed_is_refused(tmp_path: Path) -> None:
    documents = numbered_documents([40, 50])
    made = plan([(write_dataset(tmp_path / "set", {"train": documents}), 1.0)], **BASE)
    spec = made.spec()
    write_dataset(tmp_path / "set", {"train": documents[::-1]})
    with pytest.raises(DataError, match="changed"):
        plan_from_spec(spec)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(DataError, match="does not exist"):
        plan_from_spec(spec)


def test_a_shard_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    whole = write_dataset(tmp_path / "set", {"train": numbered_documents([40, 50])})
    other = write_dataset(tmp_path / "other", {"train": numbered_documents([40, 51])})
    name = whole.split("train").shards[0].path
    shutil.copy(other.root / name, whole.root / name)
    with pytest.raises(DataError, match=name):
        plan([(whole, 1.0)], **BASE).batch(0)


def test_a_missing_shard_is_a_data_error(tmp_path: Path) -> None:
    whole = write_dataset(tmp_path / "set", {"train": numbered_documents([40, 50])})
    whole.shard_path(whole.split("train").shards[0]).unlink()
    with pytest.raises(DataError):
        plan([(whole, 1.0)], **BASE).batch(0)


def test_threads_may_share_a_plan(manifest: Manifest) -> None:
    made, alone = plan([(manifest, 1.0)], **BASE), plan([(manifest, 1.0)], **BASE)
    wanted = [alone.batch(step).tokens for step in range(60)]
    wrong: list[int] = []

    def read(first: int) -> None:
        wrong.extend(s for s in range(first, 60, 2) if not np.array_equal(made.batch(s).tokens, wanted[s]))

    threads = [threading.Thread(target=read, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"split": "nowhere"}, "no such split"),
        ({"split": "empty"}, "no target token"),
        ({"split": "blank"}, "no target token"),
        ({"context": 0}, "data.context"),
        ({"global_batch": 0}, "training.batch_size"),
        ({"seed": -1}, "training.seed"),
        ({"layout": "diagonal"}, "packed, lanes"),
        ({"window_tokens": 0}, "data.window_tokens"),
        ({"sources": []}, "at least one source"),
    ],
)
def test_bad_arguments(manifest: Manifest, change: dict, word: str) -> None:
    with pytest.raises(DataError, match=word):
        plan(**{"sources": [(manifest, 1.0)], **BASE, **change})


def test_all_problems_are_reported_at_once(manifest: Manifest, tmp_path: Path) -> None:
    other = write_dataset(tmp_path, {"train": numbered_documents([9])}, tokenizer_fingerprint="letters", name="letters")
    with pytest.raises(DataError) as caught:
        plan([(manifest, -1.0), (other, 1.0)], seed=0, context=0, global_batch=4, split="validation")
    assert len(caught.value.problems) == 4
    for word in ("context", "weight", "no such split", "synthetic and letters differ"):
        assert word in str(caught.value)


def test_rows_that_do_not_exist_are_a_programming_error(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], **BASE)
    for arguments in ((-1,), (0, 3, 2), (0, 0, 5)):
        with pytest.raises(ValueError, match="not in a global batch of 4"):
            made.batch(*arguments)


def test_context_longer_than_the_corpus_is_padded(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], seed=0, context=5000, global_batch=1)
    assert made.sequences_per_epoch == 1
    batch = made.batch(0)
    assert batch.loss_weights.sum() == made.targets_per_epoch == made.step_weight(0)


weights = st.lists(st.sampled_from([0.001, 0.1, 1.0, 2.5, 10.0]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights, st.integers(0, 50), st.integers(0, 2**40))
def test_mixture_counts_are_exact_and_gapless(shares: list[float], seed: int, somewhere: int) -> None:
    mixture = Mixture(shares, seed)
    block = somewhere // mixture.block_size
    at = block * mixture.block_size
    exact = np.array(shares) / sum(shares) * at
    assert np.abs(mixture.counts_before_block(block) - exact).max() <= 1 + at * 1e-12
    source, index = mixture.locate(np.arange(at, at + 2 * mixture.block_size))
    for number in range(len(shares)):
        mine = index[source == number]
        assert len(mine) >= 2
        assert np.array_equal(mine, mixture.count_before(number, at) + np.arange(len(mine)))
        middle = at + mixture.block_size + 17
        assert mixture.count_before(number, middle) - mixture.count_before(number, at) == (
            np.count_nonzero(source[: middle - at] == number)
        )


def test_a_share_too_small_to_be_seen_is_refused() -> None:
    with pytest.raises(DataError, match="weight"):
        Mixture([1.0, 1e-9], 0)


def test_lanes_are_dealt_out_by_weight_and_evenly_spread() -> None:
    assert np.bincount(lane_sources([3.0, 1.0], 8)).tolist() == [6, 2]
    assert np.bincount(lane_sources([1000.0, 1.0, 1.0], 4)).tolist() == [2, 1, 1]
    assert lane_sources([1.0, 1.0], 4).tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="at least the number of sources"):
        lane_sources([1.0, 1.0, 1.0], 2)


def test_permutations_are_permutations_and_depend_on_every_part_of_the_key() -> None:
    assert sorted(permutation(1000, 5, 6).tolist()) == list(range(1000))
    assert len({tuple(permutation(20, *key)) for key in [(1, 2), (2, 1), (1, 3), (1, 2, 1), (2**70, 2)]}) == 5
    assert permutation(0, 1).tolist() == []


def test_lru_keeps_to_its_limit_and_keeps_the_newest() -> None:
    cache: LRU[str, int] = LRU(10, weigh=lambda value: value)
    for key, value in (("a", 4), ("b", 4)):
        cache.put(key, value)
    assert cache.get("a") == 4
    cache.put("c", 5)
    assert (cache.get("b"), cache.get("a"), cache.total) == (None, 4, 9)
    cache.put("d", 50)
    assert (len(cache), cache.get("d")) == (1, 50)
    cache.put("d", 3)
    assert cache.total == 3
