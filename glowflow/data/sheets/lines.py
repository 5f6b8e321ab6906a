"""Text in several styles set into lines of a given width."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from glowflow.data.sheets.cards import Run

__all__ = ["set_lines"]

_PIECES = re.compile(r"\n|[^\S\n]+|[^\s]+")
Measure = Callable[[str, str], float]


def set_lines(runs: Iterable[Run], width: float, measure: Measure, most: int) -> list[list[Run]]:
    """Break text at spaces, and words that are longer than a line where they reach its end.

    Args:
        runs: pieces of text with their style; ``\\n`` ends a line and is shown as ``↵``.
        width: of a line; ``measure(text, style)`` gives that of a text.
        most: lines at most; the last one then ends in ``…``.
    """
    lines: list[list[Run]] = [[]]
    left = width
    for text, style in runs:
        for piece in _PIECES.findall(text):
            if piece == "\n":
                lines[-1].append(("↵", style))
                lines.append([])
                left = width
                continue
            needed = measure(piece, style)
            if needed > left and lines[-1] and not piece.isspace():
                lines.append([])
                left = width
            while needed > left and len(piece) > 1 and not piece.isspace():
                cut = _fitting(piece, style, left, measure)
                lines[-1].append((piece[:cut], style))
                lines.append([])
                piece, left = piece[cut:], width
                needed = measure(piece, style)
            lines[-1].append((piece, style))
            left -= needed
            if len(lines) > most:
                return _shortened(lines[:most])
    return lines


def _fitting(piece: str, style: str, width: float, measure: Measure) -> int:
    """How many characters fit, at least one."""
    low, high = 1, len(piece)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(piece[:middle], style) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _shortened(lines: list[list[Run]]) -> list[list[Run]]:
    last: Sequence[Run] = lines[-1]
    text, style = last[-1] if last else ("", "text")
    kept = text[: max(0, len(text) - 2)] if style in ("prompt", "text") else text
    return [*lines[:-1], [*last[:-1], (kept + "…", style)]]
