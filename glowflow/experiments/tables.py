"""The tables of a report as cells: one source for Markdown, the page, the picture and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glowflow.experiments.labels import (
    decimals,
    fixed,
    metric_label,
    plain,
    relative,
    short_keys,
    short_params,
    short_value,
)
from glowflow.experiments.results import Group, Results
from glowflow.experiments.views import STATUS_WORDS

__all__ = ["Cells", "group_cells", "leaderboard_csv", "main_tables", "p_text", "ranking_cells", "reason"]

_MOST_COLUMNS = 5


@dataclass(frozen=True)
class Cells:
    """A table of texts.

    Args:
        right: of each column, whether it holds numbers.
        keys: of each cell, what it is sorted by.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[bool]
    keys: Sequence[Sequence[float | str]]


def main_tables(results: Results) -> dict[str, Cells]:
    """Title -> table: the settings over seeds, one table a metric, or the ranking of a search."""
    if not results.by_seeds:
        return {"ranking": ranking_cells(results)}
    return {metric: group_cells(results, metric) for metric in results.metrics}


def ranking_cells(results: Results) -> Cells:
    """The trials of a search, best first."""
    places = {m: decimals(o.values.get(m) for o in results.outcomes) for m in results.metrics}
    names, extract = _parameter_columns(results)
    headers = ["rank", *names, *map(metric_label, results.metrics), "step", "status", "trial"]
    rows: list[list[str]] = []
    keys: list[list[float | str]] = []
    for o in results.outcomes:
        params, values = extract(o.params), [o.values.get(metric) for metric in results.metrics]
        shown = [fixed(value, places[m]) for m, value in zip(results.metrics, values, strict=True)]
        status = STATUS_WORDS.get(o.status, o.status.lower())
        rows.append([_rank(o.rank), *(text for text, _ in params), *shown, str(o.step), status, o.trial])
        numbers = [math.inf if value is None else value for value in values]
        keys.append([o.rank or math.inf, *(key for _, key in params), *numbers, o.step, status, o.trial])
    numeric = [all(not isinstance(row[i + 1], str) for row in keys) for i in range(len(names))]
    return Cells(headers, rows, [True, *numeric, *(True for _ in places), True, False, False], keys)


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def _parameter_columns(results: Results) -> tuple[list[str], Any]:
    """Names of the parameter columns, and what gives the (text, sort key) of each for some params."""
    keys = results.keys
    if len(keys) > _MOST_COLUMNS:
        return ["parameters"], lambda params: [(short_params(params), short_params(params))]
    names = short_keys(keys)

    def extract(params: Mapping[str, Any]) -> list[tuple[str, float | str]]:
        return [(short_value(params[key]), _sort_key(params[key])) if key in params else ("", math.inf) for key in keys]

    return [names[key] for key in keys], extract


def _sort_key(value: Any) -> float | str:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else short_value(value)


def group_cells(results: Results, metric: str) -> Cells:
    """Settings over seeds, best mean first: interval, difference to the best, adjusted p and verdict."""
    groups = results.groups[metric]
    places = decimals(group.interval.estimate for group in groups if group.interval)
    names, extract = ([], lambda params: []) if results.space.variants else _parameter_columns(results)
    headers = ["variant" if results.space.variants else "point", *names, "n", f"mean {metric_label(metric)}"]
    headers += ["95 % interval", "difference to best", "95 % interval of it", "p (Holm)", "verdict"]
    rows: list[list[str]] = []
    keys: list[list[float | str]] = []
    for group in groups:
        params, interval, difference = extract(group.params), group.interval, group.difference
        lost = f" ({group.missing} lost)" if group.missing else ""
        rows.append([group.name, *(text for text, _ in params), f"{len(group.values)}{lost}"])
        rows[-1] += [fixed(interval.estimate, places) if interval else "-"]
        rows[-1] += [_bounds(interval.low, interval.high, places) if interval else "-"]
        rows[-1] += [fixed(difference.difference, places, sign=True) if difference else "-"]
        rows[-1] += [_bounds(difference.low, difference.high, places, sign=True) if difference else "-"]
        rows[-1] += [p_text(group.p_value), group.verdict]
        keys.append([group.name, *(key for _, key in params), len(group.values), *_group_keys(group)])
    numeric = [all(not isinstance(row[i + 1], str) for row in keys) for i in range(len(names))]
    return Cells(headers, rows, [False, *numeric, True, True, True, True, True, True, False], keys)


def _group_keys(group: Group) -> list[float | str]:
    interval, difference = group.interval, group.difference
    return [
        interval.estimate if interval else math.inf,
        interval.low if interval else math.inf,
        difference.difference if difference else 0.0,
        difference.low if difference else 0.0,
        2.0 if group.p_value is None or math.isnan(group.p_value) else group.p_value,
        group.verdict,
    ]


def _bounds(low: float, high: float, places: int, *, sign: bool = False) -> str:
    if not math.isfinite(low):
        return "-"
    return f"{fixed(low, places, sign=sign)} to {fixed(high, places, sign=sign)}"


def p_text(p_value: float | None) -> str:
    """A p value as papers print it."""
    if p_value is None or math.isnan(p_value):
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def reason(why: str | None, error: str | None, storage: str | None) -> str:
    """Why a trial ended, in one line without this machine's folders."""
    texts = [text for text in (why, error) if text]
    if len(texts) == 2 and texts[1] in texts[0]:
        texts.pop()
    return relative(plain(": ".join(texts)), storage)


def leaderboard_csv(results: Results) -> str:
    """Every trial with full values: rank, trial, label, point, seed, status, step, metrics, parameters, why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["rank", "trial", "label", "point", "seed", "status", "step", *results.metrics]
    writer.writerow([*names, "seconds", *results.keys, "why"])
    for o in results.outcomes:
        row: list[Any] = ["" if o.rank is None else o.rank, o.trial, o.label or "", o.point, o.seed, o.status, o.step]
        row += [o.values.get(metric, "") for metric in results.metrics]
        row += ["" if o.seconds is None else round(o.seconds, 3)]
        row += [_csv_value(o.params[key]) if key in o.params else "" for key in results.keys]
        writer.writerow([*row, reason(o.why, o.error, results.storage)])
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, (bool, list, dict)) or value is None:
        return json.dumps(value)
    return relative(value) if isinstance(value, str) else value
