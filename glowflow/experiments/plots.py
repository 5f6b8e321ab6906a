"""The figures of a sweep as PNG, drawn with matplotlib's Agg at the width of a paper's column.

``write_plots`` writes those that a sweep gives material for. Trials without a value are not left out in silence: each
figure shows or counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.experiments import views
from glowflow.experiments.canvas import COLUMN, PAGE, note, save, small_print, tidy
from glowflow.experiments.labels import clip, metric_label, short_keys, short_params, wrap
from glowflow.experiments.plots_of_space import leaderboard_table, parallel_coordinates, slices
from glowflow.experiments.results import Group, Outcome, Results, pareto_front
from glowflow.experiments.tables import p_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "importance_bars",
    "intervals",
    "leaderboard_table",
    "learning_curves",
    "parallel_coordinates",
    "pareto",
    "slices",
    "write_plots",
]

_MOST_GROUPS = 30
_ROOMY = 10


def write_plots(results: Results, folder: Path) -> dict[str, Path]:
    """Write every figure that the sweep gives material for.

    Returns:
        Name of the figure -> PNG, in the order of a report.
    """
    made: dict[str, Path] = {}
    for name, (draw, wanted) in _FIGURES.items():
        if wanted(results):
            made[name] = draw(results, folder / f"{name}.png")
    return made


def _mode(results: Results, metric: str) -> str:
    return results.modes[list(results.metrics).index(metric)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    pad = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def intervals(results: Results, path: Path) -> Path:
    """Mean with its 95 % interval for each setting, one dot a seed; one panel a metric."""
    shown = {metric: groups[:_MOST_GROUPS] for metric, groups in results.groups.items()}
    rows = len(next(iter(shown.values())))
    height = len(shown) * (1.25 + (0.42 if rows <= _ROOMY else 0.26) * max(rows, 2))

    def draw(figure: Figure) -> None:
        for axes, metric in zip(_panels(figure, len(shown), 1), shown, strict=True):
            _draw_intervals(axes, results, metric, shown[metric])

    return save(draw, path, COLUMN + 0.6, height)


def _draw_intervals(axes: Axes, results: Results, metric: str, groups: Sequence[Group]) -> None:
    best = next((group.interval for group in groups if group.verdict == "best"), None)
    if best is not None:
        axes.axvline(best.estimate, color=views.BEST, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    breaks = "\n" if len(groups) <= _ROOMY else ", "
    for row, group in enumerate(groups):
        color = views.BEST if group.verdict == "best" else views.FINISHED
        if group.interval is None:
            continue
        if math.isfinite(group.interval.low):
            ends = [group.interval.low, group.interval.high]
            axes.plot(ends, [row, row], color=color, linewidth=2, marker="|", markersize=9, zorder=2)
        axes.plot(group.interval.estimate, row, marker="D", color=color, markersize=6, zorder=4)
        below = [row + 0.22] * len(group.values)
        axes.plot(group.values, below, linestyle="", marker="o", color=color, alpha=0.55, markersize=4.5, zorder=3)
    axes.set_yticks(range(len(groups)), [_group_name(results, group, breaks) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(metric_label(metric))
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=6)
    tidy(axes, y=False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(groups)), [_group_verdict(group, breaks) for group in groups])
    right.tick_params(length=0, labelsize=8.5)
    right.spines["right"].set_visible(False)
    total = len(results.groups[metric])
    left_out = f"; the best {len(groups)} of {total} settings" if total > len(groups) else ""
    note(axes, f"diamond: mean with 95 % interval; dots: seeds{left_out}")


def _group_name(results: Results, group: Group, breaks: str) -> str:
    lost = f", {group.missing} lost" if group.missing else ""
    name = group.name if results.space.variants else f"{group.name}: {short_params(group.params)}"
    if breaks == "\n":
        return f"{wrap(name, 22)}\n(n = {len(group.values)}{lost})"
    return f"{clip(name, 24)} (n = {len(group.values)}{lost})"


def _group_verdict(group: Group, breaks: str) -> str:
    if group.p_value is None or math.isnan(group.p_value):
        return group.verdict
    shown = p_text(group.p_value)
    return f"{group.verdict}{breaks}p {shown if shown.startswith('<') else f'= {shown}'}"


def learning_curves(results: Results, path: Path) -> Path:
    """Every trial's metric over the steps: the best in front, stopped ones fading; variants by colour.

    Beside it the last third of the steps by itself, where it tells trials apart that look alike at full scale.
    """
    metrics = [metric for metric in results.metrics if views.has_curves(results, metric)]
    closer = any(_worth_a_closer_look(results, metric) for metric in metrics)

    def draw(figure: Figure) -> None:
        widths = [3, 2] if closer else [1]
        panels = figure.subplots(len(metrics), len(widths), squeeze=False, width_ratios=widths)
        for row, metric in zip(panels, metrics, strict=True):
            _draw_fan(row[0], results, metric)
            if closer:
                _draw_last_third(row[1], results, metric)
        _curve_legend(figure, results)
        small_print(figure, views.count_line(results.outcomes))

    return save(draw, path, PAGE if closer else COLUMN, 3.4 * len(metrics) + 0.5)


def _worth_a_closer_look(results: Results, metric: str) -> bool:
    finished = [o.curves[metric] for o in results.outcomes if o.status == "FINISHED" and o.curves[metric]]
    return len(finished) > 1 and all(len([s for s, _ in c if s >= c[-1][0] * 2 / 3]) > 2 for c in finished)


def _draw_fan(axes: Axes, results: Results, metric: str) -> None:
    drawn = [outcome for outcome in results.outcomes if outcome.curves[metric]]
    _draw_curves(axes, results, metric, drawn)
    low, high = views.curve_window([o.curves[metric] for o in drawn], _mode(results, metric))
    low, high = _padded(low, high, 0.05)
    axes.set_ylim(low, high)
    axes.set_xlim(left=0)
    axes.set_ylabel(metric_label(metric))
    outside = sum(any(not low <= value <= high for _, value in o.curves[metric]) for o in drawn)
    silent = len(results.outcomes) - len(drawn)
    lines = [f"{outside} partly beyond the scale"] if outside else []
    note(axes, "; ".join([*lines, f"{silent} never reported"] if silent else lines))


def _draw_last_third(axes: Axes, results: Results, metric: str) -> None:
    finished = [o for o in results.outcomes if o.status == "FINISHED" and o.curves[metric]]
    last = max((o.curves[metric][-1][0] for o in finished), default=1)
    values = [value for o in finished for step, value in o.curves[metric] if step >= last * 2 / 3]
    _draw_curves(axes, results, metric, finished)
    axes.set_xlim(last * 2 / 3, last * 1.01)
    axes.set_ylim(*_padded(*views.window(values, _mode(results, metric)), 0.05))
    note(axes, "the last third")


def _draw_curves(axes: Axes, results: Results, metric: str, drawn: Sequence[Outcome]) -> None:
    looks = _variant_looks(results)
    # The best in front; of variants the first at the back, so that the dashes of one like it show on its line.
    for outcome in drawn if looks else reversed(drawn):
        _draw_curve(axes, outcome, metric, results, looks.get(outcome.label or "", {}))
    axes.set_xlabel("training step")
    axes.locator_params(axis="x", nbins=6)


def _variant_looks(results: Results) -> dict[str, dict[str, Any]]:
    lines = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.5, 1.5)), "dashdot": (0, (6, 2, 1.5, 2))}
    looks = views.variant_looks(results)
    return {label: {"color": look.color, "linestyle": lines[look.dash]} for label, look in looks.items()}


def _draw_curve(axes: Axes, outcome: Outcome, metric: str, results: Results, look: dict[str, Any]) -> None:
    steps, values = zip(*outcome.curves[metric], strict=True)
    crowded = len(results.outcomes) > 60
    style: dict[str, Any] = {
        "color": views.FINISHED,
        "linewidth": 1.1,
        "alpha": 0.25 if crowded else 0.6,
        "zorder": 2.0,
    }
    if outcome.status != "FINISHED":
        style = {"color": views.STOPPED, "linewidth": 0.9, "alpha": 0.25 if crowded else 0.55, "zorder": 1.5}
    if look:
        style |= look | {"linewidth": 1.3, "alpha": 0.8 if outcome.status == "FINISHED" else 0.35}
    elif outcome.trial == results.best:
        style = {"color": views.BEST, "linewidth": 2.2, "alpha": 1.0, "zorder": 4.0}
    axes.plot(steps, values, **style)
    if outcome.status == "FAILED":
        axes.plot(steps[-1], values[-1], marker="x", color=views.LOST, markersize=6, zorder=3)
    elif outcome.status != "FINISHED" or len(steps) == 1:
        axes.plot(steps[-1], values[-1], marker="o", markersize=3.2, **style)


def _curve_legend(figure: Figure, results: Results) -> None:
    from matplotlib.lines import Line2D

    drawn = [o for o in results.outcomes if any(o.curves.values())]
    looks = _variant_looks(results)
    handles = [Line2D([], [], label=clip(label, 40), linewidth=1.6, **look) for label, look in looks.items()]
    best = next((o for o in drawn if o.trial == results.best), None)
    if not looks:
        if best is not None:
            name = clip(best.label or best.trial, 32)
            handles.append(Line2D([], [], color=views.BEST, linewidth=2.2, label=f"best: {name}"))
        if any(o.status == "FINISHED" and o is not best for o in drawn):
            handles.append(Line2D([], [], color=views.FINISHED, label="ran to the end"))
        if any(o.status not in ("FINISHED", "FAILED") and o is not best for o in drawn):
            handles.append(Line2D([], [], color=views.STOPPED, marker="o", markersize=3.2, label="not to the end"))
    if any(o.status == "FAILED" for o in drawn):
        handles.append(Line2D([], [], color=views.LOST, marker="x", linestyle="", label="failed"))
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = min(max(int(figure.get_figwidth() * 12 / (longest + 6)), 1), 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)


def importance_bars(results: Results, path: Path) -> Path:
    """Permutation importance of each parameter with its uncertainty; one panel a metric."""
    found = results.telling
    rows = max(len(explanation.importances) for explanation in found.values())

    def draw(figure: Figure) -> None:
        names = short_keys(results.keys)
        for axes, (metric, explanation) in zip(_panels(figure, len(found), 1), found.items(), strict=True):
            ranked = explanation.importances
            means = [one.mean for one in ranked]
            errors = [one.std for one in ranked]
            axes.barh(
                range(len(ranked)), means, xerr=errors, color=views.FINISHED, height=0.62, ecolor="#333333", capsize=3
            )
            axes.axvline(0, color="#444444", linewidth=0.8)
            axes.set_yticks(range(len(ranked)), [wrap(names[one.key], 22) for one in ranked])
            axes.set_ylim(len(ranked) - 0.4, -0.6)
            axes.set_xlabel(f"importance for {metric}\n(loss of held-out R² when shuffled)")
            tidy(axes, y=False)
            note(axes, f"forest on {explanation.num_rows} points, held-out R² {explanation.score:.2f}; bars: ± 1 sd")

    return save(draw, path, COLUMN, len(found) * (1.4 + 0.36 * max(rows, 2)))


def pareto(results: Results, path: Path) -> Path:
    """Two metrics against each other, the trials that none beats joined by a line; one panel a pair."""
    pairs = _metric_pairs(results)

    def draw(figure: Figure) -> None:
        for axes, (first, second) in zip(_panels(figure, len(pairs), 1), pairs, strict=True):
            _draw_pareto(axes, results, first, second)

    return save(draw, path, COLUMN, 3.9 * len(pairs))


def _metric_pairs(results: Results) -> list[tuple[str, str]]:
    names = results.metrics
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]][:3]


def _draw_pareto(axes: Axes, results: Results, first: str, second: str) -> None:
    modes = dict(zip(results.metrics, results.modes, strict=True))
    front = pareto_front(results)
    placed = [o for o in results.outcomes if first in o.values and second in o.values]
    others = [o for o in placed if o not in front]
    for finished in (False, True):
        group = [o for o in others if (o.status == "FINISHED") is finished]
        label, face = ("ran to the end", views.FINISHED) if finished else ("not to the end", "white")
        points = [[o.values[name] for o in group] for name in (first, second)]
        edge = views.FINISHED if finished else views.STOPPED
        if group:
            axes.plot(*points, linestyle="", marker="o", markersize=5, color=edge, markerfacecolor=face, label=label)
    points = [[o.values[name] for o in front] for name in (first, second)]
    joined = "steps-post" if modes[first] == "min" else "steps-pre"
    line = "-" if len(results.metrics) == 2 else ""
    axes.plot(*points, linestyle=line, drawstyle=joined, marker="o", markersize=7, color=views.BEST, label="front")
    for set_limits, name in ((axes.set_xlim, first), (axes.set_ylim, second)):
        seen = views.window([o.values[name] for o in placed], modes[name])
        ends = [*seen, *(o.values[name] for o in front)]
        set_limits(*_padded(min(ends), max(ends), 0.08))
    _name_points(axes, front, first, second)
    axes.set_xlabel(views.metric_axis_title(first, modes[first]))
    axes.set_ylabel(wrap(views.metric_axis_title(second, modes[second]), 34))
    axes.legend(loc="best")
    missing = len(results.outcomes) - len(placed)
    note(axes, views.count_line(results.outcomes) + (f"; {missing} without both values" if missing else ""))


def _name_points(axes: Axes, front: Sequence[Outcome], first: str, second: str) -> None:
    """Names beside the points of the front that have room for one."""
    style: dict[str, Any] = {"fontsize": 8, "bbox": {"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0}}
    taken: list[tuple[float, float]] = []
    for outcome in front:
        point = (outcome.values[first], outcome.values[second])
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(point))
        if all(abs(x - other_x) > 0.13 or abs(y - other_y) > 0.06 for other_x, other_y in taken):
            taken.append((x, y))
            axes.annotate(clip(outcome.trial, 16), point, xytext=(6, 5), textcoords="offset points", **style)


def _panels(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def _has_curves(results: Results) -> bool:
    return any(views.has_curves(results, metric) for metric in results.metrics)


def _has_space(results: Results) -> bool:
    return not results.space.variants and bool(results.keys)


def _has_pairs(results: Results) -> bool:
    return len(results.metrics) > 1 and bool(pareto_front(results))


_Draw = Callable[[Results, Path], Path]
_FIGURES: dict[str, tuple[_Draw, Callable[[Results], bool]]] = {
    "intervals": (intervals, lambda r: any(g.values for groups in r.groups.values() for g in groups)),
    "pareto": (pareto, _has_pairs),
    "slices": (slices, _has_space),
    "learning_curves": (learning_curves, _has_curves),
    "parallel_coordinates": (parallel_coordinates, _has_space),
    "importance": (importance_bars, lambda r: bool(r.telling)),
    "leaderboard": (leaderboard_table, lambda r: bool(r.outcomes)),
}
