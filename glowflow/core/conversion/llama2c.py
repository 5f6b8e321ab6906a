"""llama2.c's checkpoints (github.com/karpathy/llama2.c): ``legacy``, without a magic number, and ``version 1``.

Both are little-endian fp32 tensors one after the other, each for all layers. The legacy header is seven integers (dim,
hidden width, layers, heads, key/value heads, vocabulary, longest sequence), the vocabulary negative where the output
matrix is one of its own; the tables of RoPE follow the last norm, although run.c computes them anew. Version 1 has the
magic number ``ak42``, a header of 256 bytes and no tables. RMSNorm's epsilon is 1e-5 and RoPE's base 10000 in both.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glowflow.config.architectures import ArchitectureConfig, TransformerConfig
from glowflow.config.errors import CheckpointError, Problem
from glowflow.core.conversion.layout import Foreign, Part, checked_model, from_theirs, llama_parts, shapes, to_theirs
from glowflow.core.conversion.reasons import require

__all__ = ["VERSIONS", "read_llama2c", "write_llama2c"]

VERSIONS = (0, 1)
"""Version 0 is the legacy format."""

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = {0: 28, 1: 256}
_LARGEST, _DEEPEST = 1 << 24, 1 << 12  # of any number in a header, and of layers: more is noise
_THETA, _EPS = 10000.0, 1e-5
_NAMES = {
    "embedding": "tok_embeddings",
    "attention_norm": "layers.{}.attention_norm",
    "q": "layers.{}.wq",
    "k": "layers.{}.wk",
    "v": "layers.{}.wv",
    "out": "layers.{}.wo",
    "feed_forward_norm": "layers.{}.ffn_norm",
    "gate": "layers.{}.w1",
    "down": "layers.{}.w2",
    "up": "layers.{}.w3",
    "norm": "norm",
    "head": "output",
}
_ATTENTION, _FEED_FORWARD = ("q", "k", "v", "out"), ("gate", "down", "up")
_ORDER = {
    0: ("embedding", "attention_norm", *_ATTENTION, "feed_forward_norm", *_FEED_FORWARD, "norm", "tables", "head"),
    1: ("attention_norm", "feed_forward_norm", "norm", "embedding", *_ATTENTION, *_FEED_FORWARD, "head"),
}


def read_llama2c(path: str | Path) -> Foreign:
    """Read a checkpoint of llama2.c.

    Raises:
        CheckpointError: it cannot be read, is truncated, quantised (version 2), or something else.
    """
    path = Path(path)
    try:
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error.strerror or error}")) from error
    version, model, context = _header(path, bytes(content[:256]))
    config = checked_model(str(path), model, context)
    parts = _parts(config)
    sizes = [(name, _count(shape)) for name, shape in _sequence(config, parts, version, context)]
    whole = _HEADER_BYTES[version] + 4 * sum(count for _, count in sizes)
    if len(content) != whole:
        state = "is truncated" if len(content) < whole else "is longer than its header says"
        rule = f"{state}: {len(content):,} bytes instead of {whole:,}"
        raise CheckpointError(Problem(str(path), rule, hint="copy the file again, or it is no file of llama2.c"))
    numbers, wanted, tensors, at = content[_HEADER_BYTES[version] :].view("<f4"), shapes(parts), {}, 0
    for name, count in sizes:
        if name in wanted:
            tensors[name] = torch.from_numpy(np.array(numbers[at : at + count], np.float32)).view(wanted[name])
        at += count
    described = f"llama2.c, {'legacy' if version == 0 else f'version {version}'}"
    return Foreign(model, context, from_theirs(parts, tensors), described)


def write_llama2c(
    path: str | Path, config: ArchitectureConfig, context: int, state: dict[str, Tensor], version: int = 0
) -> None:
    """Write a checkpoint of llama2.c, whole or not at all.

    Args:
        config: the section ``model``.
        context: the longest sequence.
        state: our parameters by name.
        version: 0 (legacy, what run.c reads) or 1.

    Raises:
        CheckpointError: run.c does not compute such a model, or the file cannot be written.
    """
    section = _expressible(config)
    parts = _parts(section)
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in to_theirs(parts, state).items()}
    tensors["tables"] = _tables(section.head_dim, context)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(_header_of(section, context, version))
            for name, _ in _sequence(section, parts, version, context):
                file.write(tensors[name].contiguous().numpy().astype("<f4").tobytes())
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be written: {error.strerror or error}")) from error
    finally:
        partial.unlink(missing_ok=True)


def _expressible(config: ArchitectureConfig) -> TransformerConfig:
    return require(
        config,
        "llama2.c",
        {
            "norm": ("rmsnorm",),
            "norm_eps": (_EPS,),
            "bias": (False,),
            "position": ("rope",),
            "rope_theta": (_THETA,),
            "rope_scaling": (None,),
            "ffn": ("swiglu",),
        },
    )


def _header(path: Path, start: bytes) -> tuple[int, dict[str, Any], int]:
    """Version, section ``model`` and longest sequence."""
    version, offset = 0, 0
    if len(start) >= 8 and struct.unpack_from("<I", start)[0] == _MAGIC:
        version, offset = struct.unpack_from("<i", start, 4)[0], 8
        if version == 2:
            hint = "export it in fp32: export.py --version 0 or 1"
            raise CheckpointError(Problem(str(path), "is quantised (version 2 of llama2.c)", hint=hint))
        if version != 1:
            raise CheckpointError(Problem(str(path), "is of a version of llama2.c that is not known", version))
    if len(start) < (256 if version else 28):
        rule = f"is truncated or no checkpoint of llama2.c: it has {len(start)} bytes"
        raise CheckpointError(Problem(str(path), rule))
    dim, hidden, depth, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", start, offset)
    tied = start[36] == 1 if version else vocabulary > 0
    vocabulary = abs(vocabulary) if version == 0 else vocabulary
    numbers = (dim, hidden, depth, heads, kv_heads, vocabulary, context)
    if not all(0 < number <= _LARGEST for number in numbers) or depth > _DEEPEST:
        rule = "is no checkpoint of llama2.c: its header has no sizes of a model"
        raise CheckpointError(Problem(str(path), rule, numbers))
    model = {
        "arch": "transformer",
        "vocab_size": vocabulary,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": "swiglu",
        "ffn_dim": hidden,
        "tie_embeddings": tied,
        "norm_eps": _EPS,
        "rope_theta": _THETA,
    }
    return version, model, context


def _header_of(config: TransformerConfig, context: int, version: int) -> bytes:
    vocabulary = config.vocab_size or 0
    signed = vocabulary if version or config.tie_embeddings else -vocabulary
    sizes = (config.dim, config.hidden_dim, config.depth, config.heads, config.num_kv_heads, signed, context)
    if version == 0:
        return struct.pack("<7i", *sizes)
    return struct.pack("<Ii7iB", _MAGIC, version, *sizes, config.tie_embeddings).ljust(_HEADER_BYTES[version], b"\0")


def _parts(config: TransformerConfig) -> list[Part]:
    return llama_parts(config, _NAMES, halves=False)


def _sequence(
    config: TransformerConfig, parts: list[Part], version: int, context: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a file, in order; ``tables`` are those of RoPE."""
    known = {**shapes(parts), "tables": (2, context, config.head_dim // 2)}
    found = []
    for kind in _ORDER[version]:
        pattern = _NAMES.get(kind)
        layers = range(config.depth) if pattern is not None and "{}" in pattern else range(1)
        names = ["tables"] if pattern is None else [f"{pattern.format(layer)}.weight" for layer in layers]
        found += [(name, known[name]) for name in names if name in known]
    return found


def _tables(head_dim: int, context: int) -> Tensor:
    """cos and sin of every position and pair, (2, T, W/2), in fp32 throughout as llama2.c's export has them."""
    each = 1.0 / (_THETA ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    angles = torch.outer(torch.arange(context), each).float()
    return torch.stack((angles.cos(), angles.sin()))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
