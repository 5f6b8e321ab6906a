"""Weights of encoders that were trained before: ``model.image.checkpoint`` and ``model.audio.checkpoint``.

A file holds an encoder's tensors by their names (``stem. ...``, ``blocks. ...``, ``norm. ...``), or those of a whole
model of ours, of which the encoder's part is taken (``image_encoder.stem. ...``). Stem, blocks and last norm must be
there and fit. Resampler, projection and the vector of missing media lead to the model around the encoder: they are
taken where all of a part fits, and start anew otherwise.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glowflow.config.errors import CheckpointError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.encoders.encoder import MediaEncoder, build_encoder

__all__ = ["encoder_state"]

logger = logging.getLogger(__name__)

_MOST_SHOWN = 8
_OWN_PARTS = ("resampler", "projection", "missing")


def encoder_state(config: MultimodalConfig) -> dict[str, Tensor]:
    """The tensors that the encoders' checkpoints give, by the model's names (``image_encoder.stem. ...``).

    Args:
        config: the section ``model``, with the input channels of its encoders.

    Returns:
        Empty where no encoder names a checkpoint.

    Raises:
        CheckpointError: a file cannot be read, or does not fit the encoder: every name and shape that differs.
    """
    state: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for name in config.modalities:
        path = getattr(config, name).checkpoint
        if path is None:
            continue
        prefix = f"{name}_encoder."
        with torch.device("meta"):
            encoder = build_encoder(name, config)
        given = _of_encoder(_read(Path(path), f"model.{name}.checkpoint"), prefix)
        state |= {prefix + key: value for key, value in _fitting(encoder, given, path, problems).items()}
    if problems:
        shown = problems[:_MOST_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem("checkpoint", f"{len(problems) - len(shown)} more tensors do not fit"))
        raise CheckpointError(shown, title="The checkpoint of an encoder does not fit its config")
    return state


def _of_encoder(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The encoder's own tensors, by its own names."""
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return inside or dict(tensors)


def _fitting(
    encoder: MediaEncoder, given: Mapping[str, Tensor], path: str, problems: list[Problem]
) -> dict[str, Tensor]:
    wanted = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    body = [name for name in wanted if _part(name) not in _OWN_PARTS]
    for name in body:
        if name not in shapes:
            problems.append(Problem(path, f"lacks the tensor {name} {wanted[name]}"))
        elif shapes[name] != wanted[name]:
            problems.append(Problem(path, f"the tensor {name} must have the shape {wanted[name]}", shapes[name]))
    unknown = sorted(name for name in shapes if name not in wanted and _part(name) not in _OWN_PARTS)
    problems += [Problem(path, f"holds an unknown tensor {name}", shapes[name]) for name in unknown]
    taken = {name: given[name] for name in body if name in given}
    for part in _OWN_PARTS:
        names = [name for name in wanted if _part(name) == part]
        if names and all(shapes.get(name) == wanted[name] for name in names):
            taken |= {name: given[name] for name in names}
        elif names:
            logger.info("%s has no %s that fits this model: it starts anew", path, part)
    return taken


def _part(name: str) -> str:
    return name.partition(".")[0]


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """All tensors of a file, without trusting it."""
    if not path.is_file():
        raise CheckpointError(Problem(key, "does not exist", str(path)))
    if path.suffix not in (".pt", ".safetensors"):
        raise CheckpointError(Problem(key, "must end in .pt or .safetensors", str(path)))
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "a .pt file may hold tensors and plain values alone"
        raise CheckpointError(Problem(key, f"cannot be read: {reason}", str(path), hint)) from error
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(Problem(key, "holds no tensors", str(path)))
    return tensors


def _torch_file(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return {}
    inner = content.get("state_dict")
    return inner if isinstance(inner, dict) else content


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        import safetensors
    except ImportError as error:
        hint = "`pip install safetensors`, or use a .pt file"
        raise CheckpointError(Problem("safetensors", "is not installed", hint=hint)) from error
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
