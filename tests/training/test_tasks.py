"""Tasks over samples with media through a whole worker: streams, metrics, sizes from the data, resume, two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.errors import ConfigError, GlowFlowError
from glowflow.config.loader import apply_overrides, load_config, to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.stream import local_stream
from glowflow.training.callbacks import read_samples
from glowflow.training.checkpoint import latest_complete, load_full_state_dict, read_extra
from glowflow.training.data_sizes import with_data_sizes
from glowflow.training.memory import estimate_memory
from glowflow.training.plans import training_plan, validation_plan
from glowflow.training.session import WorkerArgs, run_worker
from tests.data.media_sets import MIXED, MediaRow, mixed_rows, png, write_media_set
from tests.data.synthetic import write_dataset
from tests.training.distributed import run_workers
from tests.training.small_run import StopAt

STEPS = 6


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Samples with every subset of the modalities, labelled by it; one was bad when it was built."""
    rows = mixed_rows(40)
    rows[7].bad = "image_decode: it is cut off"
    splits = {"train": rows, "validation": mixed_rows(11, seed=1)}
    return write_media_set(tmp_path_factory.mktemp("mixed"), splits)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Texts with one picture each, no labels."""
    rows = [MediaRow(f"<image> number {n}", images=[png(seed=n)]) for n in range(24)]
    return write_media_set(tmp_path_factory.mktemp("pictures"), {"train": rows[:16], "validation": rows[16:]})


def config_of(workers: int = 1, **overrides: Any) -> GlowFlowConfig:
    """Every random change of media is on; ``training__lr=1`` sets training.lr."""
    values = {
        "training.batch_size": 8, "training.max_steps": STEPS, "training.warmup_steps": 2, "training.lr": 3e-3,
        "training.log_interval": 2, "training.checkpoint_interval": 3, "training.val_interval": 3,
        "training.seed": 7, "training.threads": 1, "training.log_samples": True, "training.val_batches": None,
        "resources.workers": workers,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return apply_overrides(load_config(MIXED), values)


def work(
    manifest: Manifest, run_dir: Path, config: GlowFlowConfig, *, rank: int = 0, resume: str | None = None, **more: Any
) -> tuple[dict[str, Any], list[Any]]:
    """The summary, and all points (metric, step, value, time)."""
    points: list[Any] = []
    args = WorkerArgs(to_dict(config), str(run_dir), [(str(manifest.root), 1.0)], resume=resume)
    streams = {"open_stream": local_stream, "open_eval_stream": local_stream}
    ranks = {"rank": rank, "world_size": config.resources.workers}
    return run_worker(args, **streams, **ranks, sink=points.extend, **more), points


def curve(points: list[Any], *names: str) -> dict[Any, float]:
    return {(metric, step): value for metric, step, value, _ in points if metric in names}


NUMBERS = ("train_loss", "grad_norm", "train_accuracy", "val_loss", "val_accuracy", "tokens", "bad_samples", "epoch")


def test_a_language_model_over_media(manifest: Manifest, tmp_path: Path) -> None:
    config = config_of()
    summary, _ = work(manifest, tmp_path, config)
    assert summary["status"] == "FINISHED"
    assert set(summary["final"]) >= {"train_loss", "val_loss", "perplexity", "bad_samples"}
    assert "val_bits_per_byte" not in summary["final"], "targets are not the whole text"

    plan = training_plan(with_data_sizes(config, [manifest]), [(manifest, 1.0)])
    steps = list(plan.samples(range(STEPS)))
    assert summary["tokens"] == sum(len(sample.tokens) for step in steps for sample in step)
    assert summary["final"]["bad_samples"] == sum(bool(sample.bad) for step in steps for sample in step) > 0
    assert list(read_samples(tmp_path).values()) == [[sample.sample_id for sample in step] for step in steps]

    content = torch.load(summary["exports"][0], weights_only=True)
    assert content["config"]["model"]["vocab_size"] == manifest.tokenizer().vocab_size
    assert content["tokenizer"]["kind"] == "media"


@pytest.mark.parametrize("task", ["language_modelling", "classification"])
def test_resume_equals_an_uninterrupted_run(manifest: Manifest, tmp_path: Path, task: str) -> None:
    config = config_of(model__task=task, model__fusion="bottleneck", model__dropout=0.1, training__micro_batch_size=4)
    _, straight = work(manifest, tmp_path / "straight", config)
    stopper = StopAt(4)
    stop = {"stop_requested": lambda: stopper.stopped, "callbacks": [stopper]}
    stopped, first = work(manifest, tmp_path / "parts", config, resume="auto", **stop)
    assert (stopped["status"], stopped["steps"]) == ("KILLED", 4)
    resumed, second = work(manifest, tmp_path / "parts", config, resume="auto")
    assert resumed["resumed_from"].endswith("step-4") and resumed["status"] == "FINISHED"
    assert {**curve(first, *NUMBERS), **curve(second, *NUMBERS)} == {
        **curve(first, "tokens", "bad_samples", "epoch"), **curve(straight, *NUMBERS)
    }  # fmt: skip
    assert read_samples(tmp_path / "parts") == read_samples(tmp_path / "straight")


def test_a_classifier_knows_its_classes_from_the_data_and_learns_them(manifest: Manifest, tmp_path: Path) -> None:
    config = config_of(
        model__task="classification", data__modality_dropout=0.0, training__max_steps=40, training__val_interval=10,
        training__monitor_metrics=["val_accuracy"], training__monitor_mode="max",
    )  # fmt: skip
    summary, points = work(manifest, tmp_path, config)
    assert summary["final"].keys() >= {"train_accuracy", "val_accuracy", "val_loss"}
    assert not summary["final"].keys() & {"perplexity", "val_bits_per_byte"}
    assert len(curve(points, "train_accuracy")) == 40
    # Which modalities a sample has can be told from its placeholders alone.
    assert summary["final"]["val_accuracy"] > 0.5  # of 5 classes
    accuracies = curve(points, "val_accuracy")
    assert summary["best"]["val_accuracy"] == max(accuracies.values())
    assert read_extra(latest_complete(tmp_path) or Path())["config"]["model"]["num_classes"] == 5

    model = GlowFlowModel.load(summary["exports"][0])
    plan = validation_plan(model.config, manifest)
    assert plan is not None and model.config.model.num_classes == 5
    right = weight = 0.0
    for batches in local_stream(plan, 0, plan.num_steps):
        with torch.no_grad():
            output, _ = model.module.eval()(batches.micro_batches[0])
        right, weight = right + float(output.correct_sum), weight + float(output.weight_sum)
    assert weight == 11
    assert accuracies["val_accuracy", 40] == pytest.approx(right / weight)


def test_a_contrastive_model_of_pictures(pictures: Manifest, tmp_path: Path) -> None:
    config = config_of(
        model__task="contrastive", model__fusion="late", model__audio=None, training__max_steps=4,
        training__monitor_metrics=["val_recall_at_1"], training__monitor_mode="max", training__micro_batch_size=2,
    )  # fmt: skip
    summary, _ = work(pictures, tmp_path, config)
    assert set(summary["final"]) >= {"val_loss", "val_recall_at_1"} and summary["best"]["val_recall_at_1"] >= 0
    assert "perplexity" not in summary["final"]


def ranks(manifest_root: str, run_dir: Path) -> Any:
    manifest = Manifest.load(manifest_root)
    found = {}
    for task in ("language_modelling", "classification"):
        config = config_of(2, model__task=task, training__strategy="fsdp", training__micro_batch_size=2)
        summary, points = work(manifest, run_dir / task, config, rank=torch.distributed.get_rank())
        found[task] = (summary["tokens"], curve(points, *NUMBERS))
    return found


def test_two_workers_equal_one(manifest: Manifest, tmp_path: Path) -> None:
    two = run_workers(2, ranks, str(manifest.root), tmp_path / "two", timeout=120)
    for task, (tokens, numbers) in two[0].items():
        summary, points = work(manifest, tmp_path / task, config_of(model__task=task))
        assert summary["tokens"] == tokens
        assert numbers == pytest.approx(curve(points, *NUMBERS), rel=1e-4)
        assert read_samples(tmp_path / "two" / task) == read_samples(tmp_path / task)


def test_an_encoder_starts_from_a_file_stays_frozen_and_needs_no_file_again(manifest: Manifest, tmp_path: Path) -> None:
    donor = Path(work(manifest, tmp_path / "donor", config_of(training__max_steps=3))[0]["exports"][0])
    given = GlowFlowModel.load(donor).module.state_dict()
    image = {**MIXED["model"]["image"], "checkpoint": str(donor), "frozen": True}
    config = config_of(model__image=image, training__seed=8)
    work(manifest, tmp_path / "run", config, stop_requested=lambda: True)
    donor.unlink()
    summary, _ = work(manifest, tmp_path / "run", config, resume="auto")
    assert summary["status"] == "FINISHED"
    state = load_full_state_dict(latest_complete(tmp_path / "run") or Path())
    frozen = {name for name in given if name.startswith(("image_encoder.stem", "image_encoder.blocks"))}
    assert frozen
    for name in frozen:
        assert torch.equal(state[name], given[name])
    assert not torch.equal(state["image_encoder.projection.weight"], given["image_encoder.projection.weight"])
    with pytest.raises(GlowFlowError, match=r"model\.image\.checkpoint.*does not exist"):
        work(manifest, tmp_path / "again", config)


def test_sophia_g_samples_classes(manifest: Manifest, tmp_path: Path) -> None:
    config = config_of(model__task="classification", training__optimizer={"name": "sophia-g", "hessian_interval": 2})
    summary, _ = work(manifest, tmp_path, config)
    assert summary["status"] == "FINISHED" and summary["final"]["nonfinite_steps"] == 0


# -- what cannot be trained -------------------------------------------------------------------------------------------


def refused(manifest: Manifest, config: GlowFlowConfig, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        with_data_sizes(config, [manifest])


def test_labels_are_needed_and_must_be_as_many(manifest: Manifest, pictures: Manifest) -> None:
    refused(pictures, config_of(model__task="classification"), r"pictures|media.*has no labels.*data\.columns\.label")
    refused(manifest, config_of(model__task="classification", model__num_classes=4), r"num_classes.*the 5 labels")


def test_a_model_of_text_does_not_read_media(manifest: Manifest) -> None:
    transformer = load_config(None, ["model.arch=transformer"])
    refused(manifest, transformer, r"model\.arch: reads text only.*set model\.arch: multimodal")
    bucketed = load_config(None, ["model.arch=transformer", "data.layout=bucketed"])
    refused(manifest, bucketed, "reads text only")


def test_a_model_of_media_reads_text_alone(tmp_path: Path) -> None:
    texts = {"train": [list(range(3, 3 + n % 20 + 2)) for n in range(20)], "validation": [[1, 2, 3, 4]] * 3}
    manifest = write_dataset(tmp_path / "data", texts, token_dtype="uint16")
    summary, _ = work(manifest, tmp_path / "run", config_of(training__max_steps=2))
    assert summary["status"] == "FINISHED" and summary["final"]["val_bits_per_byte"] > 0


def test_the_smallest_accuracy_is_not_the_best(manifest: Manifest, tmp_path: Path) -> None:
    config = config_of(model__task="classification", training__monitor_metrics=["val_accuracy"])
    with pytest.raises(ConfigError, match=r"training\.monitor_mode: must be max for val_accuracy"):
        work(manifest, tmp_path, config)


# -- before anything is started ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention", "bottleneck", "late", "mixture"])
def test_memory_is_estimated_with_media(manifest: Manifest, fusion: str) -> None:
    config = with_data_sizes(config_of(model__fusion=fusion), [manifest])
    small = estimate_memory(config, device_type="cpu")
    larger = estimate_memory(apply_overrides(config, {"data.image.longest": 32}), device_type="cpu")
    assert larger.activations > small.activations > 0
    assert json.dumps(small.parts())


def test_frozen_weights_have_no_gradients_in_the_estimate(manifest: Manifest) -> None:
    config = with_data_sizes(config_of(), [manifest])
    whole = estimate_memory(config, device_type="cpu")
    frozen = estimate_memory(apply_overrides(config, {"model.image.frozen": True}), device_type="cpu")
    assert frozen.parameters == whole.parameters
    assert frozen.gradients < whole.gradients and frozen.optimizer < whole.optimizer
