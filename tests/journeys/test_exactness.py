"""Exactness, on CPU in fp32: (a) killed and resumed = uninterrupted, (b) 1 worker = 2, (c) 2 -> 1 -> 2, (d) seeds.

(a) runs whole commands, locally with dropout and on Ray without; the others run the worker's own function in gloo
processes, since Ray adds nothing to their question.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.config.loader import load_config, to_dict
from glowflow.core.model import read_single_file
from glowflow.training.callbacks.samples import read_samples
from tests.journeys.support import (
    assert_same_tensors,
    checkpoint_tensors,
    glowflow,
    kill_everything,
    loss_curve,
    record,
    start,
    steps_done,
    wait_for_step,
    write_config,
)
from tests.training.distributed import run_workers

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exactness")


# -- (a) SIGKILL and resume -------------------------------------------------------------------------------------------


def assert_same_run(whole: Path, resumed: Path) -> None:
    """The loss curve, the sample ids of every step, weights and optimiser state: equal to the last bit."""
    curve = loss_curve(whole)
    assert list(curve) == list(range(1, STEPS + 1))
    assert loss_curve(resumed) == curve
    assert loss_curve(resumed, "grad_norm") == loss_curve(whole, "grad_norm")
    assert loss_curve(resumed, "val_loss") == loss_curve(whole, "val_loss")
    assert read_samples(resumed) == read_samples(whole)
    assert list(read_samples(whole)) == list(range(STEPS))
    tensors = checkpoint_tensors(whole, STEPS)
    assert any("exp_avg" in name for name in tensors)
    assert_same_tensors(tensors, checkpoint_tensors(resumed, STEPS))


def kill_and_resume(home: Path, config: Path, name: str, *flags: str, processes: int) -> Path:
    """Run to step 25 or a little later, SIGKILL everything, resume; returns the run directory."""
    run_dir, log = home / "runs" / name, home / f"{name}.log"
    process = start("train", config, f"tracking.run={name}", *flags, cwd=home, log=log)
    try:
        wait_for_step(run_dir, 25, process, log)
    finally:
        killed = kill_everything(process)
    assert killed >= processes, "the kill must have hit the workers too"
    assert record(run_dir)["status"] == "RUNNING"
    assert 25 <= steps_done(run_dir) < STEPS, "the run was over before it could be killed"
    resumed = glowflow("train", "--resume", name, f"tracking.storage={home / 'runs'}", *flags, cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from the newest complete checkpoint, step-" in resumed.stderr
    assert record(run_dir)["status"] == "FINISHED"
    return run_dir


@pytest.mark.journey
def test_a_local_run_with_dropout_that_was_killed_ends_as_if_nothing_had_been(home: Path) -> None:
    config = write_config(home, "dropout", model__dropout=0.1)
    done = glowflow("train", config, "tracking.run=whole-dropout", "--local", cwd=home)
    assert done.returncode == 0, done.stderr
    resumed = kill_and_resume(home, config, "killed-dropout", "--local", processes=1)
    assert_same_run(home / "runs" / "whole-dropout", resumed)


ESTIMATES = {"hessian_interval": 7, "hessian_batch_size": 3}
"""Checkpoints are written every 10 steps of 60, none of them at a multiple of 7."""


@pytest.mark.journey
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({"name": "sophia-g", **ESTIMATES}, id="sophia-g"),
        *(
            pytest.param(optimizer, id=optimizer["name"], marks=pytest.mark.slow)
            for optimizer in (
                {"name": "sophia-h", **ESTIMATES, "hvp": "exact"},
                {"name": "lion"},
                {"name": "adan"},
                {"name": "muon"},
            )
        ),
    ],
)
def test_a_run_with_any_optimizer_that_was_killed_ends_as_if_nothing_had_been(
    home: Path, optimizer: dict[str, Any]
) -> None:
    """Sophia's between two estimates of the Hessian."""
    name = optimizer["name"]
    config = write_config(home, name, model__dropout=0.1, training__optimizer=optimizer)
    done = glowflow("train", config, f"tracking.run=whole-{name}", "--local", cwd=home)
    assert done.returncode == 0, done.stderr
    resumed = kill_and_resume(home, config, f"killed-{name}", "--local", processes=1)
    assert_same_run(home / "runs" / f"whole-{name}", resumed)
    state = {tensor.rpartition(".")[2] for tensor in checkpoint_tensors(resumed, STEPS)}
    assert ("hessian" in state) == ("hessian_interval" in optimizer)


@pytest.mark.journey
@pytest.mark.timeout(900)
def test_a_run_on_ray_that_was_killed_ends_as_if_nothing_had_been(home: Path) -> None:
    config = write_config(home, "ray", resources__workers=2)
    done = glowflow("train", config, "tracking.run=whole-ray", cwd=home)
    assert done.returncode == 0, done.stderr
    # The driver, Ray's daemons, the monitor and the two workers.
    resumed = kill_and_resume(home, config, "killed-ray", processes=6)
    assert_same_run(home / "runs" / "whole-ray", resumed)


# -- (b) (c) (d) the worker's function in gloo processes --------------------------------------------------------------


