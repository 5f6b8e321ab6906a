"""WikiText files: where their articles begin, and how the text files are rebuilt from the Parquet copy.

An article begins at the blank line before a heading of level one, `` = Title = `` between two blank lines (tables
inside articles have lines that look like headings but touch text). So the articles' concatenation is the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["article_starts", "rebuild_lines"]

_HEADING = re.compile(rb"^ = [^=].* = \s*$")


def article_starts(path: str | Path) -> list[int]:
    """Byte offsets at which the articles of a WikiText file begin; the first is 0."""
    with open(path, "rb") as stream:
        starts = [start for start in _headings(stream) if start > 0]
    return [0, *starts]


def _headings(stream: BinaryIO) -> Iterator[int]:
    """Offsets of the blank lines that precede headings: a window of three lines slides over the file."""
    offset = blank_start = 0
    before_blank, heading = True, False  # the file's beginning counts as a blank line
    for line in stream:
        blank = not line.strip()
        if heading and blank:
            yield blank_start
        heading = before_blank and not blank and bool(_HEADING.match(line)) and not line.rstrip().endswith(b" = =")
        if not heading:
            blank_start = offset
        before_blank = blank
        offset += len(line)


def rebuild_lines(rows: Iterable[Any]) -> Iterator[str]:
    """Lines of the original file from the rows of the Hugging Face copy, which stores blank lines as empty strings."""
    for row in rows:
        text = row or " \n"
        yield text if text.endswith("\n") else text + "\n"
