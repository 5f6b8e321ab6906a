"""Where things lie in a figure, for the PNG and for the interactive page alike: axes, ticks, windows and colours.

An axis maps the values of a parameter to 0..1: numbers linearly or by their logarithm, anything else in equal steps;
a parameter that a point does not have (a conditional one) lies below all values. A window leaves diverged trials out of
the scale; the figures mark them at the edge and count them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glowflow.experiments.labels import clip, metric_label, short_keys, short_value
from glowflow.experiments.results import Curve, Outcome, Results

__all__ = [
    "BEST",
    "FINISHED",
    "LOST",
    "STATUS_WORDS",
    "STOPPED",
    "VARIANTS",
    "Axis",
    "Look",
    "MetricScale",
    "axis_of",
    "count_line",
    "curve_window",
    "left_out",
    "metric_axis_title",
    "order_of_values",
    "shade",
    "shown_keys",
    "spread",
    "thinned",
    "variant_looks",
    "window",
]

# Okabe & Ito's palette, told apart by the colour-blind too; the yellow is left out, it vanishes on white paper.
BEST, FINISHED, STOPPED, LOST = "#D55E00", "#0072B2", "#8A94A0", "#000000"
VARIANTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Viridis without its yellow end: the best is darkest.
_SHADES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (190, 223, 60))
_ABSENT = -0.14
STATUS_WORDS = {
    "FINISHED": "finished",
    "STOPPED": "stopped early",
    "FAILED": "failed",
    "KILLED": "killed",
    "RUNNING": "running",
    "CLAIMED": "waiting",
}
_PROPORTION = 15.0


@dataclass(frozen=True)
class Axis:
    """The scale of one parameter.

    Args:
        kind: ``linear``, ``log`` or ``category``.
        low: the least number, and ``high`` the greatest; of categories their first and last position.
        categories: the values of a category axis, as ``order_of_values`` names them.
        absent: whether some point does not have the parameter.
        choices: the numbers, where they are few that come again and again.
    """

    key: str
    title: str
    kind: str
    low: float
    high: float
    categories: tuple[tuple[str, str], ...] = ()
    absent: bool = False
    choices: tuple[float, ...] = ()

    def number(self, value: Any) -> float:
        """The value on the axis as drawn: itself, or the position of its category."""
        if self.kind == "category":
            return float([name for name, _ in self.categories].index(_identity(value)))
        return float(value)

    def position(self, params: Mapping[str, Any]) -> float:
        """0 to 1, or below 0 where the point does not have the parameter."""
        return self._scaled(self.number(params[self.key])) if self.key in params else _ABSENT

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """(position, text), ascending."""
        absent = [(_ABSENT, "not set")] if self.absent else []
        if self.kind == "category":
            return absent + [(self._scaled(i), text) for i, (_, text) in enumerate(self.categories)]
        if self.choices:
            return absent + _apart([(self._scaled(number), f"{number:.4g}") for number in self.choices])
        numbers = _log_ticks(self.low, self.high, count) if self.kind == "log" else None
        numbers = numbers or _linear_ticks(self.low, self.high, count)
        return absent + [(self._scaled(number), f"{number:.4g}") for number in numbers]

    def _scaled(self, number: float) -> float:
        low, high = self.low, self.high
        if high == low:
            return 0.5
        if self.kind == "log":
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)


@dataclass(frozen=True)
class MetricScale:
    """The last axis of parallel coordinates: the metric in its window, and a place for trials without a value."""

    metric: str
    mode: str
    low: float
    high: float
    lost: bool

    @classmethod
    def of(cls, results: Results) -> MetricScale:
        """The scale of a sweep's first metric."""
        values = [o.values[results.metric] for o in results.outcomes if results.metric in o.values]
        lost = len(values) < len(results.outcomes)
        return cls(results.metric, results.mode, *window(values, results.mode), lost)

    def position(self, outcome: Outcome) -> float:
        """0 to 1; slightly outside what the window leaves out; below 0 without a value."""
        if self.metric not in outcome.values:
            return _ABSENT
        if self.high == self.low:
            return 0.5
        return min(max((outcome.values[self.metric] - self.low) / (self.high - self.low), -0.03), 1.03)

    def badness(self, outcome: Outcome) -> float:
        """0 for the best to 1 for the worst."""
        position = min(max(self.position(outcome), 0.0), 1.0)
        return position if self.mode == "min" else 1 - position

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """(position, text), ascending."""
        lost = [(_ABSENT, "no value")] if self.lost else []
        numbers = _linear_ticks(self.low, self.high, count)
        width = self.high - self.low
        return lost + [((n - self.low) / width if width else 0.5, f"{n:.4g}") for n in numbers]


def axis_of(results: Results, key: str) -> Axis:
    """The axis of a parameter, over the values that the trials have."""
    present = [outcome.params[key] for outcome in results.outcomes if key in outcome.params]
    absent = len(present) < len(results.outcomes)
    title = short_keys(results.keys)[key]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)
    if not numeric:
        found = order_of_values(present)
        return Axis(key, title, "category", 0, len(found) - 1, tuple(found), absent)
    low, high = min(present), max(present)
    log = key in results.space.keys() and results.space.log_scaled(key)
    log = low > 0 and (log or _spaced_by_ratio(present))
    different = sorted({float(value) for value in present})
    choices = tuple(different) if len(different) <= 6 and len(different) < max(len(present), 2) else ()
    return Axis(key, title, "log" if log else "linear", float(low), float(high), (), absent, choices)


