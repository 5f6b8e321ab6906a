"""Batches for ranks: what the loop gets from a plan, how streams end, fail and are closed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from glowflow.config.errors import DataError
from glowflow.core.batch import Batch
from glowflow.data.items import ItemMaker, RankShare
from glowflow.data.manifest import Manifest
from glowflow.data.payload import pack, unpack
from glowflow.data.plan import Plan, plan
from glowflow.data.stream import _unpacked, local_stream, ray_stream, to_batch
from tests.data.synthetic import numbered_documents, write_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    documents = numbered_documents([3 + (5 * i) % 17 for i in range(120)])
    return write_dataset(tmp_path_factory.mktemp("stream"), {"train": documents})


def make(manifest: Manifest, **changes: object) -> Plan:
    arguments = {"seed": 1, "context": 8, "global_batch": 12, "window_tokens": 100, **changes}
    return plan([(manifest, 1.0)], **arguments)  # type: ignore[arg-type]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def data_threads() -> int:
    return sum(thread.name == "glowflow-data" for thread in threading.enumerate())


def test_to_batch_has_the_types_and_values_of_the_record(manifest: Manifest) -> None:
    rows = make(manifest).batch(3)
    batch = to_batch(rows)
    for name, tensor in tensors(batch).items():
        expected = {"loss_weights": torch.float32, "reset": torch.bool}.get(name, torch.int64)
        assert tensor.dtype == expected, name
        assert np.array_equal(tensor.numpy(), getattr(rows, name)), name
    assert batch.single_document is False


def test_without_document_mask_a_row_counts_as_one_document(manifest: Manifest) -> None:
    batch = to_batch(make(manifest).batch(3), document_mask=False)
    assert batch.single_document
    assert not batch.document_ids.any()
    assert torch.equal(batch.positions, torch.arange(8).expand(12, 8))


def test_single_document_means_that_a_causal_mask_is_exact(tmp_path: Path) -> None:
    long = write_dataset(tmp_path / "long", {"train": numbered_documents([500])})
    made = make(long, context=32, global_batch=1)
    batches = [to_batch(made.batch(step)) for step in range(made.sequences_per_epoch)]
    assert all(batch.single_document for batch in batches)
    assert any((batch.loss_weights == 0).any() for batch in batches), "padding at the end does not matter"
    pair = write_dataset(tmp_path / "pair", {"train": numbered_documents([10, 10])})
    assert not to_batch(make(pair, context=32, global_batch=1).batch(0)).single_document


@pytest.mark.parametrize(("world_size", "grad_accum_steps"), [(1, 1), (1, 4), (2, 3), (4, 1), (3, 2)])
@pytest.mark.parametrize("layout", ["packed", "lanes"])
def test_ranks_and_micro_batches_cut_the_global_batch_in_order(
    manifest: Manifest, world_size: int, grad_accum_steps: int, layout: str
) -> None:
    made = make(manifest, layout=layout)
    streams = [
        list(local_stream(made, 5, 12, rank=r, world_size=world_size, grad_accum_steps=grad_accum_steps))
        for r in range(world_size)
    ]
    for index, step in enumerate(range(5, 12)):
        parts = [batch for stream in streams for batch in stream[index].micro_batches]
        assert {len(stream[index].micro_batches) for stream in streams} == {grad_accum_steps}
        assert {stream[index].step for stream in streams} == {step}
        whole = tensors(to_batch(made.batch(step)))
        for name, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([tensors(part)[name] for part in parts])), name
        weight = float(whole["loss_weights"].sum())
        assert {stream[index].global_weight for stream in streams} == {weight}


def test_a_stream_starts_at_any_step(manifest: Manifest) -> None:
    made = make(manifest)
    whole = list(local_stream(made, 0, 30))
    for start in (1, 17, 29):
        for one, other in zip(local_stream(made, start, 30), whole[start:], strict=True):
            assert one.step == other.step
            assert torch.equal(one.micro_batches[0].tokens, other.micro_batches[0].tokens)
    assert list(local_stream(made, 30, 30)) == []
    assert list(ray_stream(made, 30, 30)) == []


@pytest.mark.parametrize("open_stream", [local_stream, ray_stream])
def test_a_global_batch_that_cannot_be_divided_is_refused_at_once(manifest: Manifest, open_stream) -> None:
    with pytest.raises(DataError, match=r"training.batch_size.*5 x 1.*12"):
        open_stream(make(manifest), 0, 5, rank=0, world_size=5)
    with pytest.raises(DataError, match="multiple"):
        open_stream(make(manifest), 0, 5, rank=1, world_size=2, grad_accum_steps=4)
    with pytest.raises(ValueError, match="rank 2"):
        open_stream(make(manifest), 0, 5, rank=2, world_size=2)


def test_an_error_of_the_producer_reaches_the_consumer(tmp_path: Path) -> None:
    lost = write_dataset(tmp_path, {"train": numbered_documents([50, 60])})
    made = make(lost)
    lost.shard_path(lost.split("train").shards[0]).unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet"):
        next(local_stream(made, 0, 5))
    assert data_threads() == 0


def test_an_unforeseen_error_becomes_a_data_error(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(manifest)
    stream = local_stream(made, 0, 10**6, prefetch=1)
    next(stream)
    monkeypatch.setattr(made, "step_weight", None)
    with pytest.raises(DataError, match="TypeError"):
        for _ in stream:
            pass


def test_closing_early_ends_the_thread(manifest: Manifest) -> None:
    stream = local_stream(make(manifest), 0, 10**9, prefetch=2)
    next(stream)
    assert data_threads() == 1
    stream.close()
    assert data_threads() == 0


def test_prefetch_hides_the_work_and_the_wait_is_measured(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(manifest)
    fast = made.step_weight

    def slow(step: int) -> int:
        time.sleep(0.02)
        return fast(step)

    monkeypatch.setattr(made, "step_weight", slow)
    hungry = [item.wait_seconds for item in local_stream(made, 0, 10)]
    assert sum(hungry) > 0.15
    waits = []
    for item in local_stream(made, 0, 10):
        waits.append(item.wait_seconds)
        time.sleep(0.06)
    assert np.median(waits[1:]) < 0.01


def test_the_thread_does_not_run_ahead_of_its_limit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(manifest)
    weight, made_steps = made.step_weight, []

    def recorded(step: int) -> int:
        made_steps.append(step)
        return weight(step)

    monkeypatch.setattr(made, "step_weight", recorded)
    stream = local_stream(made, 0, 10**6, prefetch=3)
    next(stream)
    time.sleep(0.3)
    assert max(made_steps) <= 1 + 3
    stream.close()


def test_items_of_a_ray_stream_carry_the_same_batches(manifest: Manifest) -> None:
    """The task of ``ray_stream`` in this process: no cluster needed to prove that its payload loses nothing."""
    made = make(manifest)
    share = RankShare(12, 1, 2, 3)
    maker = ItemMaker(made.spec(), share, 4, 15, 4)
    local = list(local_stream(made, 4, 15, rank=1, world_size=2, grad_accum_steps=3))
    items = [step for i in range(maker.num_items) for step in _unpacked(maker.payload(made, i), maker, i, True)]
    for one, other in zip(items, local, strict=True):
        assert (one.step, one.global_weight) == (other.step, other.global_weight)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a.single_document == b.single_document
            assert all(torch.equal(value, tensors(b)[name]) for name, value in tensors(a).items())


def test_an_item_reports_an_error_as_data(tmp_path: Path) -> None:
    lost = write_dataset(tmp_path, {"train": numbered_documents([50, 60])})
    maker = ItemMaker(make(lost).spec(), RankShare(12, 0, 1, 1), 0, 10, 4)
    lost.shard_path(lost.split("train").shards[0]).unlink()
    table = maker.table(2)
    assert table["id"].to_pylist() == [2]
    assert table["payload"].to_pylist() == [b""]
    assert "train-00000.parquet" in table["error"].to_pylist()[0]


def test_pack_keeps_values_and_is_narrow() -> None:
    arrays = {
        "small": np.array([[0, 255]], np.int32),
        "signed": np.array([-1, 40_000], np.int64),
        "flags": np.array([True, False]),
        "whole": np.array([0.0, 1.0], np.float32),
        "parts": np.array([0.5, 1.0], np.float32),
        "empty": np.zeros((0, 3), np.int32),
    }
    found = unpack(pack(arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array), name
        assert found[name].shape == array.shape
    widths = {name: array.dtype.itemsize for name, array in found.items()}
    assert widths == {"small": 1, "signed": 4, "flags": 1, "whole": 1, "parts": 4, "empty": 4}
