"""What attention costs: kinds x backends x lengths, forward, forward and backward, and one step of decoding.

First every case is tried once, on a CPU in a process of its own: what it needs of memory, whether it fits, and about
how long it takes. Then all that can run take turns, a whole round over every kind, backend and length before the next
round begins, because the speed of a machine drifts by more than the differences that are looked for. Ratios are taken
within a round. What cannot be measured is a row that says why.

It needs torch, numpy, pydantic and PyYAML alone: ``python -m glowflow.benchmark.attention`` on a GPU box prints the
JSON document that ``glowflow bench attention --read FILE`` draws and keeps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from glowflow.benchmark.attention_grid import CHANGE_THE_PROCESS, Grid, read_grid
from glowflow.benchmark.attention_options import OPTIONS
from glowflow.benchmark.attention_passes import Case, Shape, prepare, timed
from glowflow.benchmark.attention_results import dense_up_to, growth, relative_to_dense
from glowflow.benchmark.memory import Apart, DoesNotFit, out_of_memory, peak_memory
from glowflow.benchmark.train import environment
from glowflow.config.errors import GlowFlowError
from glowflow.core.allocator import keep_freed_memory
from glowflow.core.attention.dispatch import explain
from glowflow.core.attention.flops import run_flops

__all__ = ["bench_attention", "main"]

_ENOUGH_S = 0.1  # a visit repeats a short pass until this much was timed,
_MOST_CALLS = 100  # or this often
_AS_AT = "as at "  # begins a reason that a shorter length had already

Progress = Callable[[str], None]


@dataclass
class _Tried:
    """What the first try of a pass showed."""

    seconds: float
    peak_bytes: int
    cache_bytes: int | None


@dataclass
class _Entry:
    """A case at one length; ``reason``: why it is not timed."""

    case: Case
    length: int
    chosen: bool
    advice: str
    reason: str | None = None
    tried: _Tried | None = None
    rounds: list[float] = field(default_factory=list)


def bench_attention(grid: Grid, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure a grid.

    Args:
        grid: from `read_grid`.
        progress: told what is being done.

    Returns:
        JSON-able: ``rows`` (see `attention_results`; besides ``tflops``, ``peak_bytes``, ``cache_bytes``,
        ``speed_relative_to_dense`` and ``advice``), ``growth``, ``dense_up_to``, the grid and the environment.
    """
    if grid.shape.device == "cpu":
        keep_freed_memory()  # as training does: else large tensors pay for page faults, which grow faster than length
    entries = list(_entries(grid))
    load = [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []
    _try_all(grid, entries, progress)
    for number in range(grid.repeat):
        for length in sorted({entry.length for entry in entries}):
            progress(f"round {number + 1}/{grid.repeat}: {length} positions")
            for entry in entries:
                if entry.length == length and entry.reason is None:
                    entry.rounds.append(_visit(grid.shape, entry))
    load += [os.getloadavg()[0]] if load else []
    return _document(grid, entries, load)


def _entries(grid: Grid) -> Iterator[_Entry]:
    """Every kind, pass and backend that is asked for, at every length."""
    for kind in grid.kinds:
        spec = grid.shape.spec(kind)
        for which in grid.passes:
            known = {row.name: row for row in explain(spec, grid.shape.conditions(which))}
            chosen = next((name for name, row in known.items() if row.chosen), None)
            names: list[str] = []
            for asked in grid.backends:
                every = [name for name in known if name not in CHANGE_THE_PROCESS]
                names += {"all": every, "auto": [chosen or "auto"]}.get(asked, [asked])
            for name in dict.fromkeys(names):
                row = known.get(name)
                reason = "; ".join(row.reasons) if row else f"no kernel of this name computes kind {spec.kind}"
                reason = "no kernel can serve" if name == "auto" else reason
                for length in grid.lengths_of(which):
                    advice = row.advice if row else ""
                    yield _Entry(Case(kind, name, which), length, name == chosen, advice, reason or None)


def _try_all(grid: Grid, entries: Sequence[_Entry], progress: Progress) -> None:
    """Run each case once, short ones first, and leave out what cannot run or would take too long."""
    apart = Apart(grid.memory_limit) if grid.shape.device == "cpu" else None
    before: dict[Case, list[_Entry]] = {}
    try:
        for entry in sorted(entries, key=lambda entry: entry.length):
            shorter = before.setdefault(entry.case, [])
            if entry.reason is None:
                entry.reason = _foreseen(shorter, entry.length, grid.most_seconds)
            if entry.reason is None:
                progress(
                    f"trying {entry.case.kind}, {entry.case.backend}, {entry.case.which}, {entry.length} positions"
                )
                _try(grid.shape, entry, apart)
            shorter.append(entry)
    finally:
        if apart is not None:
            apart.close()


def _foreseen(shorter: Sequence[_Entry], length: int, most_seconds: float) -> str | None:
    """Why a case need not be tried, from what it did at the shorter lengths."""
    if not shorter:
        return None
    last = shorter[-1]
    if last.tried is None:
        reason = str(last.reason)
        return reason if reason.startswith(_AS_AT) else f"{_AS_AT}{last.length} positions: {reason}"
    exponent = 0.0 if last.case.which == "decode" else 2.0
    if len(shorter) > 1 and (first := shorter[-2].tried) is not None:
        exponent = math.log(last.tried.seconds / first.seconds) / math.log(last.length / shorter[-2].length)
    seconds = last.tried.seconds * (length / last.length) ** max(exponent, 0.0)
    if seconds <= most_seconds:
        return None
    return f"left out: about {seconds:.0f} s a pass, with --most-seconds {most_seconds:g}"


def _try(shape: Shape, entry: _Entry, apart: Apart | None) -> None:
    try:
        if apart is None:
            entry.tried = _run_once(shape, entry.case, entry.length)
        else:
            entry.tried = apart(_run_once, shape, entry.case, entry.length)
    except DoesNotFit as error:
        entry.reason = str(error)
    except Exception as error:  # a kernel that says it can serve and fails is a finding, not the end of the benchmark
        entry.reason = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _run_once(shape: Shape, case: Case, length: int) -> _Tried:
    """Memory of a first call, masks included, and the time of a second one."""
    device = torch.device(shape.device)
    with out_of_memory(device):
        prepared = prepare(shape, case, length, steps=2)
        peak = peak_memory(prepared.run, device)
        return _Tried(timed(prepared.run, device, 1)[0] / 1000, peak, prepared.cache_bytes)


def _visit(shape: Shape, entry: _Entry) -> float:
    """Median milliseconds of one pass, in one round."""
    assert entry.tried is not None
    times = min(max(math.ceil(_ENOUGH_S / max(entry.tried.seconds, 1e-9)), 1), _MOST_CALLS)
    prepared = prepare(shape, entry.case, entry.length, steps=times + 1)
    prepared.warm()
    return statistics.median(timed(prepared.run, torch.device(shape.device), times))


def _document(grid: Grid, entries: Sequence[_Entry], load: list[float]) -> dict[str, Any]:
    rows = [_row(grid.shape, entry) for entry in entries]
    for row, speed in zip(rows, relative_to_dense(rows), strict=True):
        row["speed_relative_to_dense"] = speed
    document: dict[str, Any] = {"benchmark": "attention", "grid": asdict(grid), "rows": rows, "growth": growth(rows)}
    longest = dense_up_to(rows, grid.shape.window)
    if longest is not None:
        document["dense_up_to"] = {grid.shape.device: longest}
    document["load_average"] = load  # of the last minute, at the start and at the end
    document["environment"] = environment(torch.device(grid.shape.device))
    return document


def _row(shape: Shape, entry: _Entry) -> dict[str, Any]:
    ms = statistics.median(entry.rounds) if entry.rounds else None
    row: dict[str, Any] = {"kind": entry.case.kind, "backend": entry.case.backend, "chosen": entry.chosen}
    row |= {"pass": entry.case.which, "length": entry.length, "reason": entry.reason, "advice": entry.advice}
    row |= {"ms": ms, "rounds": entry.rounds, "tflops": None, "peak_bytes": None, "cache_bytes": None}
    if entry.tried is not None:
        row |= {"peak_bytes": entry.tried.peak_bytes, "cache_bytes": entry.tried.cache_bytes}
    if ms is not None:
        row["tflops"] = _flops(shape, entry.case, entry.length) / (ms / 1000) / 1e12
    return row


def _flops(shape: Shape, case: Case, length: int) -> float:
    """What one pass cannot do without; of decoding the attention alone."""
    spec, which = shape.spec(case.kind), case.which
    queries, keys = (1, length + 1) if which == "decode" else (length, length)
    return shape.batch * run_flops(spec, queries, keys, backward=which == "backward")


def main(args: Sequence[str] | None = None) -> int:
    """Command line of the measurement alone."""
    parser = argparse.ArgumentParser(prog="python -m glowflow.benchmark.attention", description=__doc__)
    for option in OPTIONS:
        default = f" [default: {option.default}]" if option.default else ""
        parser.add_argument(f"--{option.name}", default=option.default, help=option.help + default)
    given = {name.replace("_", "-"): value for name, value in vars(parser.parse_args(args)).items()}
    try:
        document = bench_attention(read_grid(given), _note)
    except GlowFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
