"""The training loop, free of any engine: the same in a Ray worker, in this process and on a bare GPU box.

One step is: the optimiser's extra pass where one is due (``hessian.py``), forward and backward over the micro-batches,
clip, update, write a row of numbers into a buffer on the device. The host reads that buffer only at log steps
(``log_interval``, and wherever something is validated or saved), so between them nothing waits for the device.

How a loss adds up over micro-batches and ranks is in ``passes.py``, that of pairs in ``contrastive.py``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glowflow.config.errors import CheckpointError, ConfigError, Problem, RunError
from glowflow.config.loader import to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import Carry
from glowflow.core.batch import StepBatches
from glowflow.core.optim import build_optimizer
from glowflow.core.sharding import local_part
from glowflow.training.callbacks.base import Callback, LogRecord
from glowflow.training.callbacks.best import monitored_metric
from glowflow.training.carry import join_carries, split_carry
from glowflow.training.checkpoint import CheckpointInfo, CheckpointStore, list_checkpoints, read_extra
from glowflow.training.contrastive import ContrastivePasses
from glowflow.training.counts import Counts
from glowflow.training.hessian import make_extra_passes
from glowflow.training.markers import checkpoint_path
from glowflow.training.meters import StepBuffer, StepClock, memory_mib
from glowflow.training.passes import Passes, task_of
from glowflow.training.precision import LossScaler, name_steps, nonfinite_error
from glowflow.training.result import LoopResult
from glowflow.training.schedulers import build_schedule
from glowflow.training.strategies import Strategy
from glowflow.training.validation import validate

__all__ = ["LoopInputs", "LoopResult", "TrainLoop"]

logger = logging.getLogger(__name__)


@dataclass
class LoopInputs:
    """What the loop is fed with.

    Args:
        open_stream: (start_step, stop_step) -> this rank's batches of these steps, in order.
        cursor: step -> {"epoch", "step", "fingerprint"} of the plan.
        epoch: step -> epochs gone through, fractions included.
        open_validation: a pass over this rank's validation batches; the same number of them on every rank.
        val_bytes_per_token: UTF-8 bytes of text behind one validation target, for bits per byte.
        tokenizer_spec: goes into checkpoints and exports.
        initial_state: full weights to start from instead of drawing them from the seed.
        stop_requested: polled at step boundaries; the run then saves a checkpoint and ends as KILLED.
        report: called on rank 0 with (step, metrics, checkpoint or None) after every validation but the last step's,
            once the checkpoint of this step is complete where one was due; may wait. True ends the run as KILLED.
        extra: more JSON-able content for the checkpoints.
    """

    open_stream: Callable[[int, int], Iterator[StepBatches]]
    cursor: Callable[[int], dict[str, Any]]
    epoch: Callable[[int], float]
    open_validation: Callable[[], Iterator[StepBatches]] | None = None
    val_bytes_per_token: float | None = None
    tokenizer_spec: dict[str, Any] = field(default_factory=dict)
    initial_state: Mapping[str, Tensor] | None = None
    stop_requested: Callable[[], bool] = lambda: False
    report: Callable[[int, dict[str, float], Path | None], bool] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class TrainLoop:
    """Trains one model from a stream of batches.

    Args:
        config: the whole experiment, ``model.vocab_size`` set.
        run_dir: RUN; checkpoints go to RUN/checkpoints.
        strategy: how the model is spread over ranks.
        inputs: streams, plan cursor, tokenizer.
        callbacks: called in this order.

    Raises:
        ConfigError: the optimiser cannot skip a step on the device, or wants an extra pass that cannot be had.
    """

    def __init__(
        self,
        config: GlowFlowConfig,
        *,
        run_dir: Path,
        strategy: Strategy,
        inputs: LoopInputs,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        training = config.training
        self.config, self.run_dir, self.strategy = config, Path(run_dir), strategy
        self.inputs, self.callbacks = inputs, list(callbacks)
        self.device = strategy.device
        self.step = 0
        self.nonfinite_steps = 0
        self.latest: dict[str, float] = {}
        self.counts = Counts(config)
        self.schedule = build_schedule(training)
        self.scaler = LossScaler(self.device, enabled=training.precision == "fp16")
        self.buffer = StepBuffer(training.log_interval, self.device)
        self.clock = StepClock(self.device)
        self.store = CheckpointStore(
            self.run_dir,
            keep=training.keep_checkpoints,
            rank=strategy.rank,
            world_size=strategy.world_size,
            best_metric=monitored_metric(training, task_of(config)),
            best_mode=training.monitor_mode,
        )
        self.module: nn.Module = strategy.prepare(config, state_dict=inputs.initial_state)
        self.optimizer: Optimizer = build_optimizer(strategy.unwrap(self.module), config)
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            rule = "must be able to skip a step on the device: honour `found_inf` and set `_step_supports_amp_scaling`"
            raise ConfigError(Problem("training.optimizer", rule, training.optimizer.name))
        self._extra = make_extra_passes(config, strategy, self.module, self.optimizer, self.scaler)
        passes = ContrastivePasses if task_of(config) == "contrastive" else Passes
        self._passes = passes(config, strategy, self.module, self.scaler)
        self._carries: list[Carry] = [None] * config.grad_accum_steps
        self._wait_seconds = 0.0
        self._pending: tuple[int, dict[str, float]] | None = None
        self._completed = -1

    def run(self, resume: Path | None = None) -> LoopResult:
        """Train to ``training.max_steps``, from the start or from a checkpoint directory.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another architecture or data plan.
            RunError: too many steps were not finite.
        """
        began = time.perf_counter()
        try:
            if resume is not None:
                self._restore(resume)
            self._notify("on_train_start", self)
            status = self._train()
            self._finish_checkpoint()
            checkpoints = [str(info.path) for info in list_checkpoints(self.run_dir) if info.complete]
            seconds = time.perf_counter() - began
            final = {name: value for name, value in self.latest.items() if math.isfinite(value)}
            result = LoopResult(status, self.step, self.tokens, final, checkpoints, seconds)
            self._notify("on_train_end", result)
            return result
        finally:
            self._notify("close")

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks; of samples of unequal length as counted at the last log step."""
        return self.counts.tokens(self.step)

    def _notify(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        max_steps = self.config.training.max_steps
        if self.step >= max_steps:
            logger.info("nothing to do: step %d of %d is done", self.step, max_steps)
            return "FINISHED"
        stream = self.inputs.open_stream(self.step, max_steps)
        self.module.train()
        try:
            while self.step < max_steps:
                self.clock.start()
                batches = next(stream, None)
                if batches is None or batches.step != self.step:
                    raise RunError(f"the data stream gave {batches and batches.step} where step {self.step} was due")
                self._train_step(batches)
                self.clock.stop()
                self.step += 1
                self._wait_seconds += batches.wait_seconds
                self.counts.add(batches)
                self._notify("on_step_end", batches)
                if self._boundary():
                    return "KILLED"
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        return "FINISHED"

    def _train_step(self, batches: StepBatches) -> None:
        """One optimiser step; reads nothing back from the device."""
        lr = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._extra is not None:
            self._extra.run(batches, self._carries)
        losses = self._forward_backward(batches)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self.scaler.unscale([local_part(gradient) for gradient in gradients])
        grad_norm = self.strategy.clip_grad_norm(self.module, self.config.training.grad_clip)
        # Both numbers are global, so every rank skips the same steps.
        loss_bad = ~torch.isfinite(losses).all()
        skip = (loss_bad | ~torch.isfinite(grad_norm)).float()
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        nonfinite = torch.maximum(loss_bad.float(), self.scaler.update(skip))
        self.buffer.append(losses[0], grad_norm, nonfinite, *losses[1:])

    def _forward_backward(self, batches: StepBatches) -> Tensor:
        """Accumulate gradients; returns the step's global loss and what is reported beside it, float64."""
        return self._passes.run(batches, self._carries)

    # -- boundaries --------------------------------------------------------------------------------------------------

    def _boundary(self) -> bool:
        """Log, validate and save where due; True when the run shall stop here.

        Which of these is due follows from the step alone, so ranks agree; a stop is agreed on in ``_log``.
        """
        training, step = self.config.training, self.step
        last = step == training.max_steps
        save = last or step % self.config.interval("checkpoint_interval") == 0
        validate = self.inputs.open_validation is not None and (
            last or step % self.config.interval("val_interval") == 0
        )
        # With one rank a stop needs no agreement and is seen at once.
        alone = self.strategy.world_size == 1 and self.inputs.stop_requested()
        if not (last or save or validate or alone or step % training.log_interval == 0):
            return False
        stop = self._log()
        measured = self._validate() if validate else {}
        if save or stop:
            self._save(measured)
        if validate and not last and not stop and self.inputs.report is not None:
            stop = self._report(saved=save)
            if stop and not save:
                self._save(measured)
        return stop and not last

    def _report(self, *, saved: bool) -> bool:
        """Hand over what was measured and wait for the answer of whoever compares runs; all ranks agree on it."""
        assert self.inputs.report is not None
        if saved:
            self._finish_checkpoint()  # whoever reads the report may go on from it at once
        stop = False
        if self.strategy.rank == 0:
            stop = self.inputs.report(
                self.step, dict(self.latest), checkpoint_path(self.run_dir, self.step) if saved else None
            )
        return bool(self.strategy.all_reduce(torch.tensor(float(stop), device=self.device), "max").item())

    def _log(self) -> bool:
        """Read the device once, agree over ranks, tell the callbacks; True when some rank was asked to stop."""
        rows, seconds = self.buffer.read(), self.clock.read()
        complete = self._pending is not None and self._completed == self._pending[0]
        mine = [self._wait_seconds, memory_mib(self.device), float(self.inputs.stop_requested()), float(complete)]
        shared = torch.tensor(mine, dtype=torch.float64, device=self.device)
        wait, memory, stop, complete_on_disk = self.strategy.all_reduce(shared, "max").tolist()
        self._wait_seconds = 0.0
        if complete_on_disk:
            pending, self._pending = self._pending, None
            self._announce(pending)
        counted = self.counts.agree(self.strategy, len(rows))
        steps = range(self.step - len(rows) + 1, self.step + 1)
        names = ("train_loss", "grad_norm", "nonfinite", *self._passes.names[1:])
        columns = zip(names, zip(*rows, strict=True), strict=True)
        curve = {name: list(zip(steps, column, strict=True)) for name, column in columns}
        curve["lr"] = [(step, self.schedule(step - 1)) for step in steps]
        bad = [step for step, is_bad in curve.pop("nonfinite") if is_bad]
        self.nonfinite_steps += len(bad)
        metrics = {name: values[-1][1] for name, values in curve.items()}
        metrics |= {
            "tokens": float(self.tokens),
            "epoch": self.inputs.epoch(self.step),
            "memory_mib": memory,
            "nonfinite_steps": float(self.nonfinite_steps),
        }
        metrics |= self.counts.metrics()
        if self.scaler.enabled:
            metrics["loss_scale"] = float(self.scaler.scale)
        if self._extra is not None:
            metrics |= self._extra.shares()
        record = LogRecord(self.step, metrics, curve, seconds, wait, counted)
        self._notify("on_log", record)
        self.latest.update(record.metrics)
        self._check_finite(bad)
        return bool(stop)

    def _check_finite(self, bad: list[int]) -> None:
        if bad:
            logger.warning("loss or gradients were not finite and skipped, %s", name_steps(bad))
        if bad and self.nonfinite_steps > self.config.training.max_nonfinite_steps:
            self._finish_checkpoint()  # all ranks are here; what was being saved is still good
            raise nonfinite_error(
                self.config.training, self.step, bad, self.nonfinite_steps, self.schedule(self.step - 1)
            )

    def _validate(self) -> dict[str, float]:
        assert self.inputs.open_validation is not None
        metrics = validate(
            self.module,
            self.inputs.open_validation(),
            self.strategy,
            self.config.training.precision,
            self.inputs.val_bytes_per_token,
            task_of(self.config),
        )
        self._notify("on_validation", self.step, metrics)
        self.latest.update(metrics)
        return metrics

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, metrics: dict[str, float]) -> None:
        """Start writing a checkpoint; the store completes the one before first, so at most one is in flight."""
        before, self._pending = self._pending, None
        named = {name: self.latest[name] for name in ("train_loss", "grad_norm")}
        metrics = {name: value for name, value in {**named, **metrics}.items() if math.isfinite(value)}
        self.store.save(
            self.step,
            self.module,
            self.optimizer,
            self._state(),
            metrics,
            carry=join_carries(self._carries),
            on_complete=self._on_complete,
        )
        self._announce(before)
        self._pending = (self.step, metrics)

    def _on_complete(self, info: CheckpointInfo) -> None:
        """In the store's thread on rank 0; the loop announces it at the next log step, on all ranks."""
        self._completed = info.step

    def _announce(self, checkpoint: tuple[int, dict[str, float]] | None) -> None:
        if checkpoint is not None:
            step, metrics = checkpoint
            self._notify("on_checkpoint", step, checkpoint_path(self.run_dir, step), metrics)

    def _finish_checkpoint(self) -> None:
        """Wait for the last checkpoint; if it failed on any rank, all ranks fail."""
        error: Exception | None = None
        try:
            self.store.wait()
        except Exception as caught:
            error = caught
        failed = self.strategy.all_reduce(torch.tensor(float(error is not None), device=self.device), "max")
        if failed.item():
            raise error or CheckpointError("another rank could not write its part of the last checkpoint")
        pending, self._pending = self._pending, None
        self._announce(pending)

    def _state(self) -> dict[str, Any]:
        return {
            **self.inputs.extra,
            "step": self.step,
            "tokens": self.tokens,
            "cursor": self.inputs.cursor(self.step),
            "config": to_dict(self.config),
            "tokenizer": self.inputs.tokenizer_spec,
            "threads": torch.get_num_threads(),
            "schedule": {"name": self.config.training.schedule, "lr": self.schedule(self.step)},
            "scaler": self.scaler.state_dict(),
            "nonfinite_steps": self.nonfinite_steps,
            "bad_samples": self.counts.bad_samples,
            "callbacks": {type(c).__name__: state for c in self.callbacks if (state := c.state_dict())},
        }

    def _restore(self, path: Path) -> None:
        extra = read_extra(path)
        mine, theirs = self.inputs.cursor(extra["step"])["fingerprint"], extra["cursor"]["fingerprint"]
        if mine != theirs:
            rule = "was written with another data plan: the data set, its split, training.seed, training.batch_size, "
            rule += "data.context, data.layout or data.window_tokens differ"
            hint = "resume with the run's own config, or start a new run from its weights"
            raise CheckpointError(Problem(str(path), rule, f"{theirs[:12]} instead of {mine[:12]}", hint))
        loaded = self.store.load(path, self.module, self.optimizer)
        self._carries = split_carry(loaded.get("carry"), len(self._carries), self.device)
        self.step = extra["step"]
        self.nonfinite_steps = extra["nonfinite_steps"]
        self.counts.restore(extra["tokens"], extra.get("bad_samples", 0))
        self.scaler.load_state_dict(extra["scaler"])
        for callback in self.callbacks:
            if type(callback).__name__ in extra["callbacks"]:
                callback.load_state_dict(extra["callbacks"][type(callback).__name__])
        logger.info("resumed from %s at step %d", path, self.step)
