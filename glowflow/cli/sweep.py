"""``glowflow sweep``: run, resume, watch and report a sweep.

``sweep CONFIG SPACE`` runs one; ``sweep status SWEEP`` and ``sweep report SWEEP`` look at one.
"""

from __future__ import annotations

import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from glowflow.cli.output import echo_json, note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["sweep"]

_storage = click.option("--storage", default="runs", show_default=True, help="Directory of the sweep's directory.")
_EXIT = {"FINISHED": 0, "STOPPED": 0, "KILLED": 130, "FAILED": 1}


class _SweepGroup(click.Group):
    """``sweep CONFIG SPACE`` beside ``sweep status`` and ``sweep report``: what is no subcommand is a config."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args or args[0] not in self.commands:
            return "run", self.commands["run"], args
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options of `run` may come first: `sweep --resume NAME`.
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_SweepGroup, no_args_is_help=True)
def sweep() -> None:
    """Search or compare over any config: sweep CONFIG SPACE [key=value ...], status SWEEP, report SWEEP.

    The options of a sweep (--trials, --seeds, --resume, --dry-run, ...): glowflow sweep run --help
    """


@sweep.command()
@click.argument("config", required=False)
@click.argument("space", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--trials", type=click.IntRange(min=1), help="Points to try; default: the space's own.")
@click.option("--seeds", type=click.IntRange(min=1), help="Runs per point, each with a seed of its own.")
@click.option("--time-budget", help="Stop after this time: 90s, 10m, 2h.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Trials at a time; default: what the resources hold.")
@click.option("--searcher", help="random, grid, optuna, ...; default: the space's own.")
@click.option("--scheduler", help="fifo, asha, median, hyperband, pbt, pb2; default: the space's own.")
@click.option("--name", help="Name of the sweep; default: config, space and the time.")
@click.option(
    "--warm-start",
    multiple=True,
    metavar="SWEEP",
    help="Begin with the results of an earlier sweep, or of mlflow:EXPERIMENT.",
)
@click.option(
    "--proxy",
    metavar="width=W",
    help="Train models of this width, and export the best config at the full one; needs model.mup.",
)
@click.option("--resume", metavar="SWEEP", help="Go on with this sweep; what is done stays done.")
@_storage
@click.option("--dry-run", is_flag=True, help="Show what would run; start nothing, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def run(
    ctx: click.Context,
    config: str | None,
    space: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    warm_start: tuple[str, ...],
    proxy: str | None,
    resume: str | None,
    storage: str,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Run the trials of SPACE over CONFIG; OVERRIDES are key=value, for every trial."""
    from glowflow.orchestration.sweep.driver import resume_sweep, run_sweep
    from glowflow.orchestration.sweep.prepare import prepare_sweep

    changes = {key: value for key, value in flags.items() if value is not None}
    root = ctx.find_root()
    verbose = bool((root.obj or {}).get("verbose"))
    if resume is not None:
        state = resume_sweep(
            resume,
            storage=storage,
            config=config,
            space=space,
            overrides=overrides,
            changes=changes,
            proxy=proxy,
            verbose=verbose,
        )
        return _end(state, as_json)
    if config is None or space is None:
        missing = "CONFIG" if config is None else "SPACE"
        hint = "glowflow sweep configs/quickstart.yaml tune_spaces/lr.yaml"
        raise ConfigError(Problem(missing, "is missing: give a config and a space, or --resume SWEEP", hint=hint))
    prepared = prepare_sweep(config, space, overrides, changes, name=name, proxy=proxy)
    if dry_run:
        _show_plan(prepared, as_json)
        return 0
    command = ["glowflow", *(_words(sys.argv))]
    return _end(run_sweep(prepared, warm=warm_start, command=command, verbose=verbose), as_json)


def _words(argv: list[str]) -> list[str]:
    """What followed the program's name, whatever that was (`glowflow`, `python -m`, a pipeline script)."""
    words = argv[1:]
    return words if words[:1] == ["sweep"] else ["sweep", *words]


