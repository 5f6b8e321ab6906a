"""The PNGs that show trials in the space that was searched: the ranking, slices through it, parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.experiments import views
from glowflow.experiments.canvas import COLUMN, PAGE, note, save, small_print, tidy
from glowflow.experiments.labels import metric_label, wrap
from glowflow.experiments.results import Outcome, Results
from glowflow.experiments.tables import main_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["leaderboard_table", "parallel_coordinates", "slices"]

_MOST_ROWS = 15
_MOST_SLICES = 6
_MOST_AXES = 8


def leaderboard_table(results: Results, path: Path) -> Path:
    """The best settings as a table, for places that take only pictures."""
    cells = main_tables(results)[results.metric if results.by_seeds else "ranking"]
    shown = cells.rows[:_MOST_ROWS]
    table = [
        [wrap(header, 14, lines=3) for header in cells.headers],
        *([wrap(cell, 44, lines=3) for cell in row] for row in shown),
    ]

    def draw(figure: Figure) -> None:
        widths = _text_widths(figure, table)
        heights = [0.1 + 0.17 * max(cell.count("\n") + 1 for cell in row) for row in table]
        more = len(cells.rows) - len(shown)
        figure.set_size_inches(sum(widths) + 0.2, sum(heights) + (0.7 if more else 0.5))
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set(xlim=(0, sum(widths)), ylim=(sum(heights) + (0.2 if more else 0), 0))
        for y, row in enumerate(table):
            middle = sum(heights[:y]) + heights[y] / 2
            for x, (text, right) in enumerate(zip(row, cells.right, strict=True)):
                place = sum(widths[:x]) + (widths[x] - 0.18 if right else 0)
                style: dict[str, Any] = {"weight": "bold"} if y == 0 else {}
                axes.text(place, middle, text, ha="right" if right else "left", va="center", fontsize=9, **style)
        axes.axhline(heights[0], color="#444444", linewidth=0.8)
        if more:
            axes.text(0, sum(heights) + 0.12, f"and {more} more", va="center", fontsize=8.5, color="#555555")
        note(axes, f"{results.name}; {views.count_line(results.outcomes)}")

    return save(draw, path, PAGE, 3.0)


def _text_widths(figure: Figure, table: Sequence[Sequence[str]]) -> list[float]:
    """Inches that each column takes, with a gap."""
    widths = []
    for column in zip(*table, strict=True):
        texts = [
            figure.text(0, 0, text, fontsize=9, weight="bold" if i == 0 else "normal") for i, text in enumerate(column)
        ]
        widths.append(max(text.get_window_extent().width for text in texts) / figure.dpi + 0.22)
        for text in texts:
            text.remove()
    return widths


def slices(results: Results, path: Path) -> Path:
    """The metric against each parameter by itself, one panel a parameter."""
    keys = views.shown_keys(results, _MOST_SLICES)
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    width, height = (COLUMN, 3.5) if columns == 1 else (PAGE, 0.4 + 2.6 * rows)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, key in zip(panels, keys, strict=False):
            _draw_slice(axes, results, views.axis_of(results, key))
        for axes in panels[len(keys) :]:
            axes.remove()
        for axes in panels[::columns]:
            axes.set_ylabel(metric_label(results.metric))
        text = views.count_line(results.outcomes) + _not_on_the_scale(results)
        small_print(figure, text + views.left_out(results, keys))
        _dot_legend(figure, results)

    return save(draw, path, width, height)


def _not_on_the_scale(results: Results) -> str:
    values = [o.values[results.metric] for o in results.outcomes if results.metric in o.values]
    low, high = views.window(values, results.mode)
    beyond, lost = sum(not low <= value <= high for value in values), len(results.outcomes) - len(values)
    texts = [f"; triangles: {beyond} beyond the scale"] if beyond else []
    return "".join([*texts, f"; crosses: {lost} without a value"] if lost else texts)


def _draw_slice(axes: Axes, results: Results, axis: views.Axis) -> None:
    values = [o.values[results.metric] for o in results.outcomes if results.metric in o.values]
    low, high = views.window(values, results.mode)
    pad = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    for outcome in reversed(results.outcomes):
        x = axis.position(outcome.params) + views.spread(axis, outcome)
        value = outcome.values.get(results.metric)
        if value is None:
            edge = 1.0 if results.mode == "min" else 0.0
            axes.plot(x, edge, "x", color=views.LOST, markersize=6, transform=axes.get_xaxis_transform(), clip_on=False)
            continue
        marker, color, face, size = _dot(outcome, results.best)
        if not low - pad <= value <= high + pad:
            marker, value = ("^", high + pad) if value > high else ("v", low - pad)
        style: dict[str, Any] = {"color": color, "markerfacecolor": face, "markersize": size, "clip_on": False}
        axes.plot(x, value, marker=marker, linestyle="", zorder=4 if outcome.trial == results.best else 3, **style)
    axes.set_ylim(low - pad, high + pad)
    ticks = axis.ticks(4)
    long = sum(len(text) + 1 for _, text in ticks) > 26
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks([position for position, _ in ticks], [text for _, text in ticks], **turned)
    axes.set_xlim(-0.22 if axis.absent else -0.07, 1.07)
    axes.set_xlabel(axis.title + (" (log scale)" if axis.kind == "log" else ""))
    tidy(axes, x=axis.kind != "category")


def _dot(outcome: Outcome, best: str | None) -> tuple[str, str, str, float]:
    """Marker, colour, fill and size of a trial."""
    if outcome.trial == best:
        return "*", views.BEST, views.BEST, 12
    if outcome.status == "FINISHED":
        return "o", views.FINISHED, views.FINISHED, 5.5
    return "o", views.STOPPED, "white", 5.5


def _dot_legend(figure: Figure, results: Results) -> None:
    from matplotlib.lines import Line2D

    shown = [o for o in results.outcomes if results.metric in o.values]
    others = [o for o in shown if o.trial != results.best]
    examples = {
        "best": next((o for o in shown if o.trial == results.best), None),
        "ran to the end": next((o for o in others if o.status == "FINISHED"), None),
        "not to the end": next((o for o in others if o.status != "FINISHED"), None),
    }
    handles = []
    for label, example in examples.items():
        if example is not None:
            marker, color, face, size = _dot(example, results.best)
            style: dict[str, Any] = {"marker": marker, "color": color, "markerfacecolor": face, "markersize": size}
            handles.append(Line2D([], [], linestyle="", label=label, **style))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.3)


def parallel_coordinates(results: Results, path: Path) -> Path:
    """One line a trial through its parameters to its metric, the best darkest; failed trials end in their own place."""
    keys = views.shown_keys(results, _MOST_AXES)
    axes_of_keys = [views.axis_of(results, key) for key in keys]
    width = max(COLUMN, min(1.25 * (len(keys) + 1), 11.0))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        scale = views.MetricScale.of(results)
        for outcome in reversed(results.outcomes):
            heights = [axis.position(outcome.params) for axis in axes_of_keys] + [scale.position(outcome)]
            axes.plot(range(len(heights)), heights, solid_joinstyle="round", **_line_style(results, outcome, scale))
        for i, axis in enumerate(axes_of_keys):
            _draw_axis(axes, i, axis.ticks(4))
        _draw_axis(axes, len(keys), scale.ticks())
        titles = [wrap(a.title, 13) + ("\n(log)" if a.kind == "log" else "") for a in axes_of_keys]
        axes.set_xticks(range(len(keys) + 1), [*titles, wrap(metric_label(results.metric), 13, lines=3)])
        axes.tick_params(axis="x", length=0, pad=8)
        axes.set_xlim(-0.25, len(keys) + 0.6)
        deep = scale.lost or any(axis.absent for axis in axes_of_keys)
        axes.set_ylim(-0.2 if deep else -0.05, 1.05)
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        note(axes, f"{views.count_line(results.outcomes)}; darker is better{views.left_out(results, keys)}")

    return save(draw, path, width, 4.0)


def _line_style(results: Results, outcome: Outcome, scale: views.MetricScale) -> dict[str, Any]:
    if outcome.trial == results.best:
        return {"color": views.BEST, "linewidth": 2.4, "alpha": 1.0, "zorder": 4}
    if results.metric not in outcome.values:
        return {"color": views.LOST, "linewidth": 1.0, "alpha": 0.6, "linestyle": ":", "zorder": 1}
    crowded = len(results.outcomes) > 60
    color = views.shade(scale.badness(outcome))
    return {"color": color, "linewidth": 0.9 if crowded else 1.4, "alpha": 0.45 if crowded else 0.8, "zorder": 2}


def _draw_axis(axes: Axes, x: int, ticks: Sequence[tuple[float, str]]) -> None:
    """An upright axis with its numbers, on a white ground so that lines do not run through them."""
    axes.plot([x, x], [min(0.0, ticks[0][0]) if ticks else 0.0, 1.0], color="#444444", linewidth=0.9, zorder=5)
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for height, text in ticks:
        axes.plot([x - 0.03, x], [height, height], color="#444444", linewidth=0.9, zorder=5)
        wrapped = wrap(text, 14)
        axes.text(x + 0.05, height, wrapped, va="center", ha="left", fontsize=8, zorder=6, bbox=ground)
