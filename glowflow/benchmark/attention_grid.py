"""From the texts of the options of ``glowflow bench attention`` to the grid that is measured, or all that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from glowflow.benchmark.attention_options import KINDS, OPTIONS, PASSES, Pass
from glowflow.benchmark.attention_passes import Shape
from glowflow.config.errors import ConfigError, Problem

__all__ = ["CHANGE_THE_PROCESS", "Grid", "read_grid"]

T = TypeVar("T")
GIB = 2**30
CHANGE_THE_PROCESS = ("flash_attn_3",)
"""Kernels that put themselves underneath torch's own operators for good: what is measured after them is not itself."""


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Args:
        shape: sizes that all cases share.
        kinds: of `KINDS`.
        backends: names; ``auto``: the one that is chosen for the pass; ``all``: every one that knows the kind.
        lengths: T of ``forward`` and ``backward``, ascending.
        positions: where the steps of ``decode`` are timed, ascending.
        passes: of `PASSES`; ``backward`` is forward and backward.
        repeat: rounds.
        most_seconds: a pass that would take longer is left out.
        memory_limit: bytes that a pass on a CPU may take; None: what is available.
    """

    shape: Shape
    kinds: tuple[str, ...]
    backends: tuple[str, ...]
    lengths: tuple[int, ...]
    positions: tuple[int, ...]
    passes: tuple[Pass, ...]
    repeat: int
    most_seconds: float
    memory_limit: int | None = None

    def lengths_of(self, which: Pass) -> tuple[int, ...]:
        """The lengths, or of ``decode`` the positions, at which a pass is timed."""
        return self.positions if which == "decode" else self.lengths


def read_grid(given: Mapping[str, str]) -> Grid:
    """The grid from the texts of the options; what is left out has its default.

    Raises:
        ConfigError: with everything that is wrong.
    """
    read = _Reader({option.name: given.get(option.name) or option.default for option in OPTIONS})
    device = read.one_of("device", ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        read.problems.append(Problem("--device", "there is no CUDA device here", device, "use cpu"))
    heads = read.count("heads")
    shape = Shape(
        batch=read.count("batch"),
        heads=heads,
        kv_heads=read.count("kv-heads", heads),
        head_dim=read.count("head-dim"),
        window=read.count("window"),
        dtype=read.one_of("dtype", _DTYPES, "bfloat16" if device == "cuda" else "float32"),
        device=device,
    )
    limit = read.number("memory-limit", None)
    grid = Grid(
        shape=shape,
        kinds=read.several("kinds", KINDS),
        backends=read.several("backends"),
        lengths=read.counts("lengths"),
        positions=read.counts("positions"),
        passes=cast("tuple[Pass, ...]", read.several("passes", PASSES)),
        repeat=read.count("repeat"),
        most_seconds=read.number("most-seconds", None) or 0.0,
        memory_limit=None if limit is None else int(limit * GIB),
    )
    if len(grid.backends) > 1 and (given_alone := set(CHANGE_THE_PROCESS) & set(grid.backends)):
        rule = "changes torch's operators for the whole process: measure it by itself"
        read.problems += [Problem("--backends", rule, name) for name in sorted(given_alone)]
    if read.problems:
        raise ConfigError(read.problems, "glowflow bench attention")
    for kind in grid.kinds:
        shape.config(kind)  # says which sizes no model may have
    return grid


_DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Reader:
    """Reads texts and collects what is wrong with them; a wrong one reads as something harmless."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts
        self.problems: list[Problem] = []

    def several(self, name: str, known: Sequence[str] = ()) -> tuple[str, ...]:
        """Words between commas, each once."""
        words = tuple(dict.fromkeys(word.strip() for word in self._texts[name].split(",") if word.strip()))
        if not words:
            self.problems.append(Problem(f"--{name}", "must name something", self._texts[name]))
        for word in words if known else ():
            if word not in known:
                self.problems.append(Problem(f"--{name}", f"must be of {', '.join(known)}", word))
        return words

    def one_of(self, name: str, known: Sequence[str], default: str) -> str:
        word = self._texts[name] or default
        if word not in known:
            self.problems.append(Problem(f"--{name}", f"must be one of {', '.join(known)}", word))
        return word

    def count(self, name: str, default: int | None = None) -> int:
        text = self._texts[name]
        return default if default is not None and not text else self._count(name, text)

    def counts(self, name: str) -> tuple[int, ...]:
        """Whole numbers between commas, sorted."""
        return tuple(sorted({self._count(name, word) for word in self.several(name)}))

    def _count(self, name: str, text: str) -> int:
        value = self._parsed(name, text, int, "must be a whole number of 1 or more")
        return 1 if value is None else value

    def number(self, name: str, default: float | None) -> float | None:
        text = self._texts[name]
        return self._parsed(name, text, float, "must be a number greater than 0") if text else default

    def _parsed(self, name: str, text: str, parse: Callable[[str], T], rule: str) -> T | None:
        try:
            value: Any = parse(text)
            if 0 < value < float("inf"):
                return cast("T", value)
        except ValueError:
            pass
        self.problems.append(Problem(f"--{name}", rule, text))
        return None
