"""The checkpoint store: exact, whole or not at all, readable by any number of ranks, clear about what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glowflow.config.errors import CheckpointError
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch
from glowflow.core.optim import build_optimizer
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
from glowflow.training.flat_state import optimizer_tensors
from glowflow.training.markers import MARKER, best_checkpoint, checkpoint_path, write_marker
from glowflow.training.strategies import Strategy, make_strategy
from glowflow.training.strategies.base import gather
from tests.training.distributed import WorkerError, run_workers

CPU = torch.device("cpu")
VOCAB, CONTEXT, BATCH = 17, 6, 6


def small_config(**model: Any) -> GlowFlowConfig:
    section = {"arch": "transformer", "vocab_size": VOCAB, "dim": 12, "depth": 2, "heads": 2, **model}
    return GlowFlowConfig(model=section, training={"batch_size": BATCH, "lr": 1e-2})


class Trainer:
    """A real model and optimiser on the ranks that there are."""

    def __init__(self, name: str = "auto", **model: Any) -> None:
        config = small_config(**model)
        self.strategy: Strategy = make_strategy(name, device=CPU, precision="fp32")
        self.module: nn.Module = self.strategy.prepare(config)
        self.optimizer = build_optimizer(self.strategy.unwrap(self.module), config)

    def train(self, *steps: int) -> None:
        share = BATCH // self.strategy.world_size
        rows = slice(self.strategy.rank * share, (self.strategy.rank + 1) * share)
        for step in steps:
            tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(step))[rows]
            batch = Batch(
                tokens=tokens[:, :-1].contiguous(),
                targets=tokens[:, 1:].contiguous(),
                loss_weights=torch.ones(share, CONTEXT),
                positions=torch.arange(CONTEXT).expand(share, CONTEXT).contiguous(),
                document_ids=torch.zeros(share, CONTEXT, dtype=torch.int64),
                sample_ids=torch.arange(share),
                reset=torch.zeros(share, dtype=torch.bool),
                single_document=True,
            )
            with self.strategy.accumulate(self.module, True):
                output, _ = self.module(batch, None)
                (output.loss_sum / (share * CONTEXT)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Whole weights and optimiser state, on every rank."""
        model = self.strategy.unwrap(self.module).state_dict()
        tensors, _ = optimizer_tensors(self.module, self.optimizer)
        return {name: gather(tensor).clone() for name, tensor in {**model, **tensors}.items()}

    def store(self, run_dir: Path, **options: Any) -> CheckpointStore:
        options = {"keep": 2, **options}
        return CheckpointStore(run_dir, rank=self.strategy.rank, world_size=self.strategy.world_size, **options)

    def save(self, run_dir: Path, step: int, **options: Any) -> Path:
        store = self.store(run_dir, **options)
        store.save(step, self.module, self.optimizer, {"step": step}, {"val_loss": 1.0 / (1 + step)})
        store.wait()
        self.strategy.barrier()
        return checkpoint_path(run_dir, step)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in other.items()}
    assert not [name for name in one if not torch.equal(one[name], other[name])]


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


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_weights_and_optimiser_come_back_bit_for_bit_and_train_on_equally(tmp_path: Path, asynchronous: bool) -> None:
    original = Trainer()
    original.train(0, 1, 2)
    path = original.save(tmp_path, 3, asynchronous=asynchronous)
    other = Trainer()
    other.train(7)  # state of its own, to be replaced
    extra = other.store(tmp_path).load(path, other.module, other.optimizer)
    assert extra == {"step": 3}
    assert_equal(original.state(), other.state())
    steps = {float(entry["step"]) for entry in other.optimizer.state.values()}
    assert steps == {3.0} and len(other.optimizer.state) == len(list(other.module.parameters()))
    for trainer in (original, other):
        trainer.train(3, 4)
    assert_equal(original.state(), other.state())


