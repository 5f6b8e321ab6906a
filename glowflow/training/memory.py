"""How much memory a worker needs, before anything is started: for ``glowflow plan`` and ``plan --vram``.

Nothing is allocated and no formula per architecture is kept: the model, one forward pass and one optimiser step run
on fake tensors (torch's ``FakeTensorMode``), and what autograd saves and the optimiser keeps is added up. So custom
architectures and optimisers are estimated too. With media each sequence has one of each modality, at its largest
prepared size (``fake_batches.py``). What cannot be known beforehand (allocator slack, communication
buffers, the runtime itself) is one labelled line, ``reserve``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glowflow.config.architectures import DecoderConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.model import build_module
from glowflow.core.optim import build_optimizer
from glowflow.core.optim.extra import TakesExtraPass
from glowflow.training.fake_batches import fake_batch
from glowflow.training.precision import autocast, compute_dtype
from glowflow.training.strategies.fsdp import GROUP_BYTES, KEEP_BYTES

__all__ = ["MemoryEstimate", "estimate_memory", "largest_micro_batch"]

GIB = 2**30
RESERVE_SHARE = 0.1
RESERVE_BYTES = {"cuda": 0.75 * GIB, "cpu": 0.4 * GIB}
"""The CUDA context with its libraries, or a Python process with torch in it."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one worker in bytes, by what it is for.

    Args:
        parameters: fp32 weights that this worker keeps.
        gradients: fp32 gradients that it keeps.
        optimizer: state of the optimiser, and what its extra pass holds beside it.
        gathered: whole weights (and gradients) that FSDP has gathered at the same time.
        activations: what one micro-batch keeps for the backward pass, casts of the weights included.
        carry: recurrent memory that the micro-batches of a step leave to the next; 0 for most architectures.
        reserve: allocator slack, communication buffers and the runtime: an allowance, not a measurement.
        micro_batch_size: sequences per forward pass that this is for.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    carry: float
    reserve: float
    micro_batch_size: int

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> bytes, in the order of the fields."""
        return {name: value for name, value in vars(self).items() if name != "micro_batch_size"}

    def fits(self, gib: float) -> bool:
        """Whether it fits into a device of that many GiB."""
        return self.total <= gib * GIB


def estimate_memory(config: GlowFlowConfig, *, device_type: str = "cuda", workers: int | None = None) -> MemoryEstimate:
    """Estimate the peak memory of one worker.

    Args:
        config: the whole experiment, ``model.vocab_size`` set.
        device_type: ``cuda`` or ``cpu``; only the reserve depends on it.
        workers: number of workers; default ``resources.workers``.
    """
    estimator = _Estimator(config, device_type, workers or config.resources.workers)
    return estimator.at(config.micro_batch_size if workers is None else _micro_batch(config, workers))


def largest_micro_batch(
    config: GlowFlowConfig, gib: float, *, device_type: str = "cuda", workers: int | None = None
) -> int | None:
    """The largest ``training.micro_batch_size`` that fits into ``gib`` GiB; None when even one sequence does not.

    Only divisors of the batch per worker are considered. Memory is nearly affine in the size, so two sizes tell
    where to look; what is returned was itself estimated.
    """
    workers = workers or config.resources.workers
    per_worker = config.training.batch_size // workers
    estimator = _Estimator(config, device_type, workers)
    one, two = estimator.at(1), estimator.at(2)
    if not one.fits(gib):
        return None
    for size in (size for size in range(per_worker, 1, -1) if per_worker % size == 0):
        expected = one.total + (size - 1) * (two.total - one.total)
        if expected <= 1.1 * gib * GIB and estimator.at(size).fits(gib):
            return size
    return 1


def _micro_batch(config: GlowFlowConfig, workers: int) -> int:
    return config.training.micro_batch_size or max(1, config.training.batch_size // workers)


class _Estimator:
    """What does not depend on the micro-batch is worked out once."""

    def __init__(self, config: GlowFlowConfig, device_type: str, workers: int) -> None:
        self.config = config = _any_kernel(config)
        self.device_type, self.workers = device_type, workers
        precision, strategy = config.training.precision, config.training.strategy
        sharded = strategy == "fsdp" or (strategy == "auto" and workers > 1)
        share = workers if sharded else 1
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            module = build_module(config, device="cpu")
            weights = _num_bytes(module.parameters()) / share
            gathered = _gathered_bytes(module, precision) if share > 1 else 0.0
            trained = _num_bytes([p for p in module.parameters() if p.requires_grad]) / share
            self._fixed = (weights, trained, _optimizer_bytes(module, config) / share, gathered)
        # FSDP computes with gathered weights in the compute type, the others with casts that autograd keeps.
        self._dtype = compute_dtype(precision) if sharded else torch.float32

    def at(self, micro_batch_size: int) -> MemoryEstimate:
        with FakeTensorMode(), torch.random.fork_rng(devices=[]), _default_dtype(self._dtype):
            module = build_module(self.config, device="cpu")
            activations, carry = _activation_bytes(module, self.config, micro_batch_size)
        carry *= max(1, self.config.training.batch_size // self.workers // micro_batch_size)
        reserve = RESERVE_BYTES.get(self.device_type, 0.0) + RESERVE_SHARE * (sum(self._fixed) + activations + carry)
        return MemoryEstimate(*self._fixed, activations, carry, reserve, micro_batch_size)


def _any_kernel(config: GlowFlowConfig) -> GlowFlowConfig:
    """A GPU's kernels cannot run on fake CPU tensors: what ``auto`` takes here keeps about as much."""
    if not isinstance(config.model, DecoderConfig):
        return config
    attention = config.model.attention.model_copy(update={"backend": "auto"})
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _num_bytes(tensors: Iterator[nn.Parameter] | Sequence[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _optimizer_bytes(module: BaseArchitecture, config: GlowFlowConfig) -> float:
    """Take one step on fake gradients and add up the state; and copies of the weights that an extra pass makes."""
    optimizer = build_optimizer(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    copies = optimizer.extra_copies if isinstance(optimizer, TakesExtraPass) else 0
    return copies * _num_bytes(module.parameters()) + _num_bytes(
        [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    )


def _gathered_bytes(module: BaseArchitecture, precision: str) -> float:
    """What FSDP holds whole at once: everything for small models, else the root's own weights and two groups.

    Two groups, because the next one is gathered while one computes; in the backward pass the gradients of one group
    are whole too, before they are reduced in fp32.
    """
    itemsize = compute_dtype(precision).itemsize
    total = sum(parameter.numel() for parameter in module.parameters())
    if 4 * total <= KEEP_BYTES:
        return float(total * itemsize + 4 * total)
    units = [sum(parameter.numel() for parameter in unit.parameters()) for unit in module.shard_units()]
    largest = max([*units, 0])
    group = largest if 4 * largest >= GROUP_BYTES else max(largest, GROUP_BYTES // 4)
    root = total - sum(units)
    return float((root + 2 * group) * itemsize + (root + group) * 4)


class _SavedBytes:
    """Adds up the distinct storages that autograd saves, by the shard unit in which they were saved."""

    def __init__(self, module: BaseArchitecture) -> None:
        self.outside = 0.0
        self.units = [0.0] * len(module.shard_units())
        self.inputs = [0.0] * len(self.units)
        self._current: int | None = None
        self._seen: dict[int, Tensor] = {}
        for parameter in module.parameters():
            self._seen[parameter.untyped_storage()._cdata] = parameter
        for index, unit in enumerate(module.shard_units()):
            unit.register_forward_pre_hook(lambda _, args, i=index: self._enter(i, args))
            unit.register_forward_hook(lambda *_: self._leave())

    def _enter(self, index: int, args: tuple[object, ...]) -> None:
        self._current = index
        self.inputs[index] = _num_bytes([value for value in args if isinstance(value, Tensor)])

    def _leave(self) -> None:
        self._current = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that the address is not used again
            if self._current is None:
                self.outside += storage.nbytes()
            else:
                self.units[self._current] += storage.nbytes()
        return tensor

    def peak(self, checkpointed: bool) -> float:
        """Bytes at the start of the backward pass; with recomputation, while the largest unit is recomputed."""
        if checkpointed and self.units:
            return self.outside + sum(self.inputs) + max(self.units)
        return self.outside + sum(self.units)


def _activation_bytes(module: BaseArchitecture, config: GlowFlowConfig, size: int) -> tuple[float, float]:
    """What a forward pass keeps for the backward pass (the memory that it reads among it), and its new carry."""
    saved = _SavedBytes(module.train())
    batch = fake_batch(config, size)
    hooks: contextlib.AbstractContextManager[object] = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t)
    with hooks, autocast(config.training.precision, torch.device("cpu")):
        _, carry = module(batch)
    return saved.peak(config.training.activation_checkpointing), _num_bytes(list((carry or {}).values()))
