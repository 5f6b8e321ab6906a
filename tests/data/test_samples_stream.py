"""Streams of samples with media: what ranks get, items bounded in bytes, bad samples counted, named and limited."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glowflow.config.errors import DataError
from glowflow.config.loader import load_config
from glowflow.core.batch import Batch, StepBatches
from glowflow.data import stream as stream_module
from glowflow.data.items import ItemMaker, RankShare
from glowflow.data.manifest import Manifest
from glowflow.data.plan import eval_plan, plan
from glowflow.data.samples import policy
from glowflow.data.samples.collate import collate
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.sample import PreparedSample, blank_sample
from glowflow.data.samples.view import media_view
from glowflow.data.stream import _item_opener, local_stream, ray_stream
from tests.data.media_sets import MIXED, MediaRow, mixed_rows, png, tone, write_media_set

BAD = (4, 17, 18, 33)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rows = mixed_rows(40, sizes=(8, 12))
    for number in BAD:
        rows[number].images, rows[number].audio = [b"no picture"] * len(rows[number].images), rows[number].audio
        rows[number].facts = {"image": [(8, 8)] * len(rows[number].images)}
    rows[17].audio, rows[17].facts = [b"no recording"], {"audio": [(400, 8000)]}
    return write_media_set(tmp_path_factory.mktemp("stream"), {"train": rows})


def make(manifest: Manifest, global_batch: int = 8, **changes: Any) -> SamplePlan:
    view = replace(media_view(load_config(MIXED), training=True), **{"max_bad_fraction": 1.0, **changes})
    return plan([(manifest, 1.0)], seed=2, context=128, global_batch=global_batch, layout="bucketed", view=view)


def same(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> dict[str, torch.Tensor]:
        found = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        for name, media in batch.modalities.items():
            found |= {f"{name}.{key}": value for key, value in vars(media).items()}
        return found

    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("world_size", "grad_accum_steps"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_cut_the_global_batch_in_order(
    manifest: Manifest, world_size: int, grad_accum_steps: int
) -> None:
    made = make(manifest)
    streams = [
        list(local_stream(made, 3, 9, rank=rank, world_size=world_size, grad_accum_steps=grad_accum_steps))
        for rank in range(world_size)
    ]
    size = 8 // world_size // grad_accum_steps
    for index, (step, samples) in enumerate(zip(range(3, 9), make(manifest).samples(range(3, 9)), strict=True)):
        parts = [batch for steps in streams for batch in steps[index].micro_batches]
        expected = [collate(samples[first : first + size], made.view) for first in range(0, 8, size)]
        assert all(same(one, two) for one, two in zip(parts, expected, strict=True))
        assert {steps[index].step for steps in streams} == {step}
        assert {steps[index].global_weight for steps in streams} == {made.step_weight(step)}
        bad = [entry for steps in streams for entry in steps[index].bad_samples]
        assert bad == [(sample.bad.partition(":")[0], sample.name) for sample in samples if sample.bad]


def test_a_stream_starts_at_any_step(manifest: Manifest) -> None:
    whole = list(local_stream(make(manifest), 0, 12))
    for start in (1, 7, 11):
        for one, other in zip(local_stream(make(manifest), start, 12), whole[start:], strict=True):
            assert one.step == other.step
            assert same(one.micro_batches[0], other.micro_batches[0])
    assert list(local_stream(make(manifest), 4, 4)) == []


def test_items_of_a_ray_stream_carry_the_same_batches(manifest: Manifest) -> None:
    made = make(manifest)
    maker = ItemMaker(made.spec(), RankShare(8, 1, 2, 2), 2, 13, 4)
    opened = _item_opener(maker, True)
    items = [step for number in range(maker.num_items) for step in opened(maker.payload(made, number), number)]
    local = list(local_stream(made, 2, 13, rank=1, world_size=2, grad_accum_steps=2))
    assert [(one.step, one.global_weight) for one in items] == [(one.step, one.global_weight) for one in local]
    for one, other in zip(items, local, strict=True):
        assert one.bad_samples == other.bad_samples
        assert all(same(a, b) for a, b in zip(one.micro_batches, other.micro_batches, strict=True))


def test_the_last_rows_of_an_evaluation_are_blank_on_every_rank(manifest: Manifest) -> None:
    view = media_view(load_config(MIXED), training=False)
    made = eval_plan(manifest, split="train", context=128, global_batch=24, layout="bucketed", view=view)
    steps = list(local_stream(made, 0, 2, rank=1, world_size=2, grad_accum_steps=2))
    assert [int((batch.sample_ids >= 0).sum()) for batch in steps[1].micro_batches] == [4, 0]
    blank = steps[1].micro_batches[1]
    assert not blank.loss_weights.any()
    assert {name: media.present.tolist() for name, media in blank.modalities.items()} == {
        "image": [False],
        "audio": [False],
    }


# -- how much is held -------------------------------------------------------------------------------------------------


def opened_items(monkeypatch: pytest.MonkeyPatch, made: SamplePlan, **arguments: Any) -> dict[str, Any]:
    """What ``ray_stream`` would open."""
    found: dict[str, Any] = {}

    def record(maker: ItemMaker, item_bytes: int, document_mask: bool, prefetch_items: int, parallel: int) -> Any:
        found.update(steps=maker.steps_per_item, bytes=item_bytes, parallel=parallel)
        return iter(())

    monkeypatch.setattr(stream_module, "_ray_steps", record)
    ray_stream(made, 0, 1000, **arguments)
    return found


def test_items_are_bounded_in_prepared_and_in_encoded_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [MediaRow("<image> a", images=[png(200, 200, seed=number)]) for number in range(20)]
    built = write_media_set(tmp_path, {"train": rows}, rows_per_group=10)
    config = load_config({**MIXED, "data": {"context": 128, "image": {"size": 64}}})
    view = replace(media_view(config, training=True), places=False)

    def made(size: int) -> SamplePlan:
        seen = replace(view, image=view.image.model_copy(update={"size": size}))
        return plan([(built, 1.0)], seed=0, context=128, global_batch=8, layout="bucketed", view=seen)

    # A picture is 120 kB as a file: 4 MiB are 34 of them, four steps of eight.
    assert opened_items(monkeypatch, made(64))["steps"] == 4
    assert opened_items(monkeypatch, made(64), rank=0, world_size=2)["steps"] == 8
    assert opened_items(monkeypatch, made(64), steps_per_item=2)["steps"] == 2
    # Prepared at 512 x 512 it is 786 kB: 16 MiB are 21 of them.
    large = opened_items(monkeypatch, made(512))
    assert large["steps"] == 2
    assert 12 << 20 < large["bytes"] <= 16 << 20
    assert opened_items(monkeypatch, made(4096))["steps"] == 1


def test_with_media_two_items_are_made_at_once_over_all_ranks(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(manifest)
    assert opened_items(monkeypatch, made)["parallel"] == 2
    assert opened_items(monkeypatch, made, rank=0, world_size=2)["parallel"] == 1
    assert opened_items(monkeypatch, made, rank=0, world_size=4)["parallel"] == 1
    assert opened_items(monkeypatch, made, parallel_items=5)["parallel"] == 5
    assert opened_items(monkeypatch, make(manifest, modalities=()))["parallel"] == 1
    with pytest.raises(DataError, match=r"data\.parallel_items"):
        ray_stream(made, 0, 5, parallel_items=0)


def test_large_batches_are_not_kept_ready_by_the_dozen(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(stream_module, "_local_steps", lambda *arguments: limits.append(arguments[-1]) or iter(()))
    made = make(manifest)
    local_stream(made, 0, 5)
    monkeypatch.setattr(made, "sample_bytes", lambda step: 1 << 20)
    local_stream(made, 0, 5)  # 8 rows of 4 MiB of float32
    assert limits == [8, 2]


# -- bad samples ------------------------------------------------------------------------------------------------------


def sample(number: int, bad: str = "") -> PreparedSample:
    return replace(blank_sample(), sample_id=number, name=f"file-{number}", bad=bad)


def test_bad_samples_are_named_once_a_run(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    policy._named.clear()
    made = make(manifest)
    with caplog.at_level(logging.WARNING, "glowflow"):
        for _ in range(2):
            steps = list(local_stream(made, 0, 10))
    kinds = {entry for step in steps for entry in step.bad_samples}
    assert kinds == {("audio_header", "file-17 (document 17)")} | {
        ("image_header", f"file-{number} (document {number})")
        for number in (4, 18, 33)
        if mixed_rows(40)[number].images
    }
    named = [record.message for record in caplog.records if record.message.startswith("bad sample")]
    assert len(named) == len(kinds)
    assert all("weight 0" in message for message in named)


def test_only_the_first_ten_are_named(caplog: pytest.LogCaptureFixture) -> None:
    policy._named.clear()
    count = policy.BadSampleCount("some plan", most=1.0)
    with caplog.at_level(logging.WARNING, "glowflow"):
        for number in range(30):
            assert count.add([sample(number, "text: no text")]) == [("text", f"file-{number}")]
    assert len(caplog.records) == 10
    assert "only counted" in caplog.records[-1].message


def test_too_many_bad_samples_stop_the_run_beyond_the_first_ten() -> None:
    count = policy.BadSampleCount("another plan", most=0.1)
    for number in range(10):
        count.add([sample(number, "image_decode: broken")])
    with pytest.raises(DataError, match=r"data.max_bad_fraction.*11 of 11 samples.*image_decode 11.*file-0"):
        count.add([sample(10, "image_decode: broken")])
    count = policy.BadSampleCount("a third plan", most=0.1)
    for number in range(500):
        count.add([sample(number, "image_decode: broken" if number % 10 == 9 else ""), blank_sample()])
    with pytest.raises(DataError, match=r"51 of 501"):
        count.add([sample(501, "image_decode: broken")])


def test_the_limit_reaches_the_consumer_of_a_stream(tmp_path: Path) -> None:
    rows = [MediaRow("<audio> a", audio=[b"nothing"], facts={"audio": [(80, 8000)]}) for _ in range(12)]
    rows += [MediaRow("<audio> a", audio=[tone(0.01)])]
    made = make(write_media_set(tmp_path, {"train": rows}), global_batch=13, max_bad_fraction=0.5, modality_dropout=0.0)
    with pytest.raises(DataError, match="12 of 13 samples"):
        list[StepBatches](local_stream(made, 0, 3))


def test_an_error_in_a_task_travels_as_text(manifest: Manifest) -> None:
    made = make(manifest, on_bad_sample="error")
    maker = ItemMaker(made.spec(), RankShare(8, 0, 1, 1), 0, 10, 10)
    table = maker.table(0)
    assert "cannot be used" in table["error"].to_pylist()[0]
    assert np.array_equal(table["id"].to_numpy(), [0])
