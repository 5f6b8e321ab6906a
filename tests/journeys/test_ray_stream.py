"""The Ray stream gives what the local stream gives: from any step, on two CPUs, in bounded memory."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.journey

from glowflow.config.errors import DataError  # noqa: E402
from glowflow.config.loader import load_config  # noqa: E402
from glowflow.core.batch import Batch, StepBatches  # noqa: E402
from glowflow.data.manifest import Manifest  # noqa: E402
from glowflow.data.plan import Plan, plan  # noqa: E402
from glowflow.data.samples.view import media_view  # noqa: E402
from glowflow.data.stream import local_stream, ray_stream  # noqa: E402
from tests.data.media_sets import MIXED, mixed_rows, write_media_set  # noqa: E402
from tests.data.synthetic import numbered_documents, write_dataset  # noqa: E402

STORE_BYTES = 100 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A private cluster of two logical CPUs; gives its address."""
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=STORE_BYTES, log_to_driver=False
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    documents = numbered_documents([3 + (11 * i) % 90 for i in range(300)])
    return write_dataset(tmp_path_factory.mktemp("ray"), {"train": documents})


def make(manifest: Manifest, **changes: Any) -> Plan:
    return plan([(manifest, 1.0)], **{"seed": 1, "context": 16, "global_batch": 12, "window_tokens": 2000, **changes})


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def check_equal(one: StepBatches, other: StepBatches) -> None:
    assert (one.step, one.global_weight) == (other.step, other.global_weight)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        assert a.single_document == b.single_document
        for name, value in tensors(a).items():
            assert value.dtype == tensors(b)[name].dtype
            assert torch.equal(value, tensors(b)[name]), name
        assert a.modalities.keys() == b.modalities.keys()
        for modality, media in a.modalities.items():
            for name, value in vars(media).items():
                assert torch.equal(value, vars(b.modalities[modality])[name]), (modality, name)


@pytest.mark.parametrize(
    ("layout", "start", "mask"), [("packed", 0, True), ("lanes", 37, True), ("packed", 1234, False)]
)
def test_equals_the_local_stream_from_any_step(
    cluster: str, manifest: Manifest, layout: str, start: int, mask: bool
) -> None:
    made = make(manifest, layout=layout)
    arguments: dict[str, Any] = {"rank": 1, "world_size": 2, "grad_accum_steps": 3, "document_mask": mask}
    remote = list(ray_stream(made, start, start + 45, **arguments, steps_per_item=7))
    local = list(local_stream(made, start, start + 45, **arguments))
    for one, other in zip(remote, local, strict=True):
        check_equal(one, other)
    assert remote[0].wait_seconds > 0


