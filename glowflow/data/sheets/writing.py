"""Writing a sheet: the file's name says what it becomes."""

from __future__ import annotations

import os
from pathlib import Path

from glowflow.config.errors import ConfigError, DataError, Problem
from glowflow.data.sheets.cards import Sheet

__all__ = ["check_sheet", "write_sheet"]

_MOST_ON_PNG = 240  # a taller picture opens nowhere


def check_sheet(file: Path, samples: int) -> None:
    """What can be known before anything is read.

    Raises:
        ConfigError: the name ends in neither .png nor .html, or a PNG does not hold so many samples.
    """
    if file.suffix.lower() not in (".png", ".html"):
        raise ConfigError(Problem("--sheet", "must end in .png or .html", str(file)))
    if file.suffix.lower() == ".png" and samples > _MOST_ON_PNG:
        hint = "write a .html, or show fewer"
        raise ConfigError(Problem("--samples", f"a PNG holds at most {_MOST_ON_PNG}", samples, hint))


def write_sheet(sheet: Sheet, file: Path) -> Path:
    """Draw a sheet as PNG, or write it as an HTML page that needs no other file.

    Raises:
        DataError: the file cannot be written.
    """
    if file.suffix.lower() == ".png":
        from glowflow.data.sheets.png import png_of as render
    else:
        from glowflow.data.sheets.html import html_of as render
    content = render(sheet)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(Problem(str(file), f"cannot be written: {error.strerror or error}")) from error
    return file
