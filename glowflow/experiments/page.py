"""One self-contained HTML file: tables that sort, plotly figures, provenance. It loads nothing over the network.

plotly.js stands in the file once; a content security policy forbids the rest, so that a browser proves it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from glowflow.experiments.figures_html import Panel
from glowflow.experiments.tables import Cells

__all__ = ["html_page"]

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 0 auto;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
h3 { font-size: 1rem; margin: .5rem 0 0; }
p { margin: .3rem 0; } .note { color: #555; font-size: .87rem; } code { background: #f2f4f6; padding: .05rem .25rem; }
.scroll { overflow-x: auto; max-height: 34rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #444; } .right { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: #f6f8fa; } tr[data-trial] { cursor: pointer; }
tr.chosen { background: #fdeee3 !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
.panels > section { min-width: 0; } .wide { grid-column: 1 / -1; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; } dd { margin: 0;
  overflow-wrap: anywhere; } dt { color: #555; }
@media print { .scroll { max-height: none; overflow: visible; } section { break-inside: avoid; } }
"""
_SCRIPT = """
const panels = JSON.parse(document.getElementById('panels').textContent);
// Plotly's own default is a button that uploads the figure to its makers.
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ''};
const divs = panels.map((panel, i) => {
  const div = document.getElementById('panel-' + i);
  Plotly.newPlot(div, panel.data, panel.layout, {...config, displayModeBar: panel.wide ? 'hover' : false});
  return div;
});
let chosen = null;
function choose(trial) {
  chosen = trial === chosen ? null : trial;
  document.querySelectorAll('tr[data-trial]').forEach(row => {
    row.classList.toggle('chosen', row.dataset.trial === chosen);
  });
  panels.forEach((panel, i) => {
    const lines = panel.data.map((trace, k) => k).filter(k => panel.data[k].meta !== undefined);
    if (!lines.length) return;
    const has = lines.some(k => panel.data[k].meta === chosen), base = k => panel.data[k];
    Plotly.restyle(divs[i], {
      'line.width': lines.map(k => has && base(k).meta === chosen ? 5 : panel.widths[k]),
      opacity: lines.map(k => has ? (base(k).meta === chosen ? 1 : 0.15) : panel.opacities[k]),
    }, lines);
  });
}
panels.forEach((panel, i) => {
  panel.widths = panel.data.map(trace => trace.line ? trace.line.width : 0);
  panel.opacities = panel.data.map(trace => trace.opacity === undefined ? 1 : trace.opacity);
  divs[i].on('plotly_click', event => {
    const trial = event.points[0].data.meta;
    if (trial !== undefined) choose(trial);
  });
});
document.querySelectorAll('tr[data-trial]').forEach(row => {
  row.addEventListener('click', () => choose(row.dataset.trial));
});
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0];
  const column = head.cellIndex, up = head.getAttribute('aria-sort') !== 'ascending';
  const key = row => row.cells[column].dataset.key;
  const compare = (a, b) => {
    const x = key(a), y = key(b), p = Number(x), q = Number(y);
    if ((p === Infinity) !== (q === Infinity)) return (p === Infinity) === up ? 1 : -1;  // what is missing comes last
    return x !== '' && y !== '' && !isNaN(p) && !isNaN(q) ? (p === q ? 0 : p < q ? -1 : 1) : x.localeCompare(y);
  };
  head.parentElement.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  [...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)).forEach(row => body.append(row));
}));
"""


def html_page(
    *,
    title: str,
    lines: Sequence[str],
    tables: Mapping[str, tuple[Cells, Sequence[str | None], str]],
    panels: Sequence[Panel],
    remarks: Sequence[str],
    provenance: Mapping[str, str],
) -> str:
    """The page.

    Args:
        lines: what stands under the title.
        tables: title -> cells, the trial of each row (None: no single one) and the note under the table.
        remarks: what stands under the figures.
        provenance: what the numbers were made with.
    """
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in lines)]
    for heading, (cells, trials, under) in tables.items():
        body += [f"<h2>{escape(heading)}</h2>", _table(cells, trials), f'<p class="note">{escape(under)}</p>']
    numbers = itertools.count()
    sections = [_section(panel, next(numbers) if panel.data else None) for panel in panels]
    body += ['<div class="panels">', *sections, "</div>"]
    body += [f'<p class="note">{escape(remark)}</p>' for remark in remarks]
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in provenance.items())
    body.append(f"<h2>Provenance</h2><dl>{facts}</dl>")
    data = _script_json(
        [{"data": panel.data, "layout": panel.layout, "wide": panel.wide} for panel in panels if panel.data]
    )
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    scripts = f"<script>{get_plotlyjs()}</script>" if panels else ""
    scripts += f'<script type="application/json" id="panels">{data}</script><script>{_SCRIPT}</script>'
    top = f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
    return top + "<body>\n" + "\n".join(body) + f"\n{scripts}\n</body></html>\n"


def _section(panel: Panel, number: int | None) -> str:
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    kind = ' class="wide"' if panel.wide else ""
    place = "" if number is None else f'<div id="panel-{number}"></div>'
    head = "h2" if panel.wide else "h3"
    return f"<section{kind}><{head}>{escape(panel.title)}</{head}>{note}{place}</section>"


def _table(cells: Cells, trials: Sequence[str | None]) -> str:
    longest = [max(map(len, column), default=0) for column in zip(*cells.rows, strict=True)] or [0] * len(cells.headers)
    kinds = [
        "right" if right else "long" if size > 36 else "" for right, size in zip(cells.right, longest, strict=True)
    ]
    sides = [f' class="{kind}"' if kind else "" for kind in kinds]
    headers = zip(sides, cells.headers, strict=True)
    head = "".join(f'<th scope="col"{side}><button>{escape(text)}</button></th>' for side, text in headers)
    rows = []
    for texts, keys, trial in zip(cells.rows, cells.keys, trials, strict=True):
        mark = f' data-trial="{escape(trial)}"' if trial is not None else ""
        line = zip(sides, texts, keys, strict=True)
        columns = "".join(
            f'<td{side} data-key="{escape(_sort_key(key))}">{escape(text)}</td>' for side, text, key in line
        )
        rows.append(f"<tr{mark}>{columns}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _sort_key(key: float | str) -> str:
    """As JavaScript's ``Number`` reads it."""
    return "Infinity" if key == math.inf else str(key)


def _script_json(value: Any) -> str:
    """JSON that a script element can hold: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
