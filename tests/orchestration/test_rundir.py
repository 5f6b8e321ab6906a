"""Which run is meant, that two drivers never share one, and what may change when it goes on."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from glowflow.config.errors import CheckpointError, ConfigError, RunError
from glowflow.config.loader import apply_overrides, load_config, to_yaml
from glowflow.orchestration.rundir import fixed_key_problems, locate, lock_run, resume_config
from glowflow.tracking.runrecord import RunRecord


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    config = apply_overrides(load_config(None), {"tracking.run": "mine", "training.max_steps": 50})
    (folder / "config.yaml").write_text(to_yaml(config))
    RunRecord("mine").save(folder)
    return folder


def test_a_run_is_found_by_name_and_by_path(run_dir: Path) -> None:
    for target in ("mine", run_dir):
        point = locate(target, run_dir.parent)
        assert (point.run_dir, point.checkpoint) == (run_dir, None)


def test_an_unknown_run_is_refused_with_a_suggestion(run_dir: Path) -> None:
    with pytest.raises(RunError, match="did you mean 'mine'"):
        locate("mime", run_dir.parent)
    with pytest.raises(RunError, match="holds no runs"):
        locate("mine", run_dir.parent / "elsewhere")


def test_a_named_checkpoint_must_be_whole(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-10"
    checkpoint.mkdir(parents=True)
    for target in (checkpoint, Path("mine/checkpoints/step-10")):
        with pytest.raises(CheckpointError, match=r"COMPLETE\.json"):
            locate(target, run_dir.parent)


def test_what_decides_the_numbers_cannot_change_and_all_of_it_is_named(run_dir: Path) -> None:
    changes = ["training.lr=0.5", "data.context=64", "model.depth=2", "training.optimizer.eps=1e-6"]
    with pytest.raises(ConfigError) as caught:
        resume_config(run_dir, [*changes, "tracking.run=other", "training.max_steps=80"])
    assert sorted(problem.key for problem in caught.value.problems) == [
        "data.context",
        "model.depth",
        "tracking.run",
        "training.lr",
        "training.optimizer.eps",
    ]
    assert "it was 0.001" in str(caught.value)


def test_where_it_runs_and_how_long_may_change(run_dir: Path) -> None:
    changes = {
        "resources.workers": 2,
        "training.max_steps": 80,
        "training.micro_batch_size": 4,
        "training.checkpoint_interval": 7,
        "tracking.backend": "jsonl",
        "data.steps_per_item": 3,
        "model.attention.backend": "reference",
    }
    changed = resume_config(run_dir, changes)
    assert (changed.resources.workers, changed.training.max_steps, changed.data.steps_per_item) == (2, 80, 3)
    assert (changed.tracking.run, changed.tracking.storage) == ("mine", str(run_dir.parent))
    assert resume_config(run_dir, ["training.lr=1e-3"]).training.lr == 1e-3  # the same value is no change


def test_a_moved_run_directory_goes_on_where_it_is(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "new" / "mine"
    moved.parent.mkdir()
    run_dir.rename(moved)
    assert resume_config(moved, []).tracking.storage == str(moved.parent)


def test_nested_keys_are_compared_one_by_one() -> None:
    old: dict[str, Any] = {"model": {"attention": {"kind": "dense", "backend": "auto"}}, "resources": {"workers": 1}}
    new: dict[str, Any] = {"model": {"attention": {"kind": "wide", "backend": "sdpa"}}, "resources": {"workers": 4}}
    assert [problem.key for problem in fixed_key_problems(old, new)] == ["model.attention.kind"]


def _hold(folder: str, ready: Any, leave: Any) -> None:
    with lock_run(Path(folder)):
        ready.set()
        leave.wait(30)


def test_a_second_driver_is_refused_until_the_first_is_gone_however_it_went(run_dir: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(run_dir), ready, leave))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunError, match=rf"still running.*{holder.pid}"), lock_run(run_dir):
            pass
    finally:
        holder.kill()
        holder.join()
    with lock_run(run_dir):
        pass