def test_samples_with_media_stream_as_they_do_locally_on_one_rank_or_two(cluster: str, tmp_path: Path) -> None:
    """Text, pictures and recordings with missing modalities, one blank among them; with 1 and 3 items at once."""
    rows = mixed_rows(70, sizes=(8, 12, 20))
    rows[8].audio = [b"no recording"]
    rows[8].facts = {"audio": [(400, 8000)]}
    built = write_media_set(tmp_path, {"train": rows})
    view = media_view(load_config(MIXED), training=True)
    made = plan([(built, 1.0)], seed=1, context=128, global_batch=4, layout="bucketed", view=view)
    whole = list(local_stream(made, 3, 40, grad_accum_steps=2))
    together: list[list[StepBatches]] = []
    for world_size, parallel in ((1, 3), (2, 1)):
        streams = []
        for rank in range(world_size):
            arguments = {"rank": rank, "world_size": world_size, "grad_accum_steps": 2 // world_size}
            streams.append(list(ray_stream(made, 3, 40, **arguments, steps_per_item=5, parallel_items=parallel)))
        together.append(
            [
                replace(parts[0], micro_batches=[batch for part in parts for batch in part.micro_batches])
                for parts in zip(*streams, strict=True)
            ]
        )
        blanks = [bad for stream in streams for step in stream for bad in step.bad_samples]
        assert set(blanks) == {("audio_header", "file-8 (document 8)")}
        assert len(blanks) in (2, 3)
    for steps in together:
        for one, other in zip(steps, whole, strict=True):
            check_equal(one, other)


def test_closing_early_frees_the_cpus_and_the_next_stream_runs(cluster: str, manifest: Manifest) -> None:
    made = make(manifest)
    for start in (0, 50):
        stream = ray_stream(made, start, 10**9, steps_per_item=4)
        assert [next(stream).step for _ in range(9)] == list(range(start, start + 9))
        stream.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 2.0


def test_no_thread_that_could_ask_ray_for_a_block_outlives_the_stream(cluster: str, manifest: Manifest) -> None:
    """Such a thread ends the process, without a word, when it asks after ``ray.shutdown()``."""
    before = set(threading.enumerate())
    stream = ray_stream(make(manifest, context=256, global_batch=64), 0, 10**6, steps_per_item=8)
    for _ in range(9):
        next(stream)
    readers = {thread.name for thread in set(threading.enumerate()) - before}
    assert "iter_threaded" in readers, "Ray Data names its threads differently: the stream must wait for those"
    stream.close()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert left <= {"Prefetcher"}, "that one is parked for good and asks for nothing any more"


def test_the_context_of_other_data_sets_stays_as_it_was(cluster: str, manifest: Manifest) -> None:
    context = ray.data.DataContext.get_current()
    before = (context.target_max_block_size, context.execution_options.preserve_order, context.enable_progress_bars)
    stream = ray_stream(make(manifest), 0, 4)
    next(stream)
    stream.close()
    context = ray.data.DataContext.get_current()
    after = (context.target_max_block_size, context.execution_options.preserve_order, context.enable_progress_bars)
    assert after == before


def test_an_error_in_a_task_reaches_the_consumer_with_its_own_words(cluster: str, tmp_path: Path) -> None:
    lost = write_dataset(tmp_path, {"train": numbered_documents([50, 60])})
    made = make(lost)
    lost.shard_path(lost.split("train").shards[0]).unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet") as caught:
        next(ray_stream(made, 0, 5))
    assert "Traceback" not in str(caught.value)


def test_two_workers_and_their_streams_run_on_two_cpus(cluster: str, manifest: Manifest) -> None:
    class Worker:  # local, so that it travels by value
        """Holds CPU as a training worker does, and reads the stream of its rank."""

        def read(self, made: Plan, rank: int, stop: int) -> list[np.ndarray]:
            stream = ray_stream(made, 0, stop, rank=rank, world_size=2, steps_per_item=8)
            return [step.micro_batches[0].tokens.numpy() for step in stream]

    made = make(manifest)
    workers = [ray.remote(Worker).options(num_cpus=0.75).remote() for _ in range(2)]
    read = ray.get([worker.read.remote(made, rank, 60) for rank, worker in enumerate(workers)], timeout=240)
    for worker in workers:
        ray.kill(worker)
    for step, parts in enumerate(zip(*read, strict=True)):
        assert np.array_equal(np.concatenate(parts), made.batch(step).tokens)


def test_the_object_store_stays_small_in_a_long_run(cluster: str, manifest: Manifest) -> None:
    from ray._private.internal_api import memory_summary

    # An item is 64 x 8 x 256 positions, about 1.5 MB; the whole stream would be a hundred times the store.
    made = make(manifest, context=256, global_batch=64)
    stream = ray_stream(made, 0, 8 * 10_000, steps_per_item=8, prefetch_items=2)
    used = []
    for step in stream:
        if step.step % 40 == 0:
            time.sleep(1.0)
            text = memory_summary(address=cluster, stats_only=True)
            assert "Spilled" not in text
            found = re.search(r"Plasma memory usage (\d+) MiB", text)
            assert found is not None
            used.append(int(found[1]))
        if step.step >= 400:
            break
    stream.close()
    assert used[0] > 0
    assert max(used) <= 40, used
    assert np.mean(used[-3:]) <= np.mean(used[:3]) + 15, "it does not grow with the steps"
