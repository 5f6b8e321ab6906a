"""The figure of ``glowflow bench attention``: time and memory over the length, a column for each pass, log scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.benchmark.attention_results import series
from glowflow.experiments import views
from glowflow.experiments.canvas import PAGE, save, small_print

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention_costs"]

_TITLES = {"forward": "forward", "backward": "forward and backward", "decode": "one step of decoding"}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def attention_costs(document: Mapping[str, Any], path: Path) -> Path:
    """Draw what a benchmark found.

    Args:
        document: from `glowflow.benchmark.attention.bench_attention`, with at least one case that was measured.
        path: of the PNG.
    """
    found = series(document["rows"])
    passes = [which for which in _TITLES if any(key[0] == which for key in found)]
    looks = _looks([(kind, backend) for _, kind, backend in found])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(passes), squeeze=False)
        for column, which in enumerate(passes):
            lines = {key[1:]: rows for key, rows in found.items() if key[0] == which}
            _draw(panels[0][column], lines, looks, lambda row: row["ms"])
            _draw(panels[1][column], lines, looks, _held)
            panels[0][column].set_title(_TITLES[which], loc="left", fontsize=9.5)
            panels[1][column].set_xlabel("position" if which == "decode" else "positions of a sequence")
        panels[0][0].set_ylabel("milliseconds")
        panels[1][0].set_ylabel("MiB")
        handles = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=min(len(handles), 4))
        small_print(figure, _caption(document))

    return save(draw, path, max(PAGE, 3.2 * len(passes)), 6.0)


def _looks(cases: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """A colour for each kind, dashes and a marker for each backend; also told apart in black and white."""
    kinds = list(dict.fromkeys(kind for kind, _ in cases))
    backends = list(dict.fromkeys(backend for _, backend in cases))
    return {
        (kind, backend): {
            "color": views.VARIANTS[kinds.index(kind) % len(views.VARIANTS)],
            "linestyle": _DASHES[backends.index(backend) % len(_DASHES)],
            "marker": _MARKERS[backends.index(backend) % len(_MARKERS)],
        }
        for kind, backend in cases
    }


def _held(row: Mapping[str, Any]) -> float | None:
    held = row["cache_bytes"] if row["pass"] == "decode" else row["peak_bytes"]
    return None if held is None else held / 2**20


def _draw(axes: Axes, lines: Mapping[tuple[str, str], Sequence[Any]], looks: Mapping[Any, Any], value: Any) -> None:
    for case, rows in lines.items():
        points = [(row["length"], value(row)) for row in rows if value(row)]
        if points:
            axes.plot(*zip(*points, strict=True), label=" ".join(case), markersize=4, linewidth=1.5, **looks[case])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the style knows no powers of ten
    ticks = sorted({row["length"] for rows in lines.values() for row in rows})
    axes.set_xticks(ticks, [_short(length) for length in ticks])
    axes.minorticks_off()


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _caption(document: Mapping[str, Any]) -> str:
    shape, environment = document["grid"]["shape"], document["environment"]
    sizes = f"batch {shape['batch']}, {shape['heads']} heads ({shape['kv_heads']} for keys) of {shape['head_dim']}"
    where = f"{environment['device']}, torch {environment['torch']}"
    threads = environment["threads"]
    where += f", {threads} thread{'s' * (threads != 1)}" if shape["device"] == "cpu" else ""
    text = (
        f"{sizes}, {shape['dtype']}, window {shape['window']}; {where}; medians of {document['grid']['repeat']} rounds."
    )
    return f"{text} Memory: peak of torch's allocator beyond the inputs; in decoding, the cache."
