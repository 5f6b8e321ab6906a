"""The figure of ``glowflow mup check``: changes over the width, a column for each parametrisation, log scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glowflow.experiments import views
from glowflow.experiments.canvas import PAGE, save, small_print
from glowflow.training.coordinates import CoordinateCheck

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coordinates"]

_MARKERS = {"embedding": "o", "attention": "s", "feed-forward": "^", "residual": "D", "logits": "v"}
_FAINTEST = 0.35


def coordinates(checks: Sequence[CoordinateCheck], path: Path) -> Path:
    """Draw the mean absolute change of every place after the first and after the last step.

    Args:
        checks: of the same model under different parametrisations, side by side.
        path: of the PNG.
    """
    last = checks[0].steps
    steps = [1] if last == 1 else [1, last]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(steps), len(checks), squeeze=False, sharex=True, sharey="row")
        for column, check in enumerate(checks):
            for axes, step in zip(panels[:, column], steps, strict=True):
                _draw(axes, check, step)
            panels[0][column].set_title(_title(check), loc="left", fontsize=9.5)
            panels[-1][column].set_xlabel("width (model.dim)")
        for axes, step in zip(panels[:, 0], steps, strict=True):
            axes.set_ylabel(f"mean |x$_t$ - x$_0$|, t = {step} step{'s' if step > 1 else ''}", parse_math=True)
        handles = {line.get_label(): line for line in panels[0][0].get_lines() if line.get_alpha() == 1.0}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(_MARKERS))
        small_print(figure, _caption(checks[0]))

    return save(draw, path, max(PAGE, 3.4 * len(checks)), 2.8 * len(steps) + 1.0)


def _draw(axes: Axes, check: CoordinateCheck, step: int) -> None:
    """A line for each place; of the blocks the later ones in stronger colours."""
    sorts = list(_MARKERS)
    blocks = sum(place.endswith("residual") for place in check.changes)
    for place, values in check.changes.items():
        sort, block = place.rpartition(" ")[2], place.split()[1] if " " in place else str(blocks)
        strength = 1.0 if blocks == 1 else _FAINTEST + (1.0 - _FAINTEST) * (int(block) - 1) / (blocks - 1)
        axes.plot(
            check.widths,
            values[step],
            label=sort,
            color=views.VARIANTS[sorts.index(sort)],
            marker=_MARKERS[sort],
            alpha=strength,
            markersize=4,
            linewidth=1.4,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(check.widths, [str(width) for width in check.widths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the style knows no powers of ten


def _title(check: CoordinateCheck) -> str:
    if not check.mup:
        return "standard parametrisation"
    return f"maximal-update parametrisation: {'flat' if check.ok else 'not flat'}"


def _caption(check: CoordinateCheck) -> str:
    return (
        f"{check.optimizer}, learning rate {check.lr:g}, mean of {check.seeds} seed{'s' if check.seeds > 1 else ''}. "
        "How far what each place puts out has moved from where it started; of the blocks the later ones are darker. "
        "A flat line learns alike at every width."
    )
