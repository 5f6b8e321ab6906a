"""A worker from plain arguments on real shards: what `--local` runs, resumed, with metrics and exports."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glowflow.config.errors import CheckpointError, ConfigError
from glowflow.config.loader import to_dict
from glowflow.data.manifest import Manifest
from glowflow.data.plan import plan
from glowflow.data.stream import local_stream
from glowflow.training.callbacks import read_samples
from glowflow.training.checkpoint import latest_complete, read_extra
from glowflow.training.session import WorkerArgs, run_worker
from tests.data.synthetic import write_dataset
from tests.training.small_run import StopAt, small_config


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Documents of bytes that count upwards, so that there is something to learn."""
    generator = np.random.default_rng(0)

    def documents(count: int) -> list[np.ndarray]:
        lengths, firsts = generator.integers(5, 90, count), generator.integers(0, 60, count)
        return [np.concatenate([[256], (f + np.arange(n)) % 60, [256]]) for n, f in zip(lengths, firsts, strict=True)]

    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": documents(150), "validation": documents(30)}, token_dtype="uint16"
    )


def arguments(manifest: Manifest, run_dir: Path, *, resume: str | None = None, **overrides: Any) -> WorkerArgs:
    keys = {"model__vocab_size": None, "training__max_steps": 12, "training__checkpoint_interval": 4, **overrides}
    keys = {"training__val_interval": 6, "training__log_samples": True, "training__log_interval": 5, **keys}
    return WorkerArgs(to_dict(small_config(**keys)), str(run_dir), [(str(manifest.root), 1.0)], resume=resume)


def work(args: WorkerArgs, **options: Any) -> dict[str, Any]:
    # Through JSON, as a job or a Ray worker gets them.
    args = WorkerArgs.from_dict(json.loads(json.dumps(args.to_dict())))
    return run_worker(args, open_stream=local_stream, open_eval_stream=local_stream, **options)


def test_summary_points_samples_and_export(manifest: Manifest, tmp_path: Path) -> None:
    points: list[Any] = []
    checkpoints: list[Any] = []
    summary = work(
        arguments(manifest, tmp_path), sink=points.extend, on_checkpoint=lambda *args: checkpoints.append(args)
    )
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("FINISHED", 12, 12 * 96)
    assert summary["final"]["train_loss"] < math.log(257)
    assert set(summary["final"]) >= {
        "train_loss",
        "val_loss",
        "perplexity",
        "val_bits_per_byte",
        "grad_norm",
        "goodput",
    }
    assert summary["best"]["step"] in (6, 12)
    assert summary["tokens_per_second"] > 0 and 0 < summary["goodput"] <= 1
    assert [Path(path).name for path in summary["exports"]] == ["model-12.pt"]
    assert [Path(path).name for path in summary["checkpoints"]] == ["step-8", "step-12"]
    assert [step for step, _, _ in checkpoints] == [4, 8, 12]
    assert "val_loss" in checkpoints[-1][2]
    json.dumps(summary, allow_nan=False)

    keys = [(metric, step) for metric, step, _, _ in points]
    assert len(set(keys)) == len(keys)
    assert [step for metric, step in keys if metric == "train_loss"] == list(range(1, 13))
    assert [step for metric, step in keys if metric == "val_loss"] == [6, 12]

    ids = read_samples(tmp_path)
    train_plan = plan(
        [(manifest, 1.0)], seed=7, context=12, global_batch=8, window_tokens=small_config().data.window_tokens
    )
    assert list(ids) == list(range(12))
    assert all(ids[step] == train_plan.batch(step).sample_ids.tolist() for step in ids)
    content = torch.load(summary["exports"][0], weights_only=True)
    assert content["config"]["model"]["vocab_size"] == 257 and content["tokenizer"] == {"kind": "bytes"}


def test_bits_per_byte_has_the_right_denominator(manifest: Manifest, tmp_path: Path) -> None:
    summary = work(arguments(manifest, tmp_path, training__max_steps=2, training__val_batches=None))
    split = manifest.splits["validation"]
    targets = split.tokens - split.rows
    nats = summary["final"]["val_loss"] * targets
    assert summary["final"]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / split.text_bytes)


