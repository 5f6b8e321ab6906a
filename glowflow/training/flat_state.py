"""What a checkpoint holds, as one flat mapping from names to tensors that DCP can write, cut and put together again.

``model.<name>`` are the weights, ``optimizer.<name>.<key>`` the optimiser's state of that parameter and
``carry.<name>`` the recurrent memory. A shard stays a DTensor, so DCP knows its place in the whole and any number of
ranks can read it. Optimiser values that are no tensors are handed back beside it and go into JSON: nothing that is
loaded as an object is ever pickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from glowflow.config.errors import CheckpointError, Problem
from glowflow.config.media import MODALITIES
from glowflow.core.model import state_dict_problems
from glowflow.training.strategies.base import unwrap_module

__all__ = [
    "CARRY",
    "MODEL",
    "OPTIMIZER",
    "MetadataReader",
    "architecture_problems",
    "config_problems",
    "describe_architecture",
    "empty_optimizer_state",
    "model_tensors",
    "optimizer_tensors",
    "saved_tensors",
]

MODEL, OPTIMIZER, CARRY = "model.", "optimizer.", "carry."

# Keys of `model:` that may change between saving and loading: they do not alter what the weights compute.
_FREE_KEYS = {"dropout", "attention.backend", "init_std"}
_FREE_KEYS |= {f"{name}.{key}" for name in MODALITIES for key in ("checkpoint", "dropout", "frozen")}
_MAX_SHOWN = 8


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers of the architecture, sharing memory with it."""
    return {MODEL + name: tensor for name, tensor in unwrap_module(module).state_dict().items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state by parameter name: its tensors, sharing memory with it, and its other values.

    Raises:
        TypeError: a value is neither a tensor nor plain JSON, or a shard of something that is not the parameter.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter, _ in _named_parameters(module, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor) and value.shape != parameter.shape:
                raise TypeError(f"optimiser state {key!r} of {name} is sharded but has not the parameter's shape")
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{name}.{key}"] = value
            elif isinstance(value, (bool, int, float, str, type(None))):
                values.setdefault(name, {})[key] = value
            else:
                raise TypeError(f"optimiser state {key!r} of {name} cannot be saved: {type(value).__name__}")
    return tensors, values


def empty_optimizer_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, TensorStorageMetadata],
    values: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Any]]]:
    """Room for the saved optimiser state, laid out as the parameters are now.

    Returns:
        The tensors to load by flat name, and the same tensors (and ``values``) as the optimiser's new ``state``.
    """
    keys: dict[str, list[str]] = {}
    for flat in saved:
        if flat.startswith(OPTIMIZER):
            name, _, key = flat.removeprefix(OPTIMIZER).rpartition(".")
            keys.setdefault(name, []).append(key)
    flat_tensors: dict[str, Tensor] = {}
    state: dict[Tensor, dict[str, Any]] = {}
    for name, parameter, group in _named_parameters(module, optimizer):
        entries: dict[str, Any] = dict(values.get(name, {}))
        for key in keys.get(name, []):
            flat = f"{OPTIMIZER}{name}.{key}"
            entries[key] = flat_tensors[flat] = _room(key, saved[flat], parameter, group)
        if entries:
            state[parameter] = entries
    return flat_tensors, state


def _room(key: str, saved: TensorStorageMetadata, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    dtype = saved.properties.dtype
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        # As torch's own Optimizer.load_state_dict: the count stays on the CPU unless the kernel reads it there.
        return torch.zeros(saved.size, dtype=dtype)
    if saved.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(saved.size, dtype=dtype, device=parameter.device)


def _named_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter, Mapping[str, Any]]]:
    """(name, parameter, its group) of everything that the optimiser updates, in its order."""
    architecture = unwrap_module(module)
    architecture.state_dict()  # FSDP puts the shards, which the optimiser holds, back in place of gathered weights
    names = {parameter: name for name, parameter in architecture.named_parameters()}
    return [(names[p], p, group) for group in optimizer.param_groups for p in group["params"]]


def describe_architecture(module: nn.Module) -> dict[str, Any]:
    """The section ``model`` of the config that built the module, as plain JSON."""
    config: dict[str, Any] = unwrap_module(module).config.model_dump(mode="json")
    return config


def architecture_problems(
    module: nn.Module, saved: Mapping[str, torch.Size], saved_config: Mapping[str, Any]
) -> list[Problem]:
    """Why saved weights are not those of this architecture: config keys that differ first, then tensors that do.

    Args:
        module: the model to load into.
        saved: shapes of the saved weights, by the architecture's names.
        saved_config: what ``describe_architecture`` said when they were saved.
    """
    problems = config_problems(describe_architecture(module), _with_defaults(module, saved_config))
    shapes = {name: torch.empty(shape, device="meta") for name, shape in saved.items()}
    tensors = state_dict_problems(unwrap_module(module), shapes, "checkpoint")
    problems += tensors[:_MAX_SHOWN]
    if len(tensors) > _MAX_SHOWN:
        problems.append(Problem("weights", f"{len(tensors) - _MAX_SHOWN} more tensors differ"))
    return problems


def _with_defaults(module: nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section ``model`` with the defaults of the keys that the version which saved it did not have yet."""
    schema = type(unwrap_module(module).config)
    try:
        return schema.model_validate(dict(saved)).model_dump(mode="json")
    except ValueError:  # of another architecture or a later version: its keys are compared as they are
        return saved


def config_problems(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Problem]:
    """Keys of ``model:`` whose value is not the saved one; keys that do not alter the function may differ."""
    here, there = _flatten(own), _flatten(saved)
    problems = []
    for key in sorted((here.keys() | there.keys()) - _FREE_KEYS):
        if here.get(key) != there.get(key):
            hint = "another tokenizer or data set" if key == "vocab_size" else ""
            rule = f"the checkpoint was written with {there.get(key)!r}"
            problems.append(Problem(f"model.{key}", rule, here.get(key), hint))
    return problems


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


class MetadataReader(FileSystemReader):
    """DCP's reader of a directory, except that its index, a pickle, may only name the classes that DCP puts there.

    The tensors themselves are read by DCP with ``weights_only=True``.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(Problem(str(file), f"cannot be read: {error}")) from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(Problem(str(file), "is not the index of a checkpoint"))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Refuses every name but those of DCP's index."""

    _ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # where Python 3.13 keeps them
    }

    def find_class(self, module_name: str, name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._ALLOWED.get(module_name, ()):
            return super().find_class(module_name, name)
        if (module_name, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"it names {module_name}.{name}, which no index of a checkpoint does")


def _enum_member(enum: object, name: object) -> Any:
    """What Python before 3.11.4 pickles an enum's member as; of ``getattr`` nothing more is let through."""
    if isinstance(enum, type) and issubclass(enum, Enum) and name in enum.__members__:
        return enum.__members__[str(name)]
    raise pickle.UnpicklingError(f"it asks for an attribute {name!r}, which no index of a checkpoint does")


def saved_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors that a checkpoint holds, by flat name."""
    return {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
