"""``glowflow mup``: does maximal-update parametrisation do for a config what it is there for?"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowflow.cli.output import echo_json, note

if TYPE_CHECKING:
    from glowflow.training.coordinates import CoordinateCheck

__all__ = ["mup"]


class _Widths(click.ParamType):
    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers, as 64,128,256 is one", param, ctx)


@click.group()
def mup() -> None:
    """Maximal-update parametrisation: whether hyper-parameters transfer over the width."""


@mup.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--widths", type=_Widths(), metavar="N,N,...", help="Default: four doublings from 64, as heads allow.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate at the narrowest width. Default: one so small that nothing saturates within the steps.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def check(
    config: str,
    overrides: tuple[str, ...],
    widths: list[int] | None,
    steps: int,
    seeds: int,
    lr: float | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Train the model of CONFIG at several widths for a few steps, under maximal-update and standard parametrisation.

    Shows how the changes of every block grow with the width; exit code 1 where they do under model.mup.
    """
    from glowflow.config.errors import ConfigError, Problem
    from glowflow.config.loader import load_config
    from glowflow.training.coordinates import LR, coordinate_check, default_widths

    if out is not None and out.suffix != ".png":
        raise ConfigError(Problem("--out", "must end in .png", str(out)))
    experiment = load_config(config, overrides)
    chosen = default_widths(experiment) if widths is None else widths

    found = []
    for wanted, name in ((True, "maximal-update"), (False, "standard")):
        found.append(
            coordinate_check(
                experiment, chosen, mup=wanted, steps=steps, seeds=seeds, lr=lr or LR, progress=partial(_tell, name)
            )
        )
    document = _document(*found)
    if out is not None:
        from glowflow.experiments.plots_of_coordinates import coordinates

        document["figure"] = str(coordinates(found, out))
    echo_json(document) if as_json else _print(document)
    return 0 if document["ok"] else 1


def _tell(parametrisation: str, width: int, seed: int) -> None:
    if seed == 0:
        note(f"{parametrisation} parametrisation, width {width}")


def _document(ours: CoordinateCheck, standard: CoordinateCheck) -> dict[str, Any]:
    """Everything that ``check`` shows, as one JSON-able mapping."""
    from glowflow.training.coordinates import LIMIT

    def places(checked: CoordinateCheck) -> list[dict[str, Any]]:
        return [
            {
                "place": place,
                "slopes": [checked.slope(place, step) for step in range(1, checked.steps + 1)],
                "mean_absolute": checked.sizes[place],
                "mean_absolute_change": checked.changes[place],
            }
            for place in checked.changes
        ]

    return {
        "ok": ours.ok,
        "failures": ours.failures,
        "limit": LIMIT,
        "optimizer": ours.optimizer,
        "lr": ours.lr,
        "seeds": ours.seeds,
        "steps": ours.steps,
        "widths": list(ours.widths),
        "mup": places(ours),
        "standard": places(standard),
        "figure": None,
    }


def _print(document: dict[str, Any]) -> None:
    from glowflow.tracking.tables import table

    widths, last = document["widths"], document["steps"]
    seeds = "1 seed" if document["seeds"] == 1 else f"{document['seeds']} seeds"
    click.echo(
        f"slopes of log2 mean|x_t - x_0| over log2 width, widths {', '.join(map(str, widths))}; "
        f"{document['optimizer']}, lr {document['lr']:g}, mean of {seeds}"
    )
    columns = ["model.mup, t = 1", f"model.mup, t = {last}", "", f"standard, t = {last}"]
    rows = [
        [
            ours["place"],
            _shown(ours["slopes"][0]),
            _shown(ours["slopes"][-1]),
            "<- depends on the width" if ours["place"] in document["failures"] else "",
            _shown(standard["slopes"][-1]),
        ]
        for ours, standard in zip(document["mup"], document["standard"], strict=True)
    ]
    click.echo(table(["", *columns], rows))
    if document["ok"]:
        click.echo(f"ok: no slope under model.mup is farther from 0 than {document['limit']:g}")
    else:
        count = len(document["failures"])
        click.echo(
            f"not ok: {count} of {len(rows)} slopes under model.mup are farther from 0 than {document['limit']:g}"
        )
        click.echo("chance and scores that saturate make slopes too: try more --seeds, a smaller --lr, wider --widths")
    if document["figure"]:
        click.echo(f"drawn in {document['figure']}")


def _shown(slope: float) -> str:
    return "not finite" if math.isnan(slope) else f"{slope:+.2f}"