def train(
    config: dict[str, Any], run_dir: str, sources: list[tuple[str, float]], stop_at: int | None, synchronise: bool
) -> dict[int, float]:
    """One rank: ``run_worker`` on the local stream; gives the loss of every step on rank 0.

    Args:
        stop_at: ask for a clean stop at this step.
        synchronise: False lets every rank keep its own gradients (DDP), which the comparison must notice.
    """
    import torch.distributed as dist

    from glowflow.core.batch import StepBatches
    from glowflow.data.stream import local_stream
    from glowflow.training.callbacks import Callback
    from glowflow.training.session import AUTO, WorkerArgs, run_worker
    from glowflow.training.strategies.ddp import DDPStrategy

    class StopAt(Callback):
        reached = False

        def on_step_end(self, batches: StepBatches) -> None:
            self.reached = self.reached or batches.step + 1 == stop_at

    if not synchronise:
        DDPStrategy.accumulate = lambda self, module, last: module.no_sync()  # type: ignore[method-assign]
    losses: dict[int, float] = {}
    watcher = StopAt()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run_worker(
        WorkerArgs(config, run_dir, sources, resume=AUTO),
        open_stream=local_stream,
        open_eval_stream=local_stream,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        sink=lambda points: losses.update({step: value for name, step, value, _ in points if name == "train_loss"}),
        stop_requested=lambda: watcher.reached,
        callbacks=[watcher],
    )
    return losses


class Trainer:
    """Trains variants of one small config in gloo processes; every variant has a run directory of its own."""

    def __init__(self, home: Path) -> None:
        from glowflow.data.prepare import ensure_built

        self.home = home
        self.config = load_config(write_config(home, "gloo", training__max_steps=40, training__schedule="constant"))
        manifests = ensure_built(self.config.data, use_ray=False)
        self.sources = [(str(manifest.root), weight) for manifest, weight in manifests]

    def run(
        self, name: str, workers: int, *, stop_at: int | None = None, synchronise: bool = True, **training: Any
    ) -> dict[int, float]:
        config = to_dict(self.config)
        config["training"] |= training
        (self.home / "gloo" / name).mkdir(parents=True, exist_ok=True)
        arguments = (config, str(self.home / "gloo" / name), self.sources, stop_at, synchronise)
        losses: dict[int, float] = run_workers(workers, train, *arguments, timeout=180)[0]
        return losses

    def samples(self, name: str) -> dict[int, list[int]]:
        return read_samples(self.home / "gloo" / name)

    def weights(self, name: str, step: int = 40) -> dict[str, torch.Tensor]:
        content = read_single_file(self.home / "gloo" / name / "checkpoints" / f"model-{step}.pt")
        return content["state_dict"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trainer(home: Path) -> Trainer:
    return Trainer(home)


@pytest.fixture(scope="module")
def one_worker(trainer: Trainer) -> dict[int, float]:
    losses = trainer.run("one", 1)
    assert list(losses) == list(range(1, 41)) and losses[40] < losses[1]
    return losses


def assert_close(trainer: Trainer, losses: dict[int, float], name: str, reference: dict[int, float]) -> None:
    """Losses of every step and, after 40 steps, the whole weights: within 1e-5 of one worker's."""
    assert losses.keys() == reference.keys()
    assert max(abs(losses[step] - reference[step]) for step in reference) <= 1e-5
    mine, theirs = trainer.weights(name), trainer.weights("one")
    assert mine.keys() == theirs.keys()
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) <= 1e-5


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_workers_train_as_one(trainer: Trainer, one_worker: dict[int, float], strategy: str) -> None:
    losses = trainer.run(f"two-{strategy}", 2, strategy=strategy)
    samples = trainer.samples(f"two-{strategy}")
    assert samples == trainer.samples("one") and list(samples) == list(range(40))
    assert_close(trainer, losses, f"two-{strategy}", one_worker)


def test_the_comparison_notices_gradients_that_are_not_synchronised(
    trainer: Trainer, one_worker: dict[int, float]
) -> None:
    losses = trainer.run("unsynchronised", 2, strategy="ddp", synchronise=False)
    assert trainer.samples("unsynchronised") == trainer.samples("one")
    with pytest.raises(AssertionError):
        assert_close(trainer, losses, "unsynchronised", one_worker)


def test_two_one_two_workers_keep_the_order(trainer: Trainer, one_worker: dict[int, float]) -> None:
    losses = trainer.run("changing", 2, stop_at=10)
    assert max(losses) < 20
    losses |= trainer.run("changing", 1, stop_at=20)
    assert 20 <= max(losses) < 30
    losses |= trainer.run("changing", 2)
    assert trainer.samples("changing") == trainer.samples("one")
    assert_close(trainer, losses, "changing", one_worker)


def test_the_seed_decides(trainer: Trainer, one_worker: dict[int, float]) -> None:
    again = trainer.run("again", 1)
    assert again == one_worker
    assert trainer.samples("again") == trainer.samples("one")
    assert_same_tensors(trainer.weights("again"), trainer.weights("one"))
    other = trainer.run("other", 1, seed=1)
    assert trainer.samples("other") == trainer.samples("one")  # numbers of places in the plan, the same for any seed
    assert all(other[step] != one_worker[step] for step in one_worker)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(trainer.home / "gloo" / "other")
