"""The figures of a sweep as data for plotly.js: what the PNGs show, with names and values under the mouse.

Plain dicts, no WebGL: plotly's own parallel coordinates stay empty on machines without a graphics driver, so they are
lines here, as everything else is. A trace of one trial carries its id in ``meta``, for the page to highlight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from glowflow.experiments import views
from glowflow.experiments.labels import clip, metric_label, relative, short_keys, short_params, short_value, wrap
from glowflow.experiments.results import Group, Outcome, Results, pareto_front
from glowflow.experiments.tables import p_text

__all__ = ["Panel", "panels_of"]

_MOST_POINTS = 200
_MOST_SLICES = 12
_MOST_AXES = 12


@dataclass(frozen=True)
class Panel:
    """One plotly figure.

    Args:
        note: what is counted or not shown, for the line under the title.
        data: the traces; none for a heading over the panels that follow.
        wide: whether it takes the whole width of the page.
    """

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = True


def panels_of(results: Results) -> list[Panel]:
    """Every figure that the sweep gives material for, in the order of the report."""
    panels: list[Panel] = []
    for make in _MAKERS:
        panels += make(results)
    return panels


def _intervals(results: Results) -> list[Panel]:
    panels = []
    for metric, groups in results.groups.items():
        shown = [group for group in groups if group.interval is not None]
        if not shown:
            continue
        names = [escape(wrap(_group_name(results, group), 34)).replace("\n", "<br>") for group in shown]
        rows = list(range(len(shown)))
        spans = [_half_width(group) for group in shown]
        means = {
            "type": "scatter",
            "mode": "markers",
            "name": "mean, 95 % interval",
            "x": [group.interval.estimate if group.interval else None for group in shown],
            "y": rows,
            "error_x": {"type": "data", "array": spans, "thickness": 2, "color": "#444444"},
            "marker": {"symbol": "diamond", "size": 10, "color": [_group_color(group) for group in shown]},
            "text": [_group_text(group) for group in shown],
            "hovertemplate": "%{text}<extra></extra>",
        }
        pairs = [(value, row + 0.2) for row, group in zip(rows, shown, strict=True) for value in group.values]
        seeds = _marks("seeds", [x for x, _ in pairs], [y for _, y in pairs], "#8A94A0", 7, None)
        layout = _layout(metric_label(metric), "", 130 + 46 * len(shown))
        layout["yaxis"] |= {"tickvals": rows, "ticktext": names, "range": [len(shown) - 0.4, -0.6], "showgrid": False}
        panels.append(Panel(f"{metric}: means over seeds", "Bars: 95 % intervals (Student t).", [seeds, means], layout))
    return panels


def _group_name(results: Results, group: Group) -> str:
    return group.name if results.space.variants else f"{group.name}: {short_params(group.params)}"


def _half_width(group: Group) -> float:
    """Of its interval; none where one seed has no bounds."""
    interval = group.interval
    return interval.high - interval.estimate if interval is not None and math.isfinite(interval.high) else 0.0


def _group_color(group: Group) -> str:
    return views.BEST if group.verdict == "best" else views.FINISHED


def _group_text(group: Group) -> str:
    interval = group.interval
    lines = [f"<b>{escape(group.name)}</b>", f"n = {len(group.values)}"]
    if interval is not None:
        lines.append(f"mean {interval.estimate:.5g}, 95 % from {interval.low:.5g} to {interval.high:.5g}")
    lines.append(group.verdict + ("" if group.p_value is None else f", p {p_text(group.p_value)} (Holm)"))
    return "<br>".join(lines)


def _pareto(results: Results) -> list[Panel]:
    front = pareto_front(results) if len(results.metrics) > 1 else []
    names = list(results.metrics)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] if front else []
    return [_pareto_panel(results, front, first, second) for first, second in pairs]


def _pareto_panel(results: Results, front: Sequence[Outcome], first: str, second: str) -> Panel:
    modes = dict(zip(results.metrics, results.modes, strict=True))
    placed = [o for o in results.outcomes if first in o.values and second in o.values]
    others = [o for o in placed if o not in front]
    data = []
    for group, name, color, size in ((others, "other trials", views.FINISHED, 7), (front, "front", views.BEST, 10)):
        xs, ys = ([o.values[metric] for o in group] for metric in (first, second))
        data.append(_marks(name, xs, ys, color, size, [_trial_text(results, o) for o in group]))
    if len(results.metrics) == 2:
        data[-1] |= {"mode": "lines+markers", "line": {"shape": "hv" if modes[first] == "min" else "vh", "width": 1.5}}
    layout = _layout(views.metric_axis_title(first, modes[first]), views.metric_axis_title(second, modes[second]), 440)
    for axis, metric in (("xaxis", first), ("yaxis", second)):
        low, high = views.window([o.values[metric] for o in placed], modes[metric])
        ends = [low, high, *(o.values[metric] for o in front)]
        layout[axis]["range"] = _range(min(ends), max(ends))
    missing = len(results.outcomes) - len(placed)
    note = f"{missing} without both values." if missing else ""
    return Panel(f"Pareto front: {first} and {second}", note, data, layout)


def _slices(results: Results) -> list[Panel]:
    if results.space.variants or not results.keys:
        return []
    keys = views.shown_keys(results, _MOST_SLICES)
    note = "Star: best; full: ran to the end; open: did not; cross: no value; beyond the scale: on its edge"
    note += f"{views.left_out(results, keys)}."
    heading = Panel(f"{results.metric} against each parameter", note, [], {})
    return [heading, *(_slice(results, views.axis_of(results, key)) for key in keys)]


def _slice(results: Results, axis: views.Axis) -> Panel:
    metric = results.metric
    placed = [o for o in results.outcomes if metric in o.values]
    low, high = _range(*views.window([o.values[metric] for o in placed], results.mode))
    others = [o for o in placed if o.trial != results.best]
    kinds = {
        "not to the end": ([o for o in others if o.status != "FINISHED"], views.STOPPED, 8),
        "ran to the end": ([o for o in others if o.status == "FINISHED"], views.FINISHED, 8),
        "best": ([o for o in placed if o.trial == results.best], views.BEST, 15),
        "no value": ([o for o in results.outcomes if metric not in o.values], views.LOST, 9),
    }
    data = []
    for name, (group, color, size) in kinds.items():
        if not group:
            continue
        edge = high if results.mode == "min" else low
        ys = [min(max(o.values.get(metric, edge), low), high) for o in group]
        texts = [_trial_text(results, o) for o in group]
        xs = [axis.position(o.params) + views.spread(axis, o) for o in group]
        marks = _marks(name, xs, ys, color, size, texts) | {"showlegend": False}
        symbols = {"best": "star", "no value": "x-thin", "not to the end": "circle-open"}
        marks["marker"] |= {"symbol": symbols.get(name, "circle"), "line": {"color": color, "width": 1.5}}
        data.append(marks)
    layout = _layout(axis.title + (" (log scale)" if axis.kind == "log" else ""), metric_label(metric), 330)
    ticks = axis.ticks()
    layout["xaxis"] |= {"tickvals": [p for p, _ in ticks], "ticktext": [escape(t) for _, t in ticks]}
    layout["xaxis"]["range"] = [-0.22 if axis.absent else -0.06, 1.06]
    layout["yaxis"]["range"] = [low, high]
    layout["margin"]["t"] = 10
    return Panel(axis.key, "", data, layout, wide=False)


def _curves(results: Results) -> list[Panel]:
    panels = []
    for metric, mode in zip(results.metrics, results.modes, strict=True):
        if not views.has_curves(results, metric):
            continue
        drawn = [o for o in results.outcomes if o.curves[metric]]
        looks = views.variant_looks(results)
        data = [_curve(results, o, metric, looks) for o in reversed(drawn)]
        for trace, outcome in zip(data, reversed(drawn), strict=True):
            trace["showlegend"] = bool(looks) and outcome is next(o for o in drawn if o.label == outcome.label)
        layout = _layout("training step", metric_label(metric), 460)
        layout["yaxis"]["range"] = _range(*views.curve_window([o.curves[metric] for o in drawn], mode))
        silent = len(results.outcomes) - len(drawn)
        layout["xaxis"]["rangemode"] = "tozero"
        layout["legend"]["traceorder"] = "reversed"
        note = "" if looks or all(o.status == "FINISHED" for o in drawn) else "Grey: did not run to the end. "
        note += f"{silent} never reported." if silent else ""
        panels.append(Panel(f"{metric} over the steps", note.strip(), data, layout))
    return panels


def _curve(results: Results, outcome: Outcome, metric: str, looks: dict[str, views.Look]) -> dict[str, Any]:
    points = views.thinned(outcome.curves[metric], _MOST_POINTS)
    best, ended = outcome.trial == results.best, outcome.status == "FINISHED"
    look = looks.get(outcome.label or "")
    color = look.color if look else views.BEST if best else views.FINISHED if ended else views.STOPPED
    line = {"color": color, "width": 3 if best and not look else 1.5, "dash": look.dash if look else "solid"}
    name = clip(outcome.label or outcome.trial, 40) if look else outcome.trial
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": escape(name),
        "legendgroup": escape(name),
        "meta": outcome.trial,
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "line": line,
        "opacity": 1.0 if best else 0.75 if ended else 0.5,
        "hovertemplate": f"step %{{x}}: %{{y:.5g}}<br>{_trial_text(results, outcome)}<extra></extra>",
    }


def _parallel(results: Results) -> list[Panel]:
    if results.space.variants or not results.keys:
        return []
    keys = views.shown_keys(results, _MOST_AXES)
    axes = [views.axis_of(results, key) for key in keys]
    scale = views.MetricScale.of(results)
    data = []
    for outcome in reversed(results.outcomes):
        lost, best = results.metric not in outcome.values, outcome.trial == results.best
        color = views.BEST if best else views.LOST if lost else views.shade(scale.badness(outcome))
        line = {"color": color, "width": 3.5 if best else 1.5, "dash": "dot" if lost else "solid"}
        text = f"{_trial_text(results, outcome)}<extra></extra>"
        heights = [axis.position(outcome.params) for axis in axes] + [scale.position(outcome)]
        trace = {"type": "scatter", "mode": "lines", "meta": outcome.trial, "hovertemplate": text, "showlegend": False}
        trace |= {"x": list(range(len(heights))), "y": heights, "line": line, "opacity": 1.0 if best else 0.65}
        data.append(trace)
    layout = _layout("", "", 460)
    titles = [axis.title + (" (log)" if axis.kind == "log" else "") for axis in axes] + [metric_label(results.metric)]
    wrapped = [escape(wrap(title, 16, lines=3)).replace("\n", "<br>") for title in titles]
    layout["xaxis"] |= {"tickvals": list(range(len(titles))), "ticktext": wrapped, "side": "top", "showgrid": False}
    layout["xaxis"] |= {"range": [-0.15, len(keys) + 0.45], "zeroline": False}
    layout["yaxis"] |= {"visible": False, "range": [-0.2, 1.06]}
    layout["margin"] |= {"t": 70, "b": 15, "l": 20}
    lines = [axis.ticks() for axis in axes] + [scale.ticks()]
    layout["shapes"] = [
        {"type": "line", "x0": x, "x1": x, "y0": min(0, ticks[0][0]) if ticks else 0, "y1": 1, "line": {"width": 1}}
        for x, ticks in enumerate(lines)
    ]
    layout["annotations"] = [_tick(x, height, text) for x, ticks in enumerate(lines) for height, text in ticks]
    note = f"One line a trial, darker is better; dotted: no value{views.left_out(results, keys)}."
    return [Panel("Parallel coordinates", note, data, layout)]


def _tick(x: float, height: float, text: str) -> dict[str, Any]:
    look: dict[str, Any] = {"font": {"size": 11}, "bgcolor": "rgba(255,255,255,0.75)", "showarrow": False}
    return {"x": x, "y": height, "text": escape(text), "xanchor": "left", "xshift": 3, **look}


def _importance(results: Results) -> list[Panel]:
    panels = []
    names = short_keys(results.keys)
    for metric, explanation in results.telling.items():
        ranked = explanation.importances
        bars = {
            "type": "bar",
            "orientation": "h",
            "x": [one.mean for one in ranked],
            "y": [escape(names[one.key]) for one in ranked],
            "error_x": {"type": "data", "array": [one.std for one in ranked], "thickness": 1.5},
            "marker": {"color": views.FINISHED},
            "hovertemplate": "%{y}: %{x:.3f} ± %{error_x.array:.3f}<extra></extra>",
            "showlegend": False,
        }
        layout = _layout("loss of held-out R² when shuffled", "", 140 + 34 * len(ranked))
        layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "type": "category"}
        score = f"{explanation.score:.2f}" if explanation.score is not None else "-"
        note = f"Forest on {explanation.num_rows} points, held-out R² {score}; bars: ± 1 standard deviation."
        note += " Stopped trials count with their last value."
        panels.append(Panel(f"Importance for {metric}", note, [bars], layout))
    return panels


_MAKERS: tuple[Callable[[Results], list[Panel]], ...] = (_intervals, _pareto, _slices, _curves, _parallel, _importance)


def _marks(
    name: str, xs: Sequence[float], ys: Sequence[float], color: str, size: int, texts: Sequence[str] | None
) -> dict[str, Any]:
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": name, "x": list(xs), "y": list(ys)}
    trace |= {"marker": {"color": color, "size": size}, "cliponaxis": False}
    if texts is None:
        return trace | {"hovertemplate": "%{x:.5g}<extra></extra>"}
    return trace | {"text": list(texts), "hovertemplate": "%{text}<extra></extra>"}


def _trial_text(results: Results, outcome: Outcome) -> str:
    """What the mouse shows of a trial."""
    lines = [f"<b>{escape(outcome.trial)}</b> ({outcome.status.lower()} at step {outcome.step})"]
    lines += [f"{escape(metric)} {value:.5g}" for metric, value in outcome.values.items()]
    names = short_keys(results.keys)
    lines += [f"{escape(names[key])} = {escape(short_value(value, 60))}" for key, value in outcome.params.items()]
    lines += [escape(clip(relative(outcome.why, results.storage), 80))] if outcome.why else []
    # A percent sign opens a placeholder of a hover template only before a brace.
    return "<br>".join(lines).replace("%{", "%&#123;")


def _range(low: float, high: float) -> list[float]:
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - pad, high + pad]


def _layout(x_title: str, y_title: str, height: int) -> dict[str, Any]:
    axis = {"automargin": True, "gridcolor": "#E4E7EB", "zeroline": False, "linecolor": "#444444", "ticks": "outside"}
    return {
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 34, "b": 50},  # the buttons stand above the panel
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white"},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "xaxis": axis | {"title": {"text": escape(x_title)}},
        "yaxis": axis | {"title": {"text": escape(y_title)}},
    }
