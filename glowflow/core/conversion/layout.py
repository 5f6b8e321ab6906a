"""Which foreign tensors each of our parameters is made of; the same table serves both directions.

Ours stack what is computed at once (queries, keys and values; gate and up), keep matrices as (outputs, inputs), and
turn neighbouring channels of a head. Hugging Face's Llama turns channel i with channel i + W/2, so the rows of its
queries and keys are put into another order. Only order and shape change, never a number.

Legend: H heads, W head width, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glowflow.config.architectures import TransformerConfig
from glowflow.config.errors import CheckpointError, ConfigError, Problem
from glowflow.config.loader import load_config

__all__ = ["Foreign", "Part", "checked_model", "from_theirs", "llama_parts", "shapes", "tensor_problems", "to_theirs"]


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint in our terms.

    Args:
        model: the keys of ``model``.
        context: the longest sequence that it was made for, in tokens.
        state: our parameters by name, fp32.
        described: what it was, in a few words.
    """

    model: dict[str, Any]
    context: int
    state: dict[str, Tensor]
    described: str


@dataclass(frozen=True)
class Part:
    """One of our parameters.

    Args:
        ours: its name.
        theirs: names of the foreign tensors whose rows it holds, in order.
        rows: rows of each of them.
        width: their other dimension; None: they are vectors.
        halves: of each, the number of heads whose two halves are turned together; 0 where nothing is turned.
        transposed: they are (inputs, outputs).
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    width: int | None = None
    halves: tuple[int, ...] = ()
    transposed: bool = False

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of a foreign tensor with so many rows."""
        if self.width is None:
            return (rows,)
        return (self.width, rows) if self.transposed else (rows, self.width)


def shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """The foreign tensors by name."""
    return {name: part.shape(rows) for part in parts for name, rows in zip(part.theirs, part.rows, strict=True)}


def from_theirs(parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, fp32, of tensors whose names and shapes are those of ``shapes``."""
    return {part.ours: _joined(part, [tensors[name] for name in part.theirs]) for part in parts}


def _joined(part: Part, tensors: Sequence[Tensor]) -> Tensor:
    pieces = [tensor.T if part.transposed and tensor.ndim > 1 else tensor for tensor in tensors]
    for index, heads in enumerate(part.halves):
        if heads:  # (H, 2, W/2) -> (H, W/2, 2)
            pieces[index] = pieces[index].unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return torch.cat([piece.to(torch.float32) for piece in pieces]).contiguous()


def to_theirs(parts: Iterable[Part], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The foreign tensors of our parameters, contiguous."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        pieces = list(state[part.ours].split(part.rows))
        for index, heads in enumerate(part.halves):
            if heads:  # (H, W/2, 2) -> (H, 2, W/2)
                pieces[index] = pieces[index].unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        for name, piece in zip(part.theirs, pieces, strict=True):
            tensors[name] = (piece.T if part.transposed and piece.ndim > 1 else piece).contiguous()
    return tensors


def tensor_problems(source: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> list[Problem]:
    """Every name and shape in which foreign tensors (or what else has a ``shape``) differ from what is wanted."""
    problems = [Problem(source, f"lacks the tensor {name} {wanted[name]}") for name in wanted if name not in given]
    problems += [Problem(source, f"holds an unknown tensor {name}") for name in given if name not in wanted]
    for name, shape in wanted.items():
        if name in given and tuple(given[name].shape) != shape:
            problems.append(Problem(source, f"tensor {name} must have the shape {shape}", tuple(given[name].shape)))
    return problems


def checked_model(source: str, model: dict[str, Any], context: int) -> TransformerConfig:
    """The section ``model`` of a foreign checkpoint, checked as any other.

    Raises:
        CheckpointError: no model of ours has these sizes.
    """
    try:
        section = load_config({"model": model, "data": {"context": context}}).model
    except ConfigError as error:
        problems = [Problem(source, f"describes a model that cannot be: {problem}") for problem in error.problems]
        raise CheckpointError(problems) from error
    assert isinstance(section, TransformerConfig)
    return section


def llama_parts(config: TransformerConfig, names: Mapping[str, str], *, halves: bool) -> list[Part]:
    """A Llama: every tensor of ours and what it is made of.

    Args:
        config: of a model that is one.
        names: foreign name of ``embedding``, ``norm``, ``head``, and with ``{}`` for the layer of ``attention_norm``,
            ``q``, ``k``, ``v``, ``out``, ``feed_forward_norm``, ``gate``, ``up``, ``down``; without ``.weight``.
        halves: the two halves of a head are turned together, as Hugging Face has it.
    """
    dim, hidden, vocabulary = config.dim, config.hidden_dim, config.vocab_size or 0
    queries, keys = config.dim, config.num_kv_heads * config.head_dim
    turned = (config.heads, config.num_kv_heads, 0) if halves else ()
    parts = [Part("embedding.weight", (f"{names['embedding']}.weight",), (vocabulary,), dim)]

    def linear(ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], width: int, bias: bool, *halves: int) -> None:
        parts.append(Part(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), rows, width, halves))
        if bias:
            parts.append(Part(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows, None, halves))

    for layer in range(config.depth):
        at = f"blocks.{layer}"
        of = {name: pattern.format(layer) for name, pattern in names.items()}
        parts.append(Part(f"{at}.attention_norm.weight", (f"{of['attention_norm']}.weight",), (dim,)))
        projections, rows = (of["q"], of["k"], of["v"]), (queries, keys, keys)
        linear(f"{at}.attention.qkv", projections, rows, dim, bool(config.bias), *turned)
        linear(f"{at}.attention.out", (of["out"],), (dim,), queries, config.bias in (True, "attention"))
        parts.append(Part(f"{at}.feed_forward_norm.weight", (f"{of['feed_forward_norm']}.weight",), (dim,)))
        everywhere = config.bias is True
        linear(f"{at}.feed_forward.gate_up", (of["gate"], of["up"]), (hidden, hidden), dim, everywhere)
        linear(f"{at}.feed_forward.down", (of["down"],), (dim,), hidden, everywhere)
    parts.append(Part("norm.weight", (f"{names['norm']}.weight",), (dim,)))
    if not config.tie_embeddings:
        parts.append(Part("head.weight", (f"{names['head']}.weight",), (vocabulary,), dim))
    return parts
