"""A comparison as text, Markdown, CSV and HTML: the same columns everywhere, all rows, groups below.

Text puts a handful of runs side by side, one column each. The HTML is one file that needs no network; a click on a
column's head sorts by it.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glowflow.tracking.tables import cell, table

__all__ = ["FORMATS", "to_csv", "to_html", "to_markdown", "to_text"]

_SIDE_BY_SIDE = 4

Document = Mapping[str, Any]
Table = tuple[list[str], list[list[Any]]]


def to_text(comparison: Document) -> str:
    """A column for each of up to four runs, else a row for each run; then the groups."""
    few = len(comparison["rows"]) <= _SIDE_BY_SIDE
    parts = [table(*(_side_by_side(comparison) if few else _rows(comparison)))]
    if comparison["groups"]:
        parts += ["", _about_groups(comparison), table(*_groups(comparison))]
    return "\n".join(parts)


def to_markdown(comparison: Document) -> str:
    """A table with a row for each run; then the groups."""
    parts = [_markdown(*_rows(comparison))]
    if comparison["groups"]:
        parts += ["", _about_groups(comparison), "", _markdown(*_groups(comparison))]
    return "\n".join(parts)


def to_csv(comparison: Document) -> str:
    """A line for each run with every column and all digits; nothing stands for what a run lacks."""
    headers, rows = _rows(comparison, everything=True)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([["" if value is None else _plain(value) for value in row] for row in rows])
    return out.getvalue().rstrip("\n")


def to_html(comparison: Document) -> str:
    """One page with both tables, which a click on a head sorts; it loads nothing."""
    parts = [_html(*_rows(comparison))]
    if comparison["groups"]:
        parts += [f"<p>{html.escape(_about_groups(comparison))}</p>", _html(*_groups(comparison))]
    title = f"{len(comparison['rows'])} runs by {comparison['metric'][0]}"
    return _PAGE.format(title=html.escape(title), body="\n".join(parts), style=_STYLE, script=_SCRIPT)


FORMATS: dict[str, Callable[[Document], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "csv": to_csv,
    "html": to_html,
}


# -- tables -----------------------------------------------------------------------------------------------------------


def _side_by_side(comparison: Document) -> Table:
    """Differing config keys first, then what each run arrived at."""
    runs, rows = comparison["rows"], []
    rows += [["status", *comparison["status"]], ["last_step", *comparison["last_step"]]]
    rows += [[key, *values] for key, values in comparison["config"].items()]
    rows += [[f"final.{key}", *values] for key, values in comparison["metrics"].items()]
    rows += [[f"best.{key}", *values] for key, values in comparison["best"].items()]
    for metric in comparison["metric"]:
        names = [] if metric in comparison["best"] else ["best", "best_step"]
        names += [] if comparison["at"] is None else ["at", "at_step"]
        rows += [[f"{metric}.{name}", *(run["metrics"][metric][name] for run in runs)] for name in names]
    rows += [[key, *(run[key] for run in runs)] for key in ("tokens_per_second", "seconds", "device_hours")]
    return ["", *comparison["runs"]], rows


def _rows(comparison: Document, *, everything: bool = False) -> Table:
    """One row a run. Columns that say nothing of any run are left out unless ``everything`` is wanted."""
    columns: dict[str, list[Any]] = {}

    def add(header: str, pick: Callable[[Mapping[str, Any]], Any]) -> None:
        values = [pick(row) for row in comparison["rows"]]
        if everything or any(value is not None for value in values):
            columns[header] = values

    for key in ("run", "status", "label"):
        add(key, lambda row, key=key: row[key])  # type: ignore[misc]
    for key in comparison["config"]:
        add(key, lambda row, key=key: row["params"][key])  # type: ignore[misc]
    for metric in comparison["metric"]:
        names = ["last", *(["last_step"] if everything else []), "best", "best_step"]
        names += [] if comparison["at"] is None else ["at", "at_step"]
        for name in names:
            header = metric if name == "last" else f"{metric}.{name}"
            add(header, lambda row, metric=metric, name=name: row["metrics"][metric][name])  # type: ignore[misc]
    hidden = ("tokens_per_second", "source", "directory", "mlflow_run_id") if everything else ()
    for key in ("steps", "tokens", "seconds", "device_hours", *hidden):
        add(key, lambda row, key=key: row[key])  # type: ignore[misc]
    return list(columns), [list(values) for values in zip(*columns.values(), strict=True)]


def _groups(comparison: Document) -> Table:
    """One row a group, with its difference from the best."""
    share = f"{100 * comparison['level']:g}"
    headers = ["group", "n", "left out", "mean", f"low {share} %", f"high {share} %", "difference", "p (Holm)", ""]
    pairs = {pair["group"]: pair for pair in comparison["pairwise"]}
    rows = []
    for place, group in enumerate(comparison["groups"]):
        pair = pairs.get(group["group"])
        verdict = "no result" if not group["n"] else "" if pair is None else pair["verdict"]
        verdict = "best" if place == 0 and pairs else verdict
        numbers = [group["mean"], group["low"], group["high"]]
        numbers += [None, None] if pair is None else [pair["difference"], pair["p_adjusted"]]
        rows.append([group["group"], group["n"], group["left_out"], *map(_finite, numbers), verdict])
    return headers, rows


def _about_groups(comparison: Document) -> str:
    at = comparison["at"]
    what = f"{comparison['metric'][0]} " + ("at the end" if at is None else "at {} {}".format(*next(iter(at.items()))))
    return f"{what}, mean over the runs of a group; differences from the best by Welch's test, corrected by Holm"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# -- writing ----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headers, ["---:" if right else "---" for right in _numeric(headers, rows)]]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _numeric(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    return [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(headers))]


def _html(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = _numeric(headers, rows)
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "\n".join(
        "<tr>" + "".join(_html_cell(v, right) for v, right in zip(row, numeric, strict=True)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _html_cell(value: Any, right: bool) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    exact = f' data-value="{value}"' if is_number else ""
    kind = ' class="number"' if right else ""
    return f"<td{kind}{exact}>{html.escape(cell(value))}</td>"


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin-bottom: 2em; }
th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { cursor: pointer; position: sticky; top: 0; background: #f4f4f4; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], i = head.cellIndex, up = head.dataset.up !== "1";
  head.dataset.up = up ? "1" : "0";
  const key = row => row.cells[i].dataset.value === undefined ? row.cells[i].textContent : +row.cells[i].dataset.value;
  const order = (a, b) => a === "-" ? 1 : b === "-" ? -1 : (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>"""
