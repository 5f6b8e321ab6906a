"""One worker from plain arguments to a summary: what a Ray worker, ``--local`` and a bare GPU box all call.

config and manifests -> plan -> threads and seeds -> strategy -> ``TrainLoop`` -> summary as a plain dict. Streams come
in as functions, so that nothing here knows Ray. With several workers torch.distributed is already initialised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from glowflow.config.loader import load_config
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.batch import StepBatches
from glowflow.core.model import read_single_file, require_parametrization
from glowflow.data.manifest import Manifest
from glowflow.data.plan import Plan
from glowflow.data.samples.plan import SamplePlan
from glowflow.training.callbacks import (
    BestTracker,
    Callback,
    CheckpointHook,
    Exporter,
    Goodput,
    PointSink,
    ProgressLog,
    SampleLog,
    Throughput,
)
from glowflow.training.callbacks.points import Point
from glowflow.training.checkpoint import latest_complete, read_extra
from glowflow.training.data_sizes import with_data_sizes
from glowflow.training.loop import LoopInputs, LoopResult, TrainLoop
from glowflow.training.passes import task_of
from glowflow.training.plans import training_plan, validation_bytes_per_token, validation_plan
from glowflow.training.precision import precision_warnings
from glowflow.training.seeds import choose_threads, seed_everything
from glowflow.training.strategies import Strategy, make_strategy

__all__ = ["AUTO", "OpenStream", "WorkerArgs", "run_worker"]

logger = logging.getLogger(__name__)

AUTO = "auto"
"""``WorkerArgs.resume``: go on from the newest complete checkpoint of the run, or start when there is none."""


class OpenStream(Protocol):
    """A stream of one rank's batches, such as ``glowflow.data.stream.local_stream``."""

    def __call__(
        self,
        plan: Plan | SamplePlan,
        start_step: int,
        stop_step: int,
        *,
        rank: int,
        world_size: int,
        grad_accum_steps: int,
        document_mask: bool,
    ) -> Iterator[StepBatches]: ...


@dataclass
class WorkerArgs:
    """Everything a worker needs, as plain data that crosses process borders.

    Args:
        config: the whole config (``to_dict``).
        run_dir: RUN, absolute, on storage that all workers share.
        sources: (directory of a manifest, weight); validation is measured on the first.
        resume: a checkpoint directory, ``"auto"``, or None to start from step 0.
        initial_weights: single-file checkpoint whose weights training starts from; not used when resuming.
        extra: more JSON-able content for every checkpoint (fingerprints, code version).
    """

    config: dict[str, Any]
    run_dir: str
    sources: list[tuple[str, float]]
    resume: str | None = None
    initial_weights: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkerArgs:
        """Rebuild from ``to_dict`` (or from JSON, where pairs have become lists)."""
        return cls(**{**values, "sources": [(str(path), float(weight)) for path, weight in values["sources"]]})


