"""Folders of Hugging Face's ``transformers``: config.json and safetensors, one file or several with an index.

Nothing of ``transformers`` is imported, and no pickle is opened: pytorch_model.bin is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import CheckpointError, Problem
from glowflow.core.conversion.families import FAMILIES, Family, Values, family_of
from glowflow.core.conversion.layout import (
    Foreign,
    checked_model,
    from_theirs,
    shapes,
    tensor_problems,
    to_theirs,
)

__all__ = ["DTYPES", "choose_family", "read_huggingface", "write_huggingface"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions in which weights can be written."""

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_HEAD = "lm_head.weight"


def read_huggingface(folder: Path) -> Foreign:
    """Read a folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is of another family or asks for what ours lacks.
    """
    source = str(folder / "config.json")
    values = _json(folder / "config.json")
    family = family_of(source, values)
    reading = Values(source, values)
    if values.get("quantization_config") is not None:
        reading.refuse("quantization_config", "must be null: quantised weights are not read", "...")
    model, context = family.read(reading)
    if reading.problems:
        title = f"{folder} holds a {family.model_type} that GlowFlow has no architecture for"
        raise CheckpointError(reading.problems, title)
    config = checked_model(source, model, context)
    parts = family.parts(config)
    wanted = shapes(parts)
    tensors = _named(_tensors(folder), family)
    problems = []
    if config.tie_embeddings and _HEAD in tensors:
        embedding = tensors.get(parts[0].theirs[0])
        if embedding is None or not torch.equal(tensors.pop(_HEAD), embedding):
            rule = f"has tie_word_embeddings, but {_HEAD} is not the embedding"
            problems.append(Problem(source, rule, hint="set tie_word_embeddings to false in config.json"))
    problems += tensor_problems(str(folder), wanted, tensors)
    problems += [
        Problem(str(folder), f"tensor {name} must hold floating-point numbers", str(tensor.dtype))
        for name, tensor in tensors.items()
        if name in wanted and not tensor.is_floating_point()
    ]
    if problems:
        raise CheckpointError(problems, f"the weights in {folder} do not fit its config.json")
    described = f"Hugging Face {family.model_type}, {next(iter(tensors.values())).dtype}".replace("torch.", "")
    return Foreign(model, context, from_theirs(parts, tensors), described)


def choose_family(config: ArchitectureConfig) -> Family:
    """The family that such a model is written as: the one whose sort of positions, biases and attention it has."""
    position, bias = getattr(config, "position", None), getattr(config, "bias", False)
    attention = getattr(config, "attention", None)
    if position == "learned":
        return FAMILIES["gpt2"]
    if attention is not None and attention.kind == "windowed":
        return FAMILIES["mistral"]
    return FAMILIES["qwen2" if bias == "qkv" else "llama"]


def write_huggingface(
    folder: str | Path,
    config: ArchitectureConfig,
    context: int,
    state: Mapping[str, Tensor],
    *,
    dtype: str = "fp32",
    special_ids: Mapping[str, int | None] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a folder, whole or not at all.

    Args:
        folder: new or empty.
        config: the section ``model``.
        context: the longest sequence, in tokens.
        state: our parameters by name.
        dtype: of ``DTYPES``; what was read in this precision is written as it was.
        special_ids: ``bos_token_id`` and ``eos_token_id``.
        files: what else belongs in it, by name: the tokenizer's.

    Raises:
        CheckpointError: no family of ours computes such a model, or the folder holds something or cannot be written.
    """
    from safetensors.torch import save_file

    folder, family = Path(folder), choose_family(config)
    values = family.write(config, context)
    section: Any = config
    parts = family.parts(section)
    tensors = {name: tensor.to("cpu", DTYPES[dtype]) for name, tensor in to_theirs(parts, state).items()}
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": names[DTYPES[dtype]],
        "torch_dtype": names[DTYPES[dtype]],
        "vocab_size": section.vocab_size,
        "tie_word_embeddings": section.tie_embeddings,
        **(special_ids or {}),
    }
    texts = {"config.json": {**common, **values}, "generation_config.json": dict(special_ids or {})}
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(Problem(str(folder), "must be new or an empty folder"))
        partial.mkdir(parents=True)
        save_file(tensors, str(partial / _WEIGHTS), metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        os.replace(partial, folder)
    except OSError as error:
        raise CheckpointError(Problem(str(folder), f"cannot be written: {error.strerror or error}")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "a Hugging Face folder has it beside the weights"
        raise CheckpointError(Problem(str(path), "does not exist", hint=hint)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read as JSON: {error}")) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(str(path), "must hold a mapping", content))
    return content


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    if (folder / _INDEX).is_file():
        named = _json(folder / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(Problem(str(folder / _INDEX), "must hold a mapping weight_map of names of files"))
        shards = sorted(set(named.values()))
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise CheckpointError([Problem(str(folder / _INDEX), "must name files beside it", n) for n in outside])
    elif (folder / _WEIGHTS).is_file():
        shards = [_WEIGHTS]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        rule, hint = f"has neither {_WEIGHTS} nor {_INDEX}", ""
        if pickles:
            rule += f", only {', '.join(pickles[:3])}"
            hint = "a pickle may run code and is not opened: save it again with safe_serialization=True"
        raise CheckpointError(Problem(str(folder), rule, hint=hint))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            [Problem(str(folder / name), "does not exist, but the index names it") for name in missing]
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors.update(_safetensors(folder / name))
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(Problem(str(path), f"is damaged or no safetensors file: {error}")) from error


def _named(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Learned tensors under their full names; a model saved without its head leaves out the prefix."""
    bare = not any(name.startswith(family.prefix) for name in tensors)
    return {
        f"{family.prefix}{name}" if bare and name != _HEAD else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(family.ignored)
    }
