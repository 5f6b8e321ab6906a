"""What it costs to take the learning rate from a narrow model, with maximal-update parametrisation and without.

    glowflow sweep configs/shakespeare_char.yaml tune_spaces/mup.yaml --name mup
    python benchmarks/mup_transfer.py runs/mup docs/experiments/mup

Reads the sweep's leaderboard: losses by width, parametrisation, rate and seed. The narrow model is the base, at whose
width both parametrisations are the same. Writes the table (Markdown, also to stdout) and the curves (PNG).

Per parametrisation: the rate that is best at the narrow width (mean over seeds), the loss that it gives at the wide
one, and the best loss there. The shift is that of the optimum in factors of two from narrow to wide, each optimum the
vertex of the parabola through the best rate and its neighbours, for each seed; mean and Student's 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from glowflow.experiments.canvas import COLUMN, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = dict[float, list[float]]
"""Rate -> losses in the order of the seeds."""


def read_curves(leaderboard: Path) -> dict[tuple[int, bool], Curve]:
    """(width, whether µP) -> its curve.

    Raises:
        SystemExit: a trial has no loss, or some rate has fewer seeds than others.
    """
    found: dict[tuple[int, bool], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with leaderboard.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] != "FINISHED":
                raise SystemExit(f"{leaderboard}: trial {row['trial']} is {row['status']}")
            place = int(row["model.dim"]), row["model.mup"].lower() == "true"
            found[place][float(row["training.lr"])][int(row["seed"])] = float(row["val_loss"])
    curves = {
        place: {lr: [by_seed[seed] for seed in sorted(by_seed)] for lr, by_seed in sorted(curve.items())}
        for place, curve in found.items()
    }
    if len({len(losses) for curve in curves.values() for losses in curve.values()}) != 1:
        raise SystemExit(f"{leaderboard}: not every rate has the same number of seeds")
    return curves


def best_rate(curve: Curve) -> float:
    """The rate with the lowest mean loss."""
    return min(curve, key=lambda lr: float(np.mean(curve[lr])))


def optimum(rates: list[float], losses: list[float]) -> float:
    """log2 of the best rate: the vertex of the parabola through the lowest point and its two neighbours."""
    lowest = int(np.argmin(losses))
    if lowest in (0, len(rates) - 1):
        return math.log2(rates[lowest])
    x, y = np.log2(rates[lowest - 1 : lowest + 2]), losses[lowest - 1 : lowest + 2]
    square, linear, _ = np.polyfit(x, y, 2)
    return float(-linear / (2 * square))


def shift(narrow: Curve, wide: Curve) -> tuple[float, float]:
    """(mean, half of the 95 % interval) of the optimum's shift over the seeds, in factors of two."""
    seeds = len(next(iter(narrow.values())))
    shifts = [
        optimum(list(wide), [losses[seed] for losses in wide.values()])
        - optimum(list(narrow), [losses[seed] for losses in narrow.values()])
        for seed in range(seeds)
    ]
    half = stats.t.ppf(0.975, seeds - 1) * float(np.std(shifts, ddof=1)) / math.sqrt(seeds)
    return float(np.mean(shifts)), half


def table(curves: dict[tuple[int, bool], Curve]) -> list[str]:
    """Markdown: a row per parametrisation."""
    narrow_width, wide_width = min(width for width, _ in curves), max(width for width, _ in curves)
    narrow = curves[narrow_width, True]
    taken = best_rate(narrow)
    lines = [
        f"| parametrisation | best rate at {narrow_width} | loss with it at {wide_width} | best rate at {wide_width} | "
        "loss there | cost of taking the narrow one | shift of the optimum, factors of two |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mup in (True, False):
        wide = curves[wide_width, mup]
        best = best_rate(wide)
        with_taken, with_best = float(np.mean(wide[taken])), float(np.mean(wide[best]))
        centre, half = shift(narrow, wide)
        name = "maximal-update" if mup else "standard"
        lines.append(
            f"| {name} | {taken:g} | {with_taken:.4f} | {best:g} | {with_best:.4f} | "
            f"{100 * (with_taken / with_best - 1):+.2f} % | {centre:+.2f} ± {half:.2f} |"
        )
    return lines


def draw(curves: dict[tuple[int, bool], Curve], path: Path) -> Path:
    """Mean loss over the rate, one line per width and parametrisation, bars over the seeds."""
    narrow_width = min(width for width, _ in curves)
    looks = {True: ("#0B6E99", "-", "o"), False: ("#C2410C", "--", "s")}

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for (width, mup), curve in sorted(curves.items()):
            colour, line, marker = ("#6B7280", "-", "^") if width == narrow_width else looks[mup]
            label = f"width {width}" + ("" if width == narrow_width else ", µP" if mup else ", standard")
            means = np.array([np.mean(losses) for losses in curve.values()])
            spread = np.array([(means[i] - min(v), max(v) - means[i]) for i, v in enumerate(curve.values())]).T
            axes.errorbar(
                list(curve), means, spread, color=colour, ls=line, marker=marker, ms=4, capsize=2, label=label
            )
        axes.set_xscale("log", base=2)
        rates = sorted({lr for curve in curves.values() for lr in curve})
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.minorticks_off()
        lowest = min(min(map(np.mean, curve.values())) for curve in curves.values())
        axes.set_ylim(lowest - 0.03, lowest + 0.6)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss (nats per character)")
        figure.legend(loc="outside lower center", ncols=3)

    return save(fill, path, COLUMN, 3.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="directory of the sweep")
    parser.add_argument("out", type=Path, help="directory for table and curves")
    arguments = parser.parse_args()
    curves = read_curves(arguments.sweep / "report" / "leaderboard.csv")
    lines = table(curves)
    draw(curves, arguments.out / "curves.png")
    (arguments.out / "transfer.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