def test_what_is_saved_is_the_moment_of_saving(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.train(0)
    before = trainer.state()
    store = trainer.store(tmp_path)
    store.save(1, trainer.module, trainer.optimizer, {}, {})
    with torch.no_grad():  # at once, in place, as training does
        entries = [value for state in trainer.optimizer.state.values() for value in state.values()]
        for tensor in [*trainer.module.parameters(), *entries]:
            tensor.fill_(float("nan"))
    store.wait()
    other = Trainer()
    other.store(tmp_path).load(checkpoint_path(tmp_path, 1), other.module, other.optimizer)
    assert_equal(before, other.state())


def test_an_optimiser_that_never_stepped_and_weights_alone(tmp_path: Path) -> None:
    fresh = Trainer()
    path = fresh.save(tmp_path, 0)
    other = Trainer()
    other.train(5)
    other.store(tmp_path).load(path, other.module, other.optimizer)
    assert not other.optimizer.state
    assert_equal(fresh.state(), other.state())
    other.train(5)
    before = optimizer_tensors(other.module, other.optimizer)[0]
    before = {name: tensor.clone() for name, tensor in before.items()}
    other.store(tmp_path).load(path, other.module)
    assert before
    assert_equal(before, optimizer_tensors(other.module, other.optimizer)[0])
    assert torch.equal(other.state()["norm.weight"], fresh.state()["norm.weight"])


def test_values_that_are_no_tensors_survive_without_pickle(tmp_path: Path) -> None:
    trainer = Trainer()
    optimizer = torch.optim.SGD(trainer.module.parameters(), lr=0.1, momentum=0.9)
    trainer.optimizer = optimizer
    trainer.train(0)
    for entry in optimizer.state.values():
        entry["count"] = 3
    path = trainer.save(tmp_path, 1)
    for entry in optimizer.state.values():
        entry["count"] = 9
    trainer.store(tmp_path).load(path, trainer.module, optimizer)
    assert {entry["count"] for entry in optimizer.state.values()} == {3}
    next(iter(optimizer.state.values()))["count"] = object()
    with pytest.raises(TypeError, match="count"):
        trainer.save(tmp_path, 2)


def test_carry_comes_back(trained: Trainer, tmp_path: Path) -> None:
    store = trained.store(tmp_path)
    carry = {"memory": torch.randn(4, 3), "count": torch.arange(4)}
    store.save(1, trained.module, None, {"a": 1}, {}, carry=carry)
    store.wait()
    loaded = trained.store(tmp_path).load(checkpoint_path(tmp_path, 1), Trainer().module)
    assert loaded["a"] == 1
    assert_equal(loaded["carry"], carry)


def test_extra_must_be_json_and_is_taken_at_once(trained: Trainer, tmp_path: Path) -> None:
    store = trained.store(tmp_path)
    with pytest.raises(TypeError):
        store.save(1, trained.module, trained.optimizer, {"device": CPU}, {})
    assert not list_checkpoints(tmp_path)
    extra = {"cursor": {"step": 1}}
    store.save(1, trained.module, trained.optimizer, extra, {})
    extra["cursor"]["step"] = 2
    store.wait()
    assert read_extra(checkpoint_path(tmp_path, 1)) == {"cursor": {"step": 1}}


def test_full_weights_need_no_model_and_no_group(trained: Trainer, saved: Path) -> None:
    assert_equal(load_full_state_dict(saved), trained.strategy.full_state_dict(trained.module))


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


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"depth": 3}, ["model.depth: the checkpoint was written with 2 (got 3)", "blocks.2."]),
        ({"vocab_size": 23}, ["model.vocab_size", "17", "23", "tokenizer", "embedding.weight", "(17, 12)"]),
        ({"heads": 3}, ["model.heads: the checkpoint was written with 2 (got 3)"]),  # same shapes, another function
        ({"dim": 24, "rope_theta": 5.0}, ["model.dim", "model.rope_theta", "more tensors differ"]),
    ],
)
def test_another_architecture_is_named_key_by_key(saved: Path, model: dict[str, Any], parts: list[str]) -> None:
    other = Trainer(**model)
    before = other.state()
    with pytest.raises(CheckpointError) as caught:
        other.store(saved.parent.parent).load(saved, other.module, other.optimizer)
    for part in parts:
        assert part in str(caught.value)
    assert_equal(before, other.state())


def test_what_does_not_alter_the_function_may_change(trained: Trainer, saved: Path) -> None:
    other = Trainer(dropout=0.1, init_std=0.5, attention={"backend": "reference"})
    other.store(saved.parent.parent).load(saved, other.module, other.optimizer)
    assert_equal(trained.state(), other.state())


def test_another_optimiser_is_refused(trained: Trainer, saved: Path, tmp_path: Path) -> None:
    other = Trainer()
    sgd = torch.optim.SGD(other.module.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"training.optimizer: .* written with AdamW \(got 'SGD'\)"):
        other.store(tmp_path).load(saved, other.module, sgd)
    store = trained.store(tmp_path)
    store.save(9, trained.module, None, {}, {})
    with pytest.raises(CheckpointError, match="weights only"):
        store.load(checkpoint_path(tmp_path, 9), other.module, other.optimizer)
    other.module.requires_grad_(False)
    other.module.embedding.weight.requires_grad_(True)
    few = build_optimizer(other.module, small_config())
    with pytest.raises(CheckpointError, match=r"norm.weight: has optimiser state in the checkpoint but is not trained"):
        other.store(tmp_path).load(saved, other.module, few)


# -- several ranks ----------------------------------------------------------------------------------------------------


