"""Plans of samples with media: the order, the weights, resume, several sources, what is read when."""

from __future__ import annotations

import json
import pickle
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.config.loader import load_config
from glowflow.data.manifest import Manifest
from glowflow.data.plan import Plan, eval_plan, plan, plan_from_spec, shared_plan
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import ByteTokenizer
from glowflow.data.samples.arrange import bucketed, shuffled_partners
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.sample import PreparedSample
from glowflow.data.samples.view import MediaView, media_view
from tests.data.media_sets import MIXED, MediaRow, mixed_rows, png, tone, write_media_set
from tests.data.synthetic import numbered_documents, write_dataset

ROWS = 73


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rows = mixed_rows(ROWS, sizes=(8, 12, 20))
    return write_media_set(tmp_path_factory.mktemp("samples"), {"train": rows, "validation": rows[:10], "empty": []})


def view(training: bool = True, **changes: Any) -> MediaView:
    return replace(media_view(load_config(MIXED), training=training), **changes)


def make(manifest: Manifest, seen: MediaView | None = None, **changes: Any) -> SamplePlan:
    arguments = {"seed": 3, "context": 128, "global_batch": 6, "window_tokens": 400, **changes}
    return plan([(manifest, 1.0)], layout="bucketed", view=seen or view(), **arguments)


def equal(one: PreparedSample, other: PreparedSample) -> bool:
    arrays = ("tokens", "targets", "weights")
    plain = ("sample_id", "document_id", "label", "name", "group", "bad", "num_prompt")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and all(getattr(one, name) == getattr(other, name) for name in plain)
        and len(one.items) == len(other.items)
        and all(
            np.array_equal(a.features, b.features)
            and (a.modality, a.position, a.slots, a.present) == (b.modality, b.position, b.slots, b.present)
            for a, b in zip(one.items, other.items, strict=True)
        )
    )


def run(made: SamplePlan, steps: range, start: int = 0, stop: int | None = None) -> list[PreparedSample]:
    return [sample for samples in made.samples(steps, start, stop) for sample in samples]