def test_automatic_resume_equals_an_uninterrupted_run(manifest: Manifest, tmp_path: Path) -> None:
    straight: list[Any] = []
    work(arguments(manifest, tmp_path / "straight", model__dropout=0.1), sink=straight.extend)
    parts: list[Any] = []
    stopper = StopAt(7)
    first = arguments(manifest, tmp_path / "parts", resume="auto", model__dropout=0.1)
    stopped = work(first, sink=parts.extend, stop_requested=lambda: stopper.stopped, callbacks=[stopper])
    assert (stopped["status"], stopped["steps"], stopped["resumed_from"]) == ("KILLED", 7, None)
    resumed = work(first, sink=parts.extend)
    assert resumed["resumed_from"].endswith("step-7") and resumed["status"] == "FINISHED"

    def curve(points: list[Any]) -> dict[Any, float]:
        names = ("train_loss", "grad_norm", "lr", "val_loss", "perplexity")
        return {(metric, step): value for metric, step, value, _ in points if metric in names}

    assert curve(parts) == curve(straight)
    assert read_samples(tmp_path / "parts") == read_samples(tmp_path / "straight")


def test_threads_come_from_the_checkpoint_unless_the_config_names_them(manifest: Manifest, tmp_path: Path) -> None:
    quick = {"training__val_batches": 1}
    assert work(arguments(manifest, tmp_path, training__max_steps=1, training__threads=2, **quick))["threads"] == 2
    assert read_extra(latest_complete(tmp_path) or Path())["threads"] == 2
    again = arguments(manifest, tmp_path, resume="auto", training__max_steps=2, training__threads=None, **quick)
    assert work(again)["threads"] == 2
    named = arguments(manifest, tmp_path, resume="auto", training__max_steps=3, training__threads=1, **quick)
    assert work(named)["threads"] == 1


def test_weights_of_a_file_are_where_training_starts(manifest: Manifest, tmp_path: Path) -> None:
    short = {"training__max_steps": 2, "training__warmup_steps": 1000}
    first = work(arguments(manifest, tmp_path / "a", training__max_steps=12))
    args = arguments(manifest, tmp_path / "b", **short)
    args.initial_weights = first["exports"][0]
    points: list[Any] = []
    work(args, sink=points.extend)
    losses = [value for metric, _, value, _ in points if metric == "train_loss"]
    assert losses[0] < math.log(257) - 0.1, "training went on from trained weights"


def test_weights_of_another_parametrisation_are_no_start(manifest: Manifest, tmp_path: Path) -> None:
    first = work(arguments(manifest, tmp_path / "a", training__max_steps=1, training__val_batches=1))
    args = arguments(manifest, tmp_path / "b", model__mup=True, model__base_dim=8)
    args.initial_weights = first["exports"][0]
    with pytest.raises(CheckpointError, match="are from under the standard parametrisation"):
        work(args)


def test_a_manifest_without_validation_split_trains_without(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = work(arguments(manifest, tmp_path, training__max_steps=2, data__val_split="nothing"))
    assert "val_loss" not in summary["final"] and summary["best"] == {}
    assert "data.val_split" in caplog.text


def test_a_vocabulary_that_is_too_small_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size.*257"):
        work(arguments(manifest, tmp_path, model__vocab_size=100))


def test_another_seed_cannot_resume(manifest: Manifest, tmp_path: Path) -> None:
    work(arguments(manifest, tmp_path, training__max_steps=2))
    with pytest.raises(CheckpointError, match="another data plan"):
        work(arguments(manifest, tmp_path, resume="auto", training__seed=8))


def test_imports_where_only_torch_numpy_pydantic_and_yaml_are_installed() -> None:
    """The import contract of a bare GPU box: everything else is made unimportable."""
    code = """
import sys
allowed = set(sys.stdlib_module_names) | set(
    "glowflow torch torchgen functorch numpy pydantic pydantic_core annotated_types typing_inspection".split()
    + "yaml _yaml typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec".split()
)
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in allowed or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
import glowflow.training.session, glowflow.training.memory, glowflow.training.flops
assert not {"ray", "mlflow", "pyarrow"} & set(sys.modules)
try:
    import pyarrow
except ModuleNotFoundError:
    print("nothing else")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "nothing else"), done.stderr