def worker_trains_and_saves(run_dir: Path, load: int | None, steps: tuple[int, ...], name: str) -> dict[str, Any]:
    """Load a checkpoint, report what arrived, train on, save."""
    trainer = Trainer(name)
    found: dict[str, Any] = {}
    if load is not None:
        extra = trainer.store(run_dir).load(checkpoint_path(run_dir, load), trainer.module, trainer.optimizer)
        found["loaded"], found["extra"] = trainer.state(), extra
    trainer.train(*steps)
    found["saved"] = trainer.state()
    carry = {"lanes": torch.arange(BATCH).view(-1, 1).tensor_split(trainer.strategy.world_size)[trainer.strategy.rank]}
    store = trainer.store(run_dir, keep=9)
    store.save(steps[-1], trainer.module, trainer.optimizer, {"at": steps[-1]}, {}, carry=carry)
    trainer.train(40)  # goes on while it is written
    store.wait()
    if name == "fsdp":
        found.update(worker_meets_errors(run_dir, trainer))
    return found


def worker_meets_errors(run_dir: Path, trainer: Trainer) -> dict[str, Any]:
    """Errors of one rank reach all of them; nobody is left waiting."""
    found: dict[str, Any] = {}
    if trainer.strategy.world_size != 2:
        return found
    rank = trainer.strategy.rank
    broken = run_dir / "broken"
    path = trainer.save(broken, 1)
    if rank == 0:
        (path / "__1_0.distcp").write_bytes(b"short")
    trainer.strategy.barrier()
    for key, wanted in (("damaged", path), ("absent", broken / "checkpoints" / "step-7")):
        try:
            trainer.store(broken).load(wanted, trainer.module, trainer.optimizer)
        except CheckpointError as error:
            found[key] = str(error)

    if rank == 1:  # a full disk, on this rank only
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    store = trainer.store(run_dir / "full")
    store.save(5, trainer.module, trainer.optimizer, {}, {})
    try:
        store.wait()
    except CheckpointError as error:
        found["full disk"] = str(error)
    found["after full disk"] = [info.complete for info in list_checkpoints(run_dir / "full")]
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """2 ranks (fsdp) -> this process -> 2 ranks (ddp) and 3 ranks (fsdp), each from the one before."""
    run_dir = tmp_path_factory.mktemp("chain")
    runs: dict[str, Any] = {"run_dir": run_dir}
    runs["two"] = run_workers(2, worker_trains_and_saves, run_dir, None, (0, 1), "fsdp")
    runs["one"] = [worker_trains_and_saves(run_dir, 1, (2, 3), "single")]
    runs["ddp"] = run_workers(2, worker_trains_and_saves, run_dir, 3, (4, 5), "ddp")
    runs["three"] = run_workers(3, worker_trains_and_saves, run_dir, 3, (6, 7), "fsdp")
    return runs


def test_any_number_of_ranks_reads_what_any_other_wrote_bit_for_bit(chain: dict[str, Any]) -> None:
    for before, after in (("two", "one"), ("one", "ddp"), ("one", "three")):
        for found in chain[after]:
            assert_equal(chain[before][0]["saved"], found["loaded"])
            assert found["extra"]["at"] == {"two": 1, "one": 3}[before]
    for ranks in chain.values():
        if isinstance(ranks, list):
            for found in ranks[1:]:
                assert_equal(ranks[0]["saved"], found["saved"])
    assert float(chain["three"][0]["saved"]["optimizer.norm.weight.step"]) == 6.0


def test_sharded_checkpoints_hold_the_moment_of_saving(chain: dict[str, Any]) -> None:
    for name, step in (("two", 1), ("ddp", 5), ("three", 7)):
        path = checkpoint_path(chain["run_dir"], step)
        assert verify(path) == []
        assert len(list(path.glob("*.distcp"))) == len(chain[name])
        model = {key: value for key, value in chain[name][0]["saved"].items() if not key.startswith("optimizer.")}
        assert_equal(load_full_state_dict(path), model)


def test_lanes_are_cut_anew_for_other_ranks(chain: dict[str, Any]) -> None:
    for name in ("one", "ddp", "three"):
        ranks = chain[name]
        assert torch.cat([found["extra"]["carry"]["lanes"] for found in ranks]).flatten().tolist() == list(range(BATCH))
        assert {len(found["extra"]["carry"]["lanes"]) for found in ranks} == {BATCH // len(ranks)}


def test_an_error_on_one_rank_is_an_error_on_all(chain: dict[str, Any]) -> None:
    for rank, found in enumerate(chain["two"]):
        assert "__1_0.distcp" in found["damaged"], rank
        assert "step-7" in found["absent"], rank
        assert "rank 1: " in found["full disk"] and "could not be written" in found["full disk"], rank
        assert found["after full disk"] == [False]