# -- the order --------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    rows=st.integers(1, 60),
    global_batch=st.integers(1, 12),
    rows_per_group=st.integers(1, 9),
    window_tokens=st.sampled_from([1, 100, 1000, 10**6]),
    seed=st.integers(0, 5),
)
def test_every_sample_comes_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    global_batch: int,
    rows_per_group: int,
    window_tokens: int,
    seed: int,
) -> None:
    texts = [MediaRow("word " * (1 + number % 7)) for number in range(rows)]
    built = write_media_set(tmp_path_factory.mktemp("once"), {"train": texts}, rows_per_group=rows_per_group)
    made = make(built, seed=seed, global_batch=global_batch, window_tokens=window_tokens)
    epochs = 3
    found = run(made, range(-(-epochs * rows // global_batch)))
    assert made.sequences_per_epoch == rows
    assert [sample.sample_id for sample in found] == list(range(len(found)))
    for epoch in range(epochs):
        documents = [sample.document_id for sample in found[epoch * rows : (epoch + 1) * rows]]
        assert sorted(documents) == list(range(rows))


def test_epochs_and_seeds_differ_and_equal_arguments_do_not(manifest: Manifest) -> None:
    def order(made: SamplePlan, first: int) -> list[int]:
        return [sample.document_id for sample in run(made, range(first, first + 12))]

    first = order(make(manifest), 0)
    assert first == order(make(manifest), 0)
    assert first != order(make(manifest, seed=4), 0)
    assert first != order(make(manifest), 12)


def test_the_order_is_the_published_one(manifest: Manifest) -> None:
    """Changing it breaks the resume of running experiments: raise ``SAMPLE_ALGORITHM`` with these values."""
    found = [sample.document_id for sample in run(make(manifest), range(2))]
    assert found == [68, 64, 63, 66, 71, 61, 60, 65, 67, 72, 70, 62]


@settings(max_examples=20)
@given(start=st.integers(0, 60), world_size=st.sampled_from([1, 2, 3, 6]))
def test_ranks_together_read_what_one_reads_from_any_step_on(manifest: Manifest, start: int, world_size: int) -> None:
    whole, other = make(manifest), make(manifest)
    size = 6 // world_size
    expected = run(whole, range(start, start + 2))
    parts = [
        [list(samples) for samples in other.samples(range(start, start + 2), rank * size, (rank + 1) * size)]
        for rank in reversed(range(world_size))
    ][::-1]
    together = [sample for step in range(2) for part in parts for sample in part[step]]
    assert all(equal(one, two) for one, two in zip(together, expected, strict=True))


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 500), st.integers(0, 9))
def test_groups_are_cut_where_global_batches_are(total: int, global_batch: int, base: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signature, lengths = rng.integers(0, 3, total), rng.integers(1, 50, total)
    order = bucketed(signature, lengths, base, global_batch, (seed, 0, 0, 0))
    assert sorted(order.tolist()) == list(range(total))
    if total <= 16 * global_batch:  # one pool: groups are runs of the sorted rows, so their ranges do not overlap
        keys = signature[order] * 1000 + lengths[order]
        first = -base % global_batch
        edges = sorted({0, *range(first, total, global_batch), total})
        ranges = sorted((keys[a:b].min(), keys[a:b].max()) for a, b in pairwise(edges))
        assert all(low >= high for (_, high), (low, _) in pairwise(ranges))


def test_bucketing_leaves_little_to_pad() -> None:
    """A skewed set: most are short, a few long. Padding is that of each batch of 16 to its longest."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(512, np.exp(rng.normal(3.0, 1.0, 4096)).astype(np.int64) + 1)
    alike = lengths[bucketed(np.zeros(4096, np.int64), lengths, 0, 16, (0, 0, 0, 0))].reshape(-1, 16)
    mixed = rng.permutation(lengths).reshape(-1, 16)
    padded = [float((rows.max(1, keepdims=True) - rows).sum() / rows.sum()) for rows in (alike, mixed)]
    assert padded[0] < 0.2 * padded[1]
    # The batches themselves still follow each other at random, and so do the rows in them.
    means = alike.mean(1)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2
    assert 0.3 < (np.diff(alike, axis=1) > 0).mean() / (np.diff(alike, axis=1) != 0).mean() < 0.7


def test_samples_of_a_batch_have_the_same_media(manifest: Manifest) -> None:
    made = make(manifest, window_tokens=10**6)
    kinds = [
        {tuple(sum(item.modality == name for item in sample.items) for name in ("image", "audio")) for sample in step}
        for step in made.samples(range(12))
    ]
    assert np.mean([len(kind) for kind in kinds]) < 2


# -- weights and numbers ----------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    step=st.integers(0, 40),
    text=st.sampled_from([0.0, 1.0, 0.5]),
    image=st.sampled_from([0.0, 0.25]),
    prompt_loss=st.booleans(),
    context=st.sampled_from([128, 24, 9]),
    places=st.booleans(),
)
def test_the_weights_of_a_batch_are_those_of_the_plan_and_rows_fit(
    manifest: Manifest, step: int, text: float, image: float, prompt_loss: bool, context: int, places: bool
) -> None:
    seen = view(prompt_loss=prompt_loss, places=places, on_long_sample="truncate")
    seen = replace(seen, loss_weights=seen.loss_weights.model_copy(update={"text": text, "image": image}))
    made = make(manifest, seen, context=context)
    samples = run(made, range(step, step + 1))
    assert max(len(sample.tokens) for sample in samples) <= context
    assert sum(float(sample.weights.sum()) for sample in samples) == pytest.approx(made.step_weight(step), abs=1e-6)
    assert made.step_weights(range(step, step + 3)).tolist() == [made.step_weight(step + k) for k in range(3)]
    for sample in samples:
        assert len(sample.tokens) == len(sample.targets) == len(sample.weights) >= 1
        assert not sample.targets[sample.weights == 0].any()


def test_epoch_cursor_and_the_end_of_an_evaluation(manifest: Manifest) -> None:
    made = make(manifest)
    assert made.num_steps is None
    assert made.epoch(0) == 0.0
    assert made.epoch(ROWS) == 6.0
    assert made.cursor(ROWS) == {"epoch": 6, "step": ROWS, "fingerprint": made.fingerprint}
    ended = eval_plan(
        manifest, split="validation", context=128, global_batch=4, layout="bucketed", view=view(training=False)
    )
    found = run(ended, range(3))
    assert ended.num_steps == 3
    assert [sample.document_id for sample in found] == [*range(ROWS, ROWS + 10), -1, -1]
    assert [sample.sample_id for sample in found] == [*range(10), -1, -1]
    assert all(not sample.weights.any() and not sample.items for sample in found[10:])


def test_opening_reads_nothing_and_a_look_up_only_its_own_windows(manifest: Manifest) -> None:
    made = make(manifest)
    assert made.num_windows > 4
    assert (made.windows_opened, made.cached_bytes, made.sequences_per_epoch) == (0, 0, ROWS)
    made.epoch(100_000)
    assert made.windows_opened == 0
    list(made.samples(range(10_000, 10_001), 0, 1))
    assert made.windows_opened == 1


def test_media_are_read_once_a_window_and_kept_within_the_limit(tmp_path: Path) -> None:
    rows = [MediaRow("<image> a", images=[png(16, 16, seed=number)]) for number in range(120)]
    built = write_media_set(tmp_path, {"train": rows}, rows_per_group=6)
    made = SamplePlan(make(built, context=256, window_tokens=30)._arguments, cache_bytes=1)
    assert made.num_windows == 20
    list(made.samples(range(20)))
    assert made._media.groups_read == 20, "each row group once, since a step has the rows of one"
    assert made.cached_bytes < 200_000


def test_equal_files_of_a_row_group_are_kept_once(tmp_path: Path) -> None:
    picture = png(64, 64)
    rows = [MediaRow(f"<image> {number}", images=[picture]) for number in range(40)]
    made = make(write_media_set(tmp_path, {"train": rows}, rows_per_group=40), context=512)
    list(made.samples(range(1)))
    assert made._media.nbytes < 2 * len(picture)


# -- arguments --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_has_all_that_changes_a_batch_and_no_more(manifest: Manifest) -> None:
    seen = view()
    changes = [
        {"places": False},
        {"task": "classification"},
        {"prompt_loss": True},
        {"without": ("image",)},
        {"pairing": "shuffled"},
        {"modality_dropout": 0.3},
        {"image": seen.image.model_copy(update={"longest": 12})},
        {"audio": seen.audio.model_copy(update={"mels": 20})},
        {"image_encoder": seen.image_encoder.model_copy(update={"patch": 8})},
        {"loss_weights": seen.loss_weights.model_copy(update={"image": 1.0})},
    ]
    prints = [make(manifest, replace(seen, **change)).fingerprint for change in ({}, *changes)]
    assert len(set(prints)) == len(prints)
    policies = {"on_bad_sample": "error", "max_bad_fraction": 0.5, "on_long_sample": "truncate"}
    assert make(manifest, replace(seen, **policies)).fingerprint == prints[0], "a run may go on with another policy"
    other = make(manifest, replace(seen, modalities=("audio",)))
    unread = {"image": seen.image.model_copy(update={"longest": 12})}
    assert make(manifest, replace(seen, modalities=("audio",), **unread)).fingerprint == other.fingerprint


def test_evaluation_does_not_depend_on_what_training_makes_random(manifest: Manifest) -> None:
    calm = {
        **MIXED,
        "data": {**MIXED["data"], "modality_dropout": 0.0, "image": {"size": None, "longest": 16, "multiple": 4}},
    }
    calm["data"] |= {"audio": {"rate": 8000, "n_fft": 200, "hop": 80, "mels": 16}}
    prints = {make(manifest, media_view(load_config(config), training=False)).fingerprint for config in (MIXED, calm)}
    assert len(prints) == 1


def test_rebuilt_from_a_pickle_and_from_its_spec(manifest: Manifest) -> None:
    made = make(manifest)
    first = run(made, range(4))
    spec = json.loads(json.dumps(made.spec()))
    for other in (pickle.loads(pickle.dumps(made)), plan_from_spec(spec), shared_plan(spec)):
        assert isinstance(other, SamplePlan)
        assert other.fingerprint == made.fingerprint
        assert all(equal(one, two) for one, two in zip(first, run(other, range(4)), strict=True))
    assert len(pickle.dumps(made)) < 30_000, "what was read stays behind"


def test_layout_and_view_belong_together(manifest: Manifest) -> None:
    arguments = {"seed": 0, "context": 8, "global_batch": 2}
    with pytest.raises(ValueError, match="view"):
        plan([(manifest, 1.0)], layout="bucketed", **arguments)
    with pytest.raises(ValueError, match="view"):
        plan([(manifest, 1.0)], layout="packed", view=view(), **arguments)
    assert isinstance(plan([(manifest, 1.0)], **arguments), Plan)


def test_problems_are_told_at_once(manifest: Manifest) -> None:
    with pytest.raises(DataError) as caught:
        make(manifest, seed=-1, context=0, split="nowhere")
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="no sample"):
        make(manifest, split="empty")


def test_threads_may_share_a_plan(manifest: Manifest) -> None:
    made, alone = make(manifest), make(manifest)
    wanted = [run(alone, range(step, step + 1)) for step in range(24)]
    wrong: list[int] = []

    def read(first: int) -> None:
        for step in range(first, 24, 2):
            found = run(made, range(step, step + 1))
            wrong.extend(step for one, two in zip(found, wanted[step], strict=True) if not equal(one, two))

    threads = [threading.Thread(target=read, args=(index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- several sources --------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight_and_one_may_be_text_alone(manifest: Manifest, tmp_path: Path) -> None:
    tokenizer = MediaTokenizer(ByteTokenizer())
    documents = [np.minimum(document, 255) for document in numbered_documents([9, 30, 4, 17] * 5)]
    text = write_dataset(
        tmp_path, {"train": documents}, token_dtype=str(tokenizer.dtype), tokenizer_fingerprint=tokenizer.fingerprint
    )
    arguments = {"seed": 1, "context": 128, "global_batch": 64, "layout": "bucketed", "view": view()}
    made = plan([(manifest, 3.0), (text, 1.0)], **arguments)
    found = run(made, range(16))
    assert sum(sample.name.startswith("synthetic") for sample in found) == 256
    mine = [sample.document_id for sample in found if not sample.name.startswith("synthetic")][:ROWS]
    assert sorted(mine) == list(range(ROWS))
    for step in (0, 7):
        total = sum(float(sample.weights.sum()) for sample in found[64 * step : 64 * (step + 1)])
        assert total == pytest.approx(made.step_weight(step))


def test_text_alone_makes_a_plan_of_its_documents(tmp_path: Path) -> None:
    documents = numbered_documents([5, 9, 2, 7, 12])
    built = write_dataset(tmp_path, {"train": documents})
    made = plan([(built, 1.0)], seed=0, context=16, global_batch=5, layout="bucketed", view=MediaView())
    found = {sample.document_id: sample for sample in run(made, range(1))}
    for number, document in enumerate(documents):
        assert found[number].tokens.tolist() == document[:-1].tolist()
        assert found[number].targets.tolist() == document[1:].tolist()


# -- long samples, bad shards -----------------------------------------------------------------------------------------


def test_long_samples_are_told_with_their_number_and_length(manifest: Manifest) -> None:
    made = make(manifest, context=12, window_tokens=10**6)
    with pytest.raises(DataError, match=r"data.context: (\d+) of 73 samples of media.*the longest has \d+") as caught:
        made.step_weight(0)
    assert "data.on_long_sample=truncate" in str(caught.value)
    longest = int(str(caught.value).split("longest has ")[1].split()[0].rstrip(",;:("))
    make(manifest, context=longest, window_tokens=10**6).step_weight(0)
    with pytest.raises(DataError, match=r"1 of 73|2 of 73|3 of 73"):
        make(manifest, context=longest - 1, window_tokens=10**6).step_weight(0)


def test_a_shard_that_is_not_what_the_manifest_says(manifest: Manifest, tmp_path: Path) -> None:
    built = write_media_set(tmp_path / "one", {"train": mixed_rows(10)})
    other = write_media_set(tmp_path / "two", {"train": mixed_rows(9)})
    made = make(built)
    path = built.shard_path(built.split("train").shards[0])
    path.write_bytes(other.shard_path(other.split("train").shards[0]).read_bytes())
    with pytest.raises(DataError, match=r"train-00000\.parquet.*rows"):
        made.step_weight(0)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet"):
        make(built).step_weight(0)


def test_placeholders_without_media_are_a_damaged_shard(tmp_path: Path) -> None:
    built = write_media_set(tmp_path, {"train": [MediaRow("<image> but none")]})
    with pytest.raises(DataError, match="as many placeholders as media"):
        make(built).step_weight(0)


# -- pairs at random --------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 8), st.integers(0, 20))
def test_partners_are_a_permutation_that_avoids_the_own_group(rows: int, kinds: int, each: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signature, groups = rng.integers(0, kinds, rows), np.arange(rows) // each
    partner = shuffled_partners(signature, groups, (seed, 0, 0, 0))
    assert sorted(partner.tolist()) == list(range(rows))
    assert (signature[partner] == signature).all()
    for kind in range(1, kinds):
        mine = np.flatnonzero(signature == kind)
        largest = np.bincount(groups[mine]).max() if len(mine) else 0
        if len(mine) and 2 * largest <= len(mine):
            assert (groups[partner[mine]] != groups[mine]).all()
    assert (partner[signature == 0] == np.flatnonzero(signature == 0)).all()


def test_shuffled_pairs_move_media_with_their_sizes_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        MediaRow(f"<image> number {number}", images=[png(4 + 4 * (number % 4), 8, seed=number)], audio=[])
        for number in range(12)
    ] + [MediaRow("<audio> x", audio=[tone()]), MediaRow("text")]
    built = write_media_set(tmp_path, {"train": rows})
    plain = view(training=False)

    def evaluated(seen: MediaView) -> list[PreparedSample]:
        made = eval_plan(built, split="train", context=128, global_batch=14, layout="bucketed", view=seen)
        assert made.step_weight(0) == sum(float(s.weights.sum()) for s in run(made, range(1)))
        return run(made, range(1))

    matched, moved = evaluated(plain), evaluated(replace(plain, pairing="shuffled"))
    pictures = [sample.items[0].features.tobytes() for sample in matched[:12]]
    swapped = [sample.items[0].features.tobytes() for sample in moved[:12]]
    assert sorted(pictures) == sorted(swapped)
    assert all(one != two for one, two in zip(pictures, swapped, strict=True))
    for one, two in zip(matched, moved, strict=True):
        assert (one.document_id, one.targets[-1]) == (two.document_id, two.targets[-1])
        assert [item.slots for item in two.items] == [
            plain.num_tokens(
                item.modality, item.features.shape[:2] if item.modality == "image" else item.features.shape
            )
            for item in two.items
        ]
    assert equal(matched[12], moved[12])
    assert equal(matched[13], moved[13])
