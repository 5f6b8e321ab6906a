"""The look of every PNG, and how it is written: fonts for a paper's column, no window system, equal bytes each time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLUMN", "PAGE", "note", "save", "small_print", "tidy"]

# Inches. A figure of 5.2 at 10 points, set into a column of 3.4, has letters of 6.5 points.
COLUMN, PAGE = 5.2, 7.4
_DPI = 200
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def save(draw: Callable[[Figure], None], path: Path, width: float, height: float) -> Path:
    """Draw a figure and write it as PNG; of equal content the bytes are equal.

    Args:
        draw: fills the figure.
        width: of the figure in inches; ``height`` likewise.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # From matplotlib's own defaults, not from what a matplotlibrc on this machine says.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def note(axes: Axes, text: str) -> None:
    """A line of small print above the panel: what is counted, and what is not shown."""
    axes.set_title(text, loc="left", fontsize=8.5, color="#555555", pad=6)


def small_print(figure: Figure, text: str) -> None:
    """The same above all panels of a figure, in as many lines as it takes."""
    lines = textwrap.fill(text, int(figure.get_figwidth() * 14.5))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=8.5, color="#555555")


def tidy(axes: Axes, *, x: bool = True, y: bool = True) -> None:
    """Leave the grid on the directions that carry numbers."""
    axes.grid(x, axis="x")
    axes.grid(y, axis="y")
