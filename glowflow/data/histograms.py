"""Histograms of lengths and sizes: bins with round borders, and bars of block characters for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Histogram", "bars", "histogram"]

_BINS = 10
_LONG_TAIL = 32  # largest over smallest from which on bins double instead of being equally wide
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Histogram:
    """How many values lie where; bin *i* holds ``edges[i] <= value < edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    least: float
    median: float
    mean: float
    largest: float
    whole: bool
    """Whether the values are whole numbers."""

    def labels(self) -> list[str]:
        """What each bin is called: ``12–15`` of whole numbers, else ``0.2–0.4``."""
        if self.least == self.largest and len(self.counts) == 1:
            return [_number(self.least)]
        names = []
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            last = high - 1 if self.whole else high
            names.append(_number(low) if last == low else f"{_number(low)}–{_number(last)}")
        return names

    def summary(self) -> str:
        """Smallest, median and largest value in one line."""
        least, median, largest = (_number(value, 3) for value in (self.least, self.median, self.largest))
        return least if least == largest else f"{least} to {largest}, median {median}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "edges": list(self.edges),
            "counts": list(self.counts),
            "least": self.least,
            "median": self.median,
            "mean": self.mean,
            "largest": self.largest,
        }


def histogram(values: npt.ArrayLike) -> Histogram | None:
    """The histogram of some numbers, (N,), none of them negative; None of no numbers.

    Bins are equally wide, with round borders; where the largest value is more than 32 times the smallest, borders are
    powers of two (of four, eight ... where they would be many).
    """
    array = np.asarray(values)
    if not array.size:
        return None
    whole = bool(np.issubdtype(array.dtype, np.integer))
    least, largest = float(array.min()), float(array.max())
    edges = _doubling(least, largest) if 0 < least and largest / least > _LONG_TAIL else _even(least, largest, whole)
    counts, _ = np.histogram(array, bins=[*edges[:-1], math.inf])
    return Histogram(
        tuple(edges), tuple(counts.tolist()), least, float(np.median(array)), float(array.mean()), largest, whole
    )


def _doubling(least: float, largest: float) -> list[float]:
    first, last = math.floor(math.log2(least)), math.floor(math.log2(largest)) + 1
    step = -(-(last - first) // _BINS)
    return [2.0**power for power in range(first, last + step, step)]


def _even(least: float, largest: float, whole: bool) -> list[float]:
    """Borders at multiples of 1, 2 or 5 times a power of ten, the last one above the largest value."""
    smallest = 1.0 if whole else 10.0 ** (math.floor(math.log10(largest)) - 3 if largest else 0)
    power = math.floor(math.log10(max(largest - least, smallest) / _BINS))
    widths = (factor * 10.0**exponent for exponent in range(power, power + 3) for factor in (1, 2, 5))
    for width in widths:
        # Rounded: 3 * 0.1 is no border that anybody wants to read. A rounded border may lie on a value's wrong side.
        first, last = round(least / width), round(largest / width)
        first -= round(first * width, 12) > least
        last += round(last * width, 12) <= largest
        if width >= smallest and last - first <= _BINS:
            return [round(number * width, 12) for number in range(first, last + 1)]
    raise AssertionError("one of the widths is a tenth of the largest value or more")


def _number(value: float, digits: int = 6) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:.{digits}g}"


def bars(labels: Sequence[str], counts: Sequence[int], width: int = 32) -> list[str]:
    """One line per count: label, bar, number; the longest bar is ``width`` characters long."""
    most = max(counts, default=0) or 1
    room = max((len(label) for label in labels), default=0)
    lines = []
    for label, count in zip(labels, counts, strict=True):
        eighths = math.ceil(count / most * width * 8)  # whatever is there at all is seen
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{label.rjust(room)}  {bar} {count:,}" if count else f"{label.rjust(room)}  0")
    return lines
