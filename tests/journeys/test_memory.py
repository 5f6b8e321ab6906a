"""Memory stays bounded however large the corpus: four files of 1 GiB, 200 steps that read more than 1 GiB."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from glowflow.data.build import BuildOptions, build
from glowflow.orchestration.pipeline import TrainingPipeline

GIB = 2**30
CONTEXT, BATCH, STEPS = 2048, 2640, 200
USS_LIMIT = 1.5 * GIB
STORE_LIMIT_GIB = 1.0


class _Watch(threading.Thread):
    """Samples the unshared memory of the training workers and what the object store holds and spills."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worst_uss: dict[int, int] = {}
        self.worst_store = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "RayTrainWorker" in " ".join(process.cmdline()[:1]):
                        uss = process.memory_full_info().uss
                        self.worst_uss[process.pid] = max(uss, self.worst_uss.get(process.pid, 0))
                except psutil.Error:
                    continue
            self.worst_store = max(self.worst_store, _store_bytes())


def _store_bytes() -> int:
    """Bytes in use in the object store of the cluster that this process is connected to; 0 without one."""
    import ray

    if not ray.is_initialized():
        return 0
    try:
        total = ray.cluster_resources().get("object_store_memory", 0)
        return int(total - ray.available_resources().get("object_store_memory", 0))
    except Exception:  # the cluster is going down
        return 0


@pytest.mark.slow
@pytest.mark.journey
def test_workers_and_object_store_stay_small(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    block = bytes(range(32, 127)) * (2**20 // 95) + b"\n"
    for number in range(4):
        with (corpus / f"{number}.txt").open("wb") as file:
            for _ in range(GIB // len(block)):
                file.write(block)
    manifest = build(str(corpus), tmp_path / "built", "bytes", options=BuildOptions(), use_ray=False)
    assert manifest.splits["train"].tokens > 2 * GIB
    watch = _Watch()
    watch.start()
    began = time.monotonic()
    record = TrainingPipeline(
        {"model": {"arch": "tests.journeys.unigram:Unigram"}},
        dataset=str(tmp_path / "built"),
        accelerator="cpu",
        **{
            "data.context": CONTEXT,
            "data.steps_per_item": 1,
            "data.verify": "size",
            "training.batch_size": BATCH,
            "training.micro_batch_size": BATCH // 8,
            "training.max_steps": STEPS,
            "training.warmup_steps": 0,
            "training.val_batches": 1,
            "resources.workers": 2,
            "resources.object_store_gib": STORE_LIMIT_GIB,
            "tracking.storage": str(tmp_path / "runs"),
            "tracking.backend": "jsonl",
        },
    ).fit(progress=False)
    watch.stop.set()
    watch.join()
    print(
        f"{record.tokens:,} tokens in {time.monotonic() - began:.0f} s; worst USS in GiB of the workers "
        f"{[round(uss / GIB, 2) for uss in watch.worst_uss.values()]}, object store {watch.worst_store / GIB:.2f} GiB"
    )
    assert record.status == "FINISHED" and record.steps == STEPS
    assert record.tokens >= GIB
    assert len(watch.worst_uss) == 2
    assert max(watch.worst_uss.values()) < USS_LIMIT
    assert watch.worst_store <= STORE_LIMIT_GIB * GIB