def run_worker(
    args: WorkerArgs,
    *,
    open_stream: OpenStream,
    open_eval_stream: OpenStream,
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    local_world_size: int = 1,
    device: torch.device | str = "cpu",
    sink: Callable[[Sequence[Point]], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    on_checkpoint: Callable[[int, str, dict[str, float]], None] | None = None,
    on_report: Callable[[int, dict[str, float], Path | None], bool] | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train one worker's share from start or checkpoint to the end.

    Args:
        args: what to train.
        open_stream: training batches. open_eval_stream: validation batches.
        rank, world_size: this worker among all. local_rank, local_world_size: among those on this node.
        device: where to compute.
        sink: gets lists of (metric, step, value, timestamp in ms); called on rank 0 only.
        stop_requested: polled on every rank; one that says True stops all at a step boundary, with a checkpoint.
        on_checkpoint: called with (step, path, metrics) on every rank for each complete checkpoint.
        on_report: ``LoopInputs.report``; given on all ranks or on none.
        callbacks: more callbacks, called after the built-in ones.

    Returns:
        A plain dict, equal on all ranks but for speed: status, steps, tokens, final, best, tokens_per_second,
        step_time_ms, goodput, checkpoints, exports, seconds, threads, parameters, world_size, device, resumed_from.

    Raises:
        GlowFlowError: the config, data, checkpoint or weights cannot be used, or training went wrong.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()  # else every step asks the kernel for its activations anew
    run_dir = Path(args.run_dir)
    resume = _resume_path(args.resume, run_dir, rank, world_size)
    sources = [(Manifest.load(path), weight) for path, weight in args.sources]
    config = _worker_config(args.config, [manifest for manifest, _ in sources], world_size)
    if resume is not None:
        config = _without_encoder_files(config)
    _set_threads(config, resume, local_world_size, rank)
    seed_everything(config.training.seed)
    if rank == 0:
        for text in precision_warnings(config.training.precision, device):
            logger.warning(text)
    strategy = make_strategy(config.training.strategy, device=device, precision=config.training.precision)
    inputs = _inputs(config, sources, strategy, open_stream, open_eval_stream)
    inputs.initial_state = None if resume else _initial_state(config, args.initial_weights)
    inputs.stop_requested, inputs.extra, inputs.report = stop_requested, dict(args.extra), on_report
    built_in = _callbacks(config, run_dir, strategy, sink, on_checkpoint)
    loop = TrainLoop(config, run_dir=run_dir, strategy=strategy, inputs=inputs, callbacks=[*built_in, *callbacks])
    inputs.initial_state = None  # the parameters hold it now
    return _summary(loop, loop.run(resume), resume)


def _worker_config(values: Mapping[str, Any], manifests: Sequence[Manifest], world_size: int) -> GlowFlowConfig:
    """The config of this attempt: its number of workers, and the sizes that the data give."""
    config = load_config({**values, "resources": {**values.get("resources", {}), "workers": world_size}})
    return with_data_sizes(config, manifests)


def _without_encoder_files(config: GlowFlowConfig) -> GlowFlowConfig:
    """The checkpoint that is resumed has the weights of encoders: the files that they came from may be gone."""
    model = config.model
    if not isinstance(model, MultimodalConfig):
        return config
    encoders = {name: getattr(model, name).model_copy(update={"checkpoint": None}) for name in model.modalities}
    return config.model_copy(update={"model": model.model_copy(update=encoders)})


def _resume_path(resume: str | None, run_dir: Path, rank: int, world_size: int) -> Path | None:
    """The checkpoint to go on from; with ``auto`` rank 0 looks and all ranks take what it found."""
    if resume != AUTO:
        return None if resume is None else Path(resume)
    found: list[Path | None] = [latest_complete(run_dir, check=True) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if rank == 0 and found[0] is not None:
        logger.info("going on from the newest complete checkpoint, %s", found[0])
    return found[0]


def _set_threads(config: GlowFlowConfig, resume: Path | None, local_world_size: int, rank: int) -> None:
    stored = read_extra(resume).get("threads") if resume else None
    threads, reason = choose_threads(config.training.threads, stored, local_world_size)
    torch.set_num_threads(threads)
    if rank == 0:
        logger.info("%d intra-op thread(s) per worker: %s", threads, reason)


def _initial_state(config: GlowFlowConfig, path: str | None) -> Mapping[str, Tensor] | None:
    if path is None:
        return None
    content = read_single_file(path)
    require_parametrization(config, content["config"], path)
    return content["state_dict"]


def _inputs(
    config: GlowFlowConfig,
    sources: Sequence[tuple[Manifest, float]],
    strategy: Strategy,
    open_stream: OpenStream,
    open_eval_stream: OpenStream,
) -> LoopInputs:
    manifest, training = sources[0][0], config.training
    train_plan = training_plan(config, sources)
    share: dict[str, Any] = {
        "rank": strategy.rank,
        "world_size": strategy.world_size,
        "grad_accum_steps": config.grad_accum_steps,
        "document_mask": config.data.document_mask,
    }
    inputs = LoopInputs(
        open_stream=partial(open_stream, train_plan, **share),
        cursor=train_plan.cursor,
        epoch=train_plan.epoch,
        tokenizer_spec=manifest.tokenizer_spec,
    )
    val_split, val_plan = config.data.val_split, validation_plan(config, manifest)
    if val_plan is None:
        logger.warning("data.val_split: %s has no tokens in %r, so nothing is validated", manifest.name, val_split)
        return inputs
    steps = min(val_plan.num_steps or 0, training.val_batches or val_plan.num_steps or 0)
    inputs.open_validation = partial(open_eval_stream, val_plan, 0, steps, **share)
    inputs.val_bytes_per_token = validation_bytes_per_token(config, manifest)
    return inputs


def _callbacks(
    config: GlowFlowConfig,
    run_dir: Path,
    strategy: Strategy,
    sink: Callable[[Sequence[Point]], None] | None,
    on_checkpoint: Callable[[int, str, dict[str, float]], None] | None,
) -> list[Callback]:
    """In order: those that add metrics, those that deliver them, those that write files."""
    training = config.training
    run_dir.mkdir(parents=True, exist_ok=True)
    best = BestTracker(training, task_of(config))
    found: list[Callback] = [Throughput(), Goodput(run_dir, rank=strategy.rank), best]
    if strategy.rank == 0:
        if sink is not None:
            found.append(PointSink(sink))
        found.append(ProgressLog(training.max_steps, training.monitor_metrics))
    if training.log_samples:
        found.append(SampleLog(run_dir, strategy.rank, strategy.world_size))
    if on_checkpoint is not None:
        found.append(CheckpointHook(on_checkpoint))
    return [*found, Exporter(run_dir, training.export_interval)]


def _summary(loop: TrainLoop, result: LoopResult, resume: Path | None) -> dict[str, Any]:
    device = loop.device
    values = asdict(result)
    values["steps"] = values.pop("step")
    return {
        **values,
        "threads": torch.get_num_threads(),
        "parameters": loop.strategy.unwrap(loop.module).num_parameters(),
        "world_size": loop.strategy.world_size,
        "strategy": loop.strategy.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "resumed_from": None if resume is None else str(resume),
    }
