"""A tiny real model and a deterministic stream of token batches, for tests of the loop without any files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.batch import Batch, StepBatches
from glowflow.training.callbacks import BestTracker, Callback, Goodput, SampleLog, Throughput
from glowflow.training.loop import LoopInputs, LoopResult, TrainLoop
from glowflow.training.strategies import make_strategy

VOCAB = 31


def small_config(**overrides: Any) -> GlowFlowConfig:
    """2 blocks x 16, context 12, global batch 8; ``training__lr=1`` sets training.lr."""
    values = {
        "model.vocab_size": VOCAB, "model.dim": 16, "model.depth": 2, "model.heads": 2,
        "data.context": 12, "training.batch_size": 8, "training.max_steps": 60, "training.warmup_steps": 5,
        "training.lr": 3e-3, "training.log_interval": 10, "training.checkpoint_interval": 20,
        "training.val_interval": 30, "training.seed": 7, "training.threads": 1,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return apply_overrides(load_config(None), values)


def make_rows(step: int, config: GlowFlowConfig, *, padding: bool = True) -> Batch:
    """The global batch of a step: tokens with a learnable pattern and rows of different length."""
    size, context = config.training.batch_size, config.data.context
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(0, VOCAB, (size, 1), generator=generator)
    tokens = (first + 3 * torch.arange(context + 1)) % VOCAB
    lengths = (
        torch.randint(1, context + 1, (size, 1), generator=generator) if padding else torch.full((size, 1), context)
    )
    positions = torch.arange(context).expand(size, context).contiguous()
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        loss_weights=(positions < lengths).float(),
        positions=positions,
        document_ids=torch.zeros(size, context, dtype=torch.int64),
        sample_ids=torch.arange(step * size, (step + 1) * size),
        reset=torch.zeros(size, dtype=torch.bool),
        single_document=True,
    )


def slice_rows(batch: Batch, start: int, stop: int) -> Batch:
    tensors = {name: value[start:stop] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return Batch(**tensors, single_document=batch.single_document)


def stream(
    config: GlowFlowConfig,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    poison: frozenset[int] = frozenset(),
    rows: Callable[[int, GlowFlowConfig], Batch] = make_rows,
) -> Iterator[StepBatches]:
    """This rank's micro-batches of the global batches that ``rows`` gives; the loss of a poisoned step is infinite on
    the last rank."""
    share = config.training.batch_size // world_size
    micro = share // config.grad_accum_steps
    for step in range(start, stop):
        whole = rows(step, config)
        weight = float(whole.loss_weights.sum())
        if step in poison and rank == world_size - 1:
            whole.loss_weights[-1, 0] = float("inf")
        cuts = [rank * share + index * micro for index in range(config.grad_accum_steps)]
        yield StepBatches(step, [slice_rows(whole, cut, cut + micro) for cut in cuts], weight)


class Recorder(Callback):
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.curve: dict[str, dict[int, float]] = {}
        self.records: list[tuple[int, dict[str, float]]] = []
        self.validations: dict[int, dict[str, float]] = {}
        self.checkpoints: list[int] = []
        self.closed = False

    def on_log(self, record: Any) -> None:
        self.records.append((record.step, dict(record.metrics)))
        for name, values in record.curve.items():
            self.curve.setdefault(name, {}).update(values)

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        self.validations[step] = metrics

    def on_checkpoint(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        assert (path / "COMPLETE.json").exists(), "announced before it is complete"
        self.checkpoints.append(step)

    def close(self) -> None:
        self.closed = True


class StopAt(Callback):
    """Asks for a stop once a step is done."""

    def __init__(self, step: int | None) -> None:
        self.step, self.stopped = step, False

    def on_step_end(self, batches: StepBatches) -> None:
        self.stopped = self.step is not None and batches.step + 1 >= self.step


def make_loop(
    config: GlowFlowConfig,
    run_dir: Path,
    *,
    stop_at: int | None = None,
    poison: frozenset[int] = frozenset(),
    validate: bool = True,
    callbacks: tuple[Callback, ...] = (),
    fingerprint: str = "plan-1",
    rows: Callable[[int, GlowFlowConfig], Batch] = make_rows,
) -> tuple[TrainLoop, Recorder]:
    strategy = make_strategy(config.training.strategy, device=torch.device("cpu"), precision=config.training.precision)
    run_dir.mkdir(parents=True, exist_ok=True)
    stopper, recorder = StopAt(stop_at), Recorder()
    rank, world = strategy.rank, strategy.world_size

    def open_validation() -> Iterator[StepBatches]:
        return stream(config, 10_000, 10_003, rank, world, rows=rows)

    inputs = LoopInputs(
        open_stream=lambda start, stop: stream(config, start, stop, rank, world, poison, rows),
        cursor=lambda step: {"epoch": 0, "step": step, "fingerprint": fingerprint},
        epoch=lambda step: step / 100,
        open_validation=open_validation if validate else None,
        val_bytes_per_token=2.0,
        tokenizer_spec={"kind": "bytes"},
        stop_requested=lambda: stopper.stopped,
    )
    built_in = [
        Throughput(),
        Goodput(run_dir, rank=rank),
        BestTracker(config.training),
        SampleLog(run_dir, rank, world),
    ]
    loop = TrainLoop(
        config, run_dir=run_dir, strategy=strategy, inputs=inputs, callbacks=[*built_in, stopper, *callbacks, recorder]
    )
    return loop, recorder


def train(
    config: GlowFlowConfig, run_dir: Path, resume: Path | None = None, **options: Any
) -> tuple[LoopResult, Recorder, TrainLoop]:
    loop, recorder = make_loop(config, run_dir, **options)
    return loop.run(resume), recorder, loop


def weights(loop: TrainLoop) -> dict[str, torch.Tensor]:
    return loop.strategy.full_state_dict(loop.module)


def optimizer_state(loop: TrainLoop) -> list[torch.Tensor]:
    states = loop.optimizer.state_dict()["state"]
    return [states[key][name] for key in sorted(states) for name in sorted(states[key])]


__all__ = ["make_loop", "make_rows", "optimizer_state", "small_config", "stream", "train", "weights"]


def train_sharded(
    config: GlowFlowConfig, run_dir: Path, resume: Path | None, **more: Any
) -> dict[str, dict[int, float]]:
    """Curves of a run as sharded as it gets: a group per block, whose weights are gathered anew for each pass."""
    from glowflow.training.strategies.fsdp import FSDPStrategy

    make = FSDPStrategy.__init__
    try:
        FSDPStrategy.__init__ = lambda self, **options: make(self, **options, group_bytes=0, keep_bytes=0)  # type: ignore[method-assign,assignment]
        loop, recorder = make_loop(config, run_dir, **more)
    finally:
        FSDPStrategy.__init__ = make  # type: ignore[method-assign]
    loop.run(resume)
    return recorder.curve
