"""The one checkpoint store, for Ray, local runs and bare GPUs: RUN/checkpoints/step-N, written with DCP.

``save`` copies the tensors and returns; a thread writes them while training goes on, and when every rank's files are
on disk rank 0 adds ``extra.json`` and the marker (``markers.py``). At most one checkpoint is in flight. ``load`` checks
the marker and all hashes, then reads into a model on any number of ranks, each its own shard.

DCP's index ``.metadata`` is a pickle: it is read only after the hash check and with an unpickler that knows DCP's own
classes alone (``flat_state.py``). All directories must be on storage that every rank sees.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from glowflow.config.errors import CheckpointError, Problem
from glowflow.core.sharding import local_part
from glowflow.training import flat_state, markers
from glowflow.training.flat_state import CARRY, MODEL, OPTIMIZER, MetadataReader, saved_tensors
from glowflow.training.markers import (
    CheckpointInfo,
    best_checkpoint,
    latest_complete,
    list_checkpoints,
    read_extra,
    read_header,
    resolve_checkpoint,
    verify,
)
from glowflow.training.strategies.base import unwrap_module

__all__ = [
    "CheckpointInfo",
    "CheckpointStore",
    "best_checkpoint",
    "latest_complete",
    "list_checkpoints",
    "load_full_state_dict",
    "read_extra",
    "resolve_checkpoint",
    "verify",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointStore:
    """Writes, reads and prunes the checkpoints of one run. Every rank has one and calls it in the same order.

    Args:
        run_dir: the run directory; checkpoints go to ``run_dir/checkpoints/step-N``.
        keep: how many of the newest checkpoints are kept, besides the best.
        rank: this rank.
        world_size: number of ranks; with more than one the process group must be up.
        best_metric: name in ``metrics`` that chooses the best checkpoint; None keeps none for being best.
        best_mode: whether the best has the smallest or the largest value.
        asynchronous: write in a thread; otherwise ``save`` returns when the checkpoint is complete.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        rank: int = 0,
        world_size: int = 1,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.keep = keep
        self.rank = rank
        self.world_size = world_size
        self.best_metric = best_metric
        self.best_mode: Literal["min", "max"] = best_mode
        self.asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="glowflow-checkpoint")
        self._in_flight: Future[None] | None = None
        self._gloo: dist.ProcessGroup | None = None
        self._mesh_of_ranks: DeviceMesh | None = None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        metrics: Mapping[str, float],
        *,
        carry: Mapping[str, Tensor] | None = None,
        on_complete: Callable[[CheckpointInfo], None] | None = None,
    ) -> None:
        """Write the checkpoint of ``step``; a directory of the same step is replaced. Collective.

        The tensors are copied before this returns, so training may go on at once. First the checkpoint in flight, if
        any, is waited for.

        Args:
            step: optimiser steps done.
            module: what ``Strategy.prepare`` returned.
            optimizer: its optimiser, or None.
            extra: everything else that resuming needs, as plain JSON; given back by ``load``.
            metrics: values at this step; ``best_metric`` is looked up here.
            carry: recurrent memory, each tensor (this rank's lanes, ...).
            on_complete: called on rank 0, in the writing thread, when the marker is on disk.

        Raises:
            CheckpointError: this checkpoint could not be begun, or the one in flight failed, on any rank.
        """
        path = markers.checkpoint_path(self.run_dir, step)
        tensors, header = self._collect(module, optimizer, extra, carry)
        text = json.dumps(header)  # now, not in the thread: the loop's objects change
        metrics = {name: float(value) for name, value in metrics.items()}
        self._together(self.wait)
        self._together(lambda: self._clear(path) if self.rank == 0 else None)

        def finish(written: Callable[[], Any]) -> None:
            _writing(path, written)
            if self.rank == 0:
                self._complete(path, step, text, metrics, on_complete)

        copies = {name: self._copy(tensor) for name, tensor in tensors.items()}
        arguments: dict[str, Any] = {
            "storage_writer": dcp.FileSystemWriter(path),
            "process_group": self._group(),
            "no_dist": self.world_size == 1,
        }
        if self.asynchronous:
            started = _quietly(dcp.async_save, copies, async_stager=_AlreadyCopied(), **arguments)
            upload = started if isinstance(started, Future) else started.upload_completion
            self._in_flight = self._thread.submit(finish, upload.result)
        else:
            self._together(lambda: finish(lambda: _quietly(dcp.save, copies, **arguments)))

    def wait(self) -> None:
        """Wait for the checkpoint in flight, if there is one. On rank 0 its marker is then on disk. Not collective.

        Raises:
            CheckpointError: it could not be written.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def load(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Read a checkpoint, written by any number of ranks, into the model and the optimiser. Collective.

        The options of the optimiser's groups (learning rate, weight decay, ...) stay as they are: they come from the
        config, and the rate from the step.

        Args:
            path: the checkpoint directory.
            module: what ``Strategy.prepare`` returned.
            optimizer: its optimiser; None leaves the saved state unread.

        Returns:
            The ``extra`` given to ``save``; if a carry was saved, this rank's lanes of it under ``carry``, on the CPU.

        Raises:
            CheckpointError: incomplete, damaged, of another architecture or another optimiser. Nothing is changed,
                unless reading itself fails half-way.
        """
        path = Path(path)
        self._together(self.wait)
        self._together(lambda: _refuse(verify(path), path) if self.rank == 0 else None)
        header, tensors, state = self._together(lambda: self._plan(path, module, optimizer))
        self._together(lambda: _read(path, tensors))
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(state)
        extra: dict[str, Any] = dict(header["extra"])
        if header["carry"]:
            extra["carry"] = {name: local_part(tensors[CARRY + name]) for name in header["carry"]}
        return extra

    def _collect(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        carry: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by flat name, and the content of extra.json."""
        tensors = flat_state.model_tensors(module)
        header: dict[str, Any] = {
            "architecture": flat_state.describe_architecture(module),
            "optimizer": None,
            "carry": sorted(carry or {}),
            "extra": dict(extra),
        }
        if optimizer is not None:
            state, values = flat_state.optimizer_tensors(module, optimizer)
            tensors.update(state)
            header["optimizer"] = {"class": type(optimizer).__name__, "values": values}
        for name, tensor in (carry or {}).items():
            tensors[CARRY + name] = self._shard_lanes(tensor.detach())
        return tensors, header

    def _plan(
        self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[Tensor, dict[str, Any]]]:
        """What to read and where to, if it fits: (extra.json, tensors by flat name, the optimiser's new state)."""
        header = read_header(path)
        saved = saved_tensors(MetadataReader(path).read_metadata())
        shapes = {name.removeprefix(MODEL): entry.size for name, entry in saved.items() if name.startswith(MODEL)}
        problems = flat_state.architecture_problems(module, shapes, header["architecture"])
        if optimizer is not None:
            problems += _optimizer_problems(module, optimizer, header["optimizer"], saved)
        _refuse(problems, path)
        tensors = flat_state.model_tensors(module)
        state: dict[Tensor, dict[str, Any]] = {}
        if optimizer is not None:
            values = header["optimizer"]["values"]
            room, state = flat_state.empty_optimizer_state(module, optimizer, saved, values)
            tensors.update(room)
        for name in header["carry"]:
            tensors[CARRY + name] = self._lanes(saved[CARRY + name])
        return header, tensors, state

    def _clear(self, path: Path) -> None:
        """An empty directory for this step; what a crash or an abandoned continuation left there goes."""
        try:
            markers.remove_checkpoint(path)
            path.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(Problem(str(path), f"cannot be written: {error}")) from None

    def _complete(
        self,
        path: Path,
        step: int,
        text: str,
        metrics: dict[str, float],
        on_complete: Callable[[CheckpointInfo], None] | None,
    ) -> None:
        """Rank 0, after all ranks' writes: extra.json, the marker, pruning, the callback."""
        try:
            markers.write_json(path / markers.EXTRA, json.loads(text))
            sequence = max((info.sequence for info in list_checkpoints(self.run_dir)), default=-1) + 1
            info = markers.write_marker(path, step=step, sequence=sequence, world_size=self.world_size, metrics=metrics)
        except OSError as error:
            raise CheckpointError(Problem(str(path), f"could not be completed: {error}")) from None
        try:
            markers.prune(self.run_dir, keep=self.keep, best_metric=self.best_metric, best_mode=self.best_mode)
        except OSError as error:
            logger.warning("old checkpoints of %s could not be removed: %s", self.run_dir, error)
        if on_complete is not None:
            on_complete(info)

    def _group(self) -> dist.ProcessGroup | None:
        """A gloo group of the store's own: its thread talks while the training thread uses the default group."""
        if self._gloo is None and dist.is_available() and dist.is_initialized():
            self._gloo = dist.new_group(backend="gloo")
        return self._gloo

    def _together(self, function: Callable[[], T]) -> T:
        """Call ``function`` on every rank; if it fails on any, it fails on all. Only while nothing is in flight."""
        value: T | None = None
        error: BaseException | None = None
        try:
            value = function()
        except Exception as caught:
            error = caught
        if self.world_size > 1:
            texts: list[str | None] = [None] * self.world_size
            dist.all_gather_object(texts, None if error is None else str(error), group=self._group())
            failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
            if failed and error is None:
                error = CheckpointError(failed[0])
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _mesh(self) -> DeviceMesh:
        if self._mesh_of_ranks is None:
            group = self._group()
            assert group is not None
            self._mesh_of_ranks = DeviceMesh.from_group(group, "cpu")
        return self._mesh_of_ranks

    def _copy(self, tensor: Tensor) -> Tensor:
        """The same tensor, or shard of one, in CPU memory of its own; the devices' mesh becomes one of CPUs."""
        local = local_part(tensor.detach()).to("cpu", copy=True)
        if self.world_size == 1 or not isinstance(tensor, DTensor):
            return local
        return DTensor.from_local(
            local, self._mesh(), tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _shard_lanes(self, tensor: Tensor) -> Tensor:
        """This rank's lanes as its part of all lanes, which lie in order of rank."""
        return tensor if self.world_size == 1 else DTensor.from_local(tensor.cpu(), self._mesh(), [Shard(0)])

    def _lanes(self, saved: TensorStorageMetadata) -> Tensor:
        """Room for this rank's lanes."""
        if self.world_size == 1:
            return torch.zeros(saved.size, dtype=saved.properties.dtype)
        if saved.size[0] % self.world_size:
            rule = f"must divide the {saved.size[0]} lanes of the checkpoint"
            raise CheckpointError(Problem("resources.workers", rule, self.world_size))
        return sharded_zeros(*saved.size, dtype=saved.properties.dtype, device_mesh=self._mesh(), placements=[Shard(0)])


class _AlreadyCopied(AsyncStager):
    """Tells DCP that what it is given belongs to it."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        return


def load_full_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights alone, whole and on the CPU, in this one process: for export, evaluation and generation.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    path = Path(path)
    _refuse(verify(path), path)
    saved = saved_tensors(MetadataReader(path).read_metadata())
    weights = {name: entry for name, entry in saved.items() if name.startswith(MODEL)}
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in weights.items()}
    _read(path, tensors)
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def _optimizer_problems(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, Any] | None,
    saved: Mapping[str, TensorStorageMetadata],
) -> list[Problem]:
    """Why saved optimiser state is not that of this optimiser."""
    own = type(optimizer).__name__
    if header is None:
        return [Problem("training.optimizer", "the checkpoint holds weights only, no optimiser state", own)]
    if header["class"] != own:
        return [Problem("training.optimizer", f"the checkpoint was written with {header['class']}", own)]
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, parameter in unwrap_module(module).named_parameters() if id(parameter) in updated}
    stored = {name.removeprefix(OPTIMIZER).rpartition(".")[0] for name in saved if name.startswith(OPTIMIZER)}
    rule = "has optimiser state in the checkpoint but is not trained here"
    return [Problem(name, rule) for name in sorted(stored - names)]


def _refuse(problems: list[Problem], path: Path) -> None:
    if problems:
        raise CheckpointError(problems, f"Checkpoint {path} cannot be loaded")


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place. Each rank reads what its own shards need, so there is nothing to agree on."""
    try:
        _quietly(dcp.load, tensors, storage_reader=MetadataReader(path), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {_causes(error)}")) from error


def _writing(path: Path, written: Callable[[], Any]) -> None:
    """Wait for DCP; its error, which is a BaseException that names the ranks, becomes ours."""
    try:
        written()
    except CheckpointException as error:
        raise CheckpointError(Problem(str(path), f"could not be written: {_causes(error)}")) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(Problem(str(path), f"could not be written: {error}")) from error


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))


def _quietly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call DCP without its warning that one process is one process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return function(*args, **kwargs)
