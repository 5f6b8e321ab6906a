"""From times to what is said about them: speed relative to dense, growth with the length, where dense ends to pay.

A row is one case at one length, a plain mapping with ``kind``, ``backend``, ``chosen`` (by ``auto``), ``pass``,
``length``, ``reason`` (why there are no times; else None), ``rounds`` (median milliseconds of each round) and ``ms``
(the median of those), ``tflops``, ``peak_bytes``, ``cache_bytes`` and ``speed_relative_to_dense``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["dense_up_to", "growth", "left_out", "relative_to_dense", "series", "table_rows"]

Row = Mapping[str, Any]
_WORTHWHILE = 1.1


def relative_to_dense(rows: Sequence[Row]) -> list[float | None]:
    """How fast each row is relative to dense attention by its chosen kernel (above 1: faster), paired by round."""
    dense = {(r["pass"], r["length"]): r["rounds"] for r in rows if r["kind"] == "dense" and r["chosen"] and r["ms"]}
    found: list[float | None] = []
    for row in rows:
        base = dense.get((row["pass"], row["length"]))
        if base is None or row["ms"] is None:
            found.append(None)
        else:
            found.append(statistics.median(b / own for b, own in zip(base, row["rounds"], strict=True)))
    return found


def series(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(pass, kind, backend) -> its measured rows by length, in the order of the rows."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["ms"] is not None:
            found.setdefault((row["pass"], row["kind"], row["backend"]), []).append(row)
    return found


def growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How time grows with the length: t ~ T ** exponent, for each case that was measured at two lengths or more.

    Returns:
        Per case ``from`` and ``to`` (lengths), ``exponent`` (least squares over all lengths on log scales), ``steps``
        (the exponent between each length and the next) and ``spread``: the largest deviation of a length's time from
        the median over the lengths, as a share of it.
    """
    found = []
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    for (which, kind, backend), measured in sorted(series(rows).items(), key=lambda item: passes.index(item[0][0])):
        if len(measured) < 2:
            continue
        lengths, times = [row["length"] for row in measured], [row["ms"] for row in measured]
        x, y = [math.log(length) for length in lengths], [math.log(ms) for ms in times]
        middle = statistics.median(times)
        entry = {"pass": which, "kind": kind, "backend": backend, "from": lengths[0], "to": lengths[-1]}
        entry["exponent"] = statistics.linear_regression(x, y).slope
        entry["steps"] = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
        entry["spread"] = max(abs(ms / middle - 1) for ms in times)
        found.append(entry)
    return found


def dense_up_to(rows: Sequence[Row], window: int) -> int | None:
    """The longest measured length up to which training gains less than a tenth in speed by the window.

    Dense attention sees more, so that little is not worth it. Sequences that fit into the window are dense anyhow.
    None where the two were not measured together.
    """
    gains = {
        row["length"]: row["speed_relative_to_dense"]
        for row in rows
        if (row["kind"], row["pass"]) == ("windowed", "backward") and row["chosen"]
    }
    compared = sorted((length, gain) for length, gain in gains.items() if gain is not None)
    if not compared:
        return None
    longest = window
    for length, gain in compared:
        if length > window and gain >= _WORTHWHILE:
            break
        longest = max(longest, length)
    return longest


def table_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """Headers and cells of what was measured, by pass and length."""
    slow = all((row["tflops"] or 0.0) < 1 for row in rows)  # a CPU
    headers = ["pass", "length", "kind", "backend", "ms", f"{'GFLOP' if slow else 'TFLOP'}/s", "MiB"]
    headers.append("speed relative to dense")
    cells: list[list[object]] = []
    order = list(dict.fromkeys(row["pass"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["pass"]), row["length"])):
        if row["ms"] is None:
            continue
        held = row["cache_bytes"] if row["pass"] == "decode" else row["peak_bytes"]
        rate = row["tflops"] * (1000 if slow else 1)
        numbers = (row["ms"], rate, held / 2**20, row["speed_relative_to_dense"])
        cells.append([row["pass"], row["length"], row["kind"], row["backend"], *map(_rounded, numbers)])
    return headers, cells


def left_out(rows: Sequence[Row]) -> list[str]:
    """One line for each reason why cases were not measured."""
    reasons: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for row in rows:
        if row["ms"] is None:
            passes = reasons.setdefault((row["kind"], row["backend"], row["reason"]), {})
            passes.setdefault(row["pass"], []).append(row["length"])
    lines = []
    for (kind, backend, reason), passes in reasons.items():
        where = ", ".join(f"{which} {_span(lengths)}" for which, lengths in passes.items())
        lines.append(f"{kind}, {backend} ({where}): {reason}")
    return lines


def _span(lengths: Sequence[int]) -> str:
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0])


def _rounded(value: float | None) -> float | None:
    """Three digits: what is measured on a machine that others use has no more."""
    return None if value is None else float(f"{value:.3g}")
