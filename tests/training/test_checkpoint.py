"""The checkpoint store: exact, of the moment, readable by any number of ranks, clear about what does not fit."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from glowflow.config.errors import CheckpointError
from glowflow.core.optim import build_optimizer
from glowflow.training.checkpoint import (
    list_checkpoints,
    load_full_state_dict,
    read_extra,
    verify,
)
from glowflow.training.flat_state import architecture_problems, describe_architecture, optimizer_tensors
from glowflow.training.markers import checkpoint_path
from tests.training.distributed import run_workers
from tests.training.small_trainer import BATCH, CPU, Trainer, assert_equal, small_config


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


def test_keys_that_came_after_the_checkpoint_count_with_their_defaults(trained: Trainer) -> None:
    shapes = {name: value.shape for name, value in trained.module.state_dict().items()}
    saved = describe_architecture(trained.module)
    old = {key: value for key, value in saved.items() if key not in ("mup", "norm", "bias")}
    assert architecture_problems(trained.module, shapes, old) == []
    (problem,) = architecture_problems(trained.module, shapes, {**old, "rope_theta": 5.0})
    assert problem.key == "model.rope_theta"
    assert architecture_problems(Trainer(norm="layernorm").module, shapes, old)[0].key == "model.norm"


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


def test_one_fsdp_worker_and_a_plain_module_read_each_other(trained: Trainer, saved: Path, tmp_path: Path) -> None:
    try:
        sharded = Trainer("fsdp")  # a process group of one
        sharded.store(tmp_path).load(saved, sharded.module, sharded.optimizer)
        assert_equal(sharded.state(), trained.state())
        path = sharded.save(tmp_path, 4)
        plain = Trainer("single")
        plain.store(tmp_path).load(path, plain.module, plain.optimizer)
        assert_equal(plain.state(), trained.state())
    finally:
        dist.destroy_process_group()


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
