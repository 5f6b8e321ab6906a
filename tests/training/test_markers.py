"""Checkpoints are whole or do not count: kills, damage, hostile files, pruning, and which one a person means."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from glowflow.config.errors import CheckpointError
from glowflow.training import markers
from glowflow.training.checkpoint import (
    CheckpointInfo,
    CheckpointStore,
    latest_complete,
    list_checkpoints,
    load_full_state_dict,
    read_extra,
    resolve_checkpoint,
    verify,
)
from glowflow.training.markers import MARKER, best_checkpoint, checkpoint_path, write_marker
from tests.training.distributed import WorkerError, run_workers
from tests.training.small_trainer import Trainer, assert_equal


@pytest.fixture(scope="module")
def trained() -> Trainer:
    """After three steps; tests must not train it further."""
    trainer = Trainer()
    trainer.train(0, 1, 2)
    return trainer


@pytest.fixture
def saved(trained: Trainer, tmp_path: Path) -> Path:
    """A complete checkpoint RUN/checkpoints/step-3."""
    return trained.save(tmp_path / "run", 3)


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_at_most_one_is_in_flight(trained: Trainer, tmp_path: Path) -> None:
    store = trained.store(tmp_path)
    done: list[int] = []
    release = threading.Event()

    def slow(info: CheckpointInfo) -> None:
        assert info.complete and (info.path / MARKER).is_file()
        release.wait(30)
        done.append(info.step)

    store.save(1, trained.module, None, {}, {}, on_complete=slow)
    threading.Timer(0.3, release.set).start()
    store.save(2, trained.module, None, {}, {}, on_complete=lambda info: done.append(info.step))
    assert done[0] == 1, "the second was begun before the first was complete"
    store.wait()
    assert done == [1, 2]


def killed_before_the_marker(run_dir: Path) -> None:
    """Runs in a process of its own, which is killed when every tensor is on disk but the marker is not."""
    trainer = Trainer()
    trainer.save(run_dir, 1)
    markers.write_marker = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    trainer.train(0)
    trainer.save(run_dir, 2)


def test_a_killed_save_is_ignored_and_then_written_over(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="exit code -9"):
        run_workers(1, killed_before_the_marker, tmp_path)
    assert [(info.step, info.complete) for info in list_checkpoints(tmp_path)] == [(1, True), (2, False)]
    assert any(checkpoint_path(tmp_path, 2).glob("*.distcp")), "killed too early to prove anything"
    assert latest_complete(tmp_path) == checkpoint_path(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"COMPLETE.json.*step-1 \(complete\), step-2 \(incomplete\)"):
        resolve_checkpoint(checkpoint_path(tmp_path, 2))

    (checkpoint_path(tmp_path, 2) / "leftover").write_text("x")
    trainer = Trainer()
    path = trainer.save(tmp_path, 2)
    assert latest_complete(tmp_path) == path and not verify(path)
    assert not (path / "leftover").exists()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = _once(tmp_path_factory)
    files = sorted(file for file in path.iterdir() if file.name != MARKER)
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(bytes(damaged))
        assert [problem.key for problem in verify(path)] == [str(file)]
    finally:
        file.write_bytes(content)
    assert verify(path) == []


_SAVED: list[Path] = []


def _once(factory: pytest.TempPathFactory) -> Path:
    if not _SAVED:
        _SAVED.append(Trainer().save(factory.mktemp("flipped"), 1))
    return _SAVED[0]


def test_truncated_and_missing_files_are_found_all_at_once(saved: Path) -> None:
    shard = next(saved.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (saved / "extra.json").unlink()
    problems = verify(saved)
    assert sorted(Path(problem.key).name for problem in problems) == sorted([shard.name, "extra.json"])
    assert verify(saved.parent / "step-99")[0].hint == "there is step-3 (complete)"


@pytest.mark.parametrize("marker", ["", "{}", "[1]", '{"version": 99}', '{"version": 1, "step": "x"}'])
def test_an_unreadable_marker_is_no_marker(saved: Path, marker: str) -> None:
    (saved / MARKER).write_text(marker)
    assert verify(saved) and latest_complete(saved.parent.parent) is None
    with pytest.raises(CheckpointError):
        read_extra(saved)


def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_search(
    trained: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = trained.save(tmp_path, 1), trained.save(tmp_path, 2)
    shard = next(second.glob("*.distcp"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    other = Trainer()
    before = other.state()
    with pytest.raises(CheckpointError, match=rf"step-2 cannot be loaded.*{shard.name}.*is damaged"):
        other.store(tmp_path).load(second, other.module, other.optimizer)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_full_state_dict(second)
    assert_equal(before, other.state())
    assert latest_complete(tmp_path) == second
    assert latest_complete(tmp_path, check=True) == first
    assert "step-2 is damaged and passed over" in caplog.text


def test_an_index_that_would_run_code_is_refused(saved: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    info = markers.read_info(saved)
    assert info is not None
    (saved / ".metadata").write_bytes(pickle.dumps(Payload()))
    write_marker(saved, step=3, sequence=0, world_size=1, metrics={})  # hashes agree: only the reader protects
    assert verify(saved) == []
    with pytest.raises(CheckpointError, match="mkdir"):
        load_full_state_dict(saved)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("of", "name", "refused"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", False),
        (_MEM_FORMAT_ENCODING, "mro", True),
        (int, "real", True),
    ],
)
def test_members_of_enums_alone_may_be_named_by_getattr(
    saved: Path, tmp_path: Path, of: type, name: str, refused: bool
) -> None:
    """As Python before 3.11.4 pickles them."""

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return getattr, (of, name)

    (saved / ".metadata").write_bytes(pickle.dumps(Payload()))
    write_marker(saved, step=3, sequence=0, world_size=1, metrics={})
    # A member is read, and then found to be no index.
    with pytest.raises(CheckpointError, match="it names|asks for an attribute" if refused else "is not the index"):
        load_full_state_dict(saved)


def test_storage_that_cannot_be_written_is_an_error(trained: Trainer, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step-1: cannot be written"):
        trained.store(tmp_path).save(1, trained.module, trained.optimizer, {}, {})


# -- which are kept, which is meant -----------------------------------------------------------------------------------


def save_all(trainer: Trainer, run_dir: Path, losses: dict[int, float], **options: Any) -> CheckpointStore:
    store = trainer.store(run_dir, best_metric="val_loss", **options)
    for step, loss in losses.items():
        store.save(step, trainer.module, None, {}, {"val_loss": loss})
    store.wait()
    return store


def test_the_newest_and_the_best_are_kept(trained: Trainer, tmp_path: Path) -> None:
    save_all(trained, tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5}, keep=2)
    assert [info.step for info in list_checkpoints(tmp_path)] == [2, 4, 5]
    best = best_checkpoint(tmp_path, "val_loss")
    assert best is not None and (best.step, best.metrics) == (2, {"val_loss": 1.0})
    save_all(trained, tmp_path, {6: 9.0, 7: 1.0}, keep=1, best_mode="max")
    assert [info.step for info in list_checkpoints(tmp_path)] == [6, 7]


def test_after_going_back_the_newer_checkpoint_is_the_one_written_last(trained: Trainer, tmp_path: Path) -> None:
    save_all(trained, tmp_path, {10: 1.0, 20: 0.5, 30: 0.9}, keep=3)
    checkpoint_path(tmp_path, 25).mkdir()  # what a crash left
    save_all(trained, tmp_path, {15: 0.8}, keep=2)  # resumed from 10
    assert latest_complete(tmp_path) == checkpoint_path(tmp_path, 15)
    assert [info.step for info in list_checkpoints(tmp_path)] == [15, 20, 30]
    save_all(trained, tmp_path, {20: 0.7}, keep=2)  # gets there again: replaces the abandoned one
    assert [(info.step, info.metrics["val_loss"]) for info in list_checkpoints(tmp_path)] == [(15, 0.8), (20, 0.7)]
    assert verify(checkpoint_path(tmp_path, 20)) == []


def test_a_target_is_a_run_or_a_checkpoint(trained: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="neither a run directory nor"):
        resolve_checkpoint(run)
    run.mkdir()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; there is no step-N directory"):
        resolve_checkpoint(run)
    save_all(trained, run, {1: 1.0, 2: 2.0}, keep=5)
    checkpoint_path(run, 3).mkdir()
    assert resolve_checkpoint(str(run)) == checkpoint_path(run, 2)
    assert resolve_checkpoint(run / "checkpoints") == checkpoint_path(run, 2)
    assert resolve_checkpoint(checkpoint_path(run, 1)) == checkpoint_path(run, 1)
    assert resolve_checkpoint(run, best_metric="val_loss") == checkpoint_path(run, 1)
    assert resolve_checkpoint(run, best_metric="val_loss", best_mode="max") == checkpoint_path(run, 2)
    with pytest.raises(CheckpointError, match=r"with the metric accuracy.*step-1 \(complete\).*step-3 \(incomplete\)"):
        resolve_checkpoint(run, best_metric="accuracy")
    with pytest.raises(CheckpointError, match=r"step-9.*there is step-1 \(complete\)"):
        resolve_checkpoint(checkpoint_path(run, 9))


def test_the_marker_says_what_there_is(saved: Path) -> None:
    marker = json.loads((saved / MARKER).read_text())
    assert marker["step"] == 3 and marker["world_size"] == 1 and marker["metrics"] == {"val_loss": 0.25}
    assert set(marker["files"]) == {file.name for file in saved.iterdir()} - {MARKER}
    [info] = list_checkpoints(saved.parent.parent)
    assert info.complete and info.bytes == sum(entry["bytes"] for entry in marker["files"].values())