def _spaced_by_ratio(values: Sequence[float]) -> bool:
    """Whether most numbers are crowded at the low end of a linear axis, as those of a grid 1e-4, 1e-3, 1e-2 are."""
    different = sorted(set(values))
    return different[-1] >= 10 * different[0] and different[len(different) // 2] <= 0.25 * different[-1]


def order_of_values(values: Iterable[Any]) -> list[tuple[str, str]]:
    """(identity, short text) of different values; the texts differ too, however short."""
    kept = {_identity(value): value for value in values}
    names = sorted(kept, key=lambda name: (not isinstance(kept[name], (int, float)), _sortable(kept[name]), name))
    texts = [short_value(kept[name]) for name in names]
    unique = [text if texts.count(text) == 1 else f"{clip(text, 18)} #{i}" for i, text in enumerate(texts, start=1)]
    return list(zip(names, unique, strict=True))


def _sortable(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _identity(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that leave room for each other."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or tick[0] - kept[-1][0] >= 0.08:
            kept.append(tick)
    return kept


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Decades, with numbers between them where there are few; none where the range is too narrow for that."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        inside = [number for number in found if low * 0.999 <= number <= high * 1.001]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / (count + 1))]
    return []


def metric_axis_title(metric: str, mode: str) -> str:
    """``val_loss (nats per target), lower is better``."""
    return f"{metric_label(metric)}, {'lower' if mode == 'min' else 'higher'} is better"


def shown_keys(results: Results, limit: int) -> list[str]:
    """The parameters worth an axis: those that vary, the important ones first where there are too many."""
    keys = [key for key in results.keys if len({_identity(o.params.get(key, ...)) for o in results.outcomes}) > 1]
    keys = keys or results.keys[:1]
    if len(keys) <= limit:
        return keys
    order = [one.key for one in results.importances[results.metric].importances] if results.importances else []
    chosen = sorted(keys, key=lambda key: order.index(key) if key in order else len(order))[:limit]
    return [key for key in keys if key in chosen]


def left_out(results: Results, keys: Sequence[str]) -> str:
    """``; 2 parameters not shown``, or nothing."""
    count = len(shown_keys(results, len(results.keys))) - len(keys)
    return f"; {count} parameter{'' if count == 1 else 's'} not shown" if count else ""


def window(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The range that a scale shows: from the best value to the worst that is not far out of all proportion.

    Out of proportion is what lies more than 15 times as far from the best as the median does, and more than twice the
    best: where seeds agree to the third digit, a variant that is a quarter worse still belongs into the picture.
    """
    if not values:
        return 0.0, 1.0
    best = min(values) if mode == "min" else max(values)
    distances = sorted(abs(value - best) for value in values)
    middle = distances[len(distances) // 2]
    reach = max(_PROPORTION * middle, abs(best))
    kept = [value for value in values if abs(value - best) <= reach] if len(values) >= 4 and middle > 0 else values
    return min(kept), max(kept)


def has_curves(results: Results, metric: str) -> bool:
    """Whether there is a curve to draw: a metric that each trial measured once, at its end, has none."""
    return any(len(outcome.curves[metric]) > 1 for outcome in results.outcomes)


def curve_window(curves: Sequence[Curve], mode: str) -> tuple[float, float]:
    """The range that shows where curves begin and end, whatever a diverging one does in between."""
    best = min if mode == "min" else max
    ends = [value for curve in curves for value in (curve[-1][1], best(v for _, v in curve))]
    windows = [window(ends, mode), window([curve[0][1] for curve in curves], mode)]
    return min(low for low, _ in windows), max(high for _, high in windows)


def thinned(curve: Curve, limit: int) -> Curve:
    """At most about ``limit`` points of a curve, the last one among them."""
    stride = max(1, math.ceil(len(curve) / limit))
    return curve if stride == 1 else [*curve[:-1:stride], curve[-1]]


@dataclass(frozen=True)
class Look:
    """Of the curves of one variant; the dashes tell apart what lies on top of each other, in black and white too."""

    color: str
    dash: str


def variant_looks(results: Results) -> dict[str, Look]:
    """Label -> look; empty where there are no variants, or more than colours that can be told apart."""
    labels = list(dict.fromkeys(outcome.label for outcome in results.outcomes if outcome.label))
    if len(labels) > len(VARIANTS):
        return {}
    dashes = ("solid", "dash", "dot", "dashdot")
    return {label: Look(VARIANTS[i], dashes[i % len(dashes)]) for i, label in enumerate(labels)}


def spread(axis: Axis, outcome: Outcome) -> float:
    """A small shift to the side, the same each time, so that equal values do not hide each other."""
    discrete = axis.kind == "category" or bool(axis.choices)
    return 0.03 * (outcome.point * 0.618034 % 1 - 0.5) if discrete else 0.0


def shade(fraction: float) -> str:
    """The colour of a place between the best (0) and the worst (1)."""
    place = min(max(fraction, 0.0), 1.0) * (len(_SHADES) - 1)
    index = min(int(place), len(_SHADES) - 2)
    mixed = [round(a + (b - a) * (place - index)) for a, b in zip(_SHADES[index], _SHADES[index + 1], strict=True)]
    return "#{:02X}{:02X}{:02X}".format(*mixed)


def count_line(outcomes: Sequence[Outcome]) -> str:
    """``8 trials: 3 finished, 5 stopped early``."""
    statuses = [outcome.status for outcome in outcomes]
    parts = [f"{statuses.count(status)} {word}" for status, word in STATUS_WORDS.items() if status in statuses]
    trials = f"{len(outcomes)} trial" + ("" if len(outcomes) == 1 else "s")
    return f"{trials}: {', '.join(parts)}" if parts else trials