def _end(state: Any, as_json: bool) -> int:
    from glowflow.experiments.status import format_status, sweep_json
    from glowflow.experiments.winner import FULL_WIDTH_NAME

    if as_json:
        echo_json(sweep_json(state))
    else:
        click.echo(format_status(state))
        target = shlex.quote(str(state.about["name"]))
        sweep_dir = Path(state.about["storage"]) / state.about["name"]
        note(f"report: {sweep_dir / 'report' / 'report.md'}")
        if (sweep_dir / FULL_WIDTH_NAME).is_file():
            note(f"the best config at its full width: {sweep_dir / FULL_WIDTH_NAME}")
        if state.status == "KILLED":
            note(f"go on with: glowflow sweep --resume {target}")
        else:
            note(f"next: glowflow runs best {target} --export winner.yaml | glowflow runs compare {target}")
    return _EXIT.get(state.status, 1)


def _show_plan(prepared: Any, as_json: bool) -> None:
    from glowflow.tracking.tables import table

    settings, space, proxy = prepared.settings, prepared.space, prepared.proxy
    points, seeds = prepared.points(), settings.seeds
    plan = {
        "sweep": settings.sweep_dir.name,
        "proxy": None if proxy is None else proxy.to_dict(),
        "trials": settings.num_points * len(seeds),
        "seeds": list(seeds),
        "metric": list(space.metrics),
        "mode": list(space.modes),
        "searcher": space.searcher.name,
        "scheduler": space.scheduler.name,
        "max_steps": prepared.max_steps,
        "report_every": settings.interval,
        "rungs": space.scheduler.rungs(settings.interval, prepared.max_steps),
        "concurrency": settings.slots.concurrency,
        "in_process": settings.slots.in_process,
        "points": points,
        "warnings": prepared.warnings,
    }
    if as_json:
        echo_json(plan)
        return
    for key, value in plan.items():
        if key not in ("proxy", "points", "warnings"):
            click.echo(f"{key:<14}{value if not isinstance(value, list) else ', '.join(map(str, value)) or '-'}")
    if proxy is not None:
        narrower = [f"{key} {value} (full: {proxy.full[key]})" for key, value in proxy.changes.items()]
        click.echo(f"proxy         {', '.join(narrower)}")
    if points is None:
        click.echo(f"points        {space.searcher.name} chooses them as it learns")
    else:
        keys = sorted({key for point in points for key in point["params"]})
        rows = [[p["label"] or f"{p['point']:03d}", *(_cell(p["params"].get(key)) for key in keys)] for p in points]
        click.echo("\n" + table(["point", *keys], rows))
    for warning in prepared.warnings:
        note(f"warning: {warning}")


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, (dict, list, bool)) else value


@sweep.command()
@click.argument("name", metavar="SWEEP")
@_storage
@click.option("--follow", is_flag=True, help="Print again whenever something changes, until the sweep ends.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(name: str, storage: str, follow: bool, as_json: bool) -> None:
    """Every trial of SWEEP: state, rung, metric, the best so far."""
    from glowflow.experiments.journal import find_sweep, read_journal
    from glowflow.experiments.status import format_status, sweep_json

    sweep_dir, before, began = find_sweep(storage, name), None, datetime.now(timezone.utc)
    live = follow and sys.stdout.isatty()
    while True:
        state = read_journal(sweep_dir)
        if as_json:
            echo_json(sweep_json(state))
            return
        news = format_status(state, now=began)  # the clock alone is none
        if live:
            click.clear()
        if live or news != before:
            click.echo(format_status(state) if live or before is None else f"\n{format_status(state)}")
        if not follow or state.status != "RUNNING":
            return
        before = news
        time.sleep(2)


@sweep.command()
@click.argument("name", metavar="SWEEP")
@_storage
@click.option("--out", type=click.Path(file_okay=False), help="Directory to write into; default: SWEEP/report.")
def report(name: str, storage: str, out: str | None) -> None:
    """Write the table and the plots of SWEEP again: Markdown, HTML, CSV, PNG."""
    from glowflow.experiments.journal import find_sweep
    from glowflow.experiments.report import write_report

    for path in write_report(find_sweep(storage, name), out):
        click.echo(str(path))
