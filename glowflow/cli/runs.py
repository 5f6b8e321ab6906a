"""``glowflow runs`` and ``glowflow ui``: what was trained, how runs differ, and the tracker's own pages."""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path
from typing import Any

import click

from glowflow.cli.best import best
from glowflow.cli.output import echo_json, note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["runs", "ui"]

_storage = click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
_uri = click.option("--uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the storage.")
_statuses = click.Choice(["RUNNING", "FINISHED", "STOPPED", "FAILED", "KILLED", "DEAD"], case_sensitive=False)
_formats = click.Choice(["text", "markdown", "csv", "html"])
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def runs() -> None:
    """List, show, compare and sync runs."""


@runs.command("list")
@_storage
@_uri
@click.option("--experiment", help="Only runs of this MLflow experiment.")
@click.option("--sweep", help="Only the trials of this sweep.")
@click.option(
    "--status", "statuses", multiple=True, type=_statuses, help="Only runs with this status; may be repeated."
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the newest.")
@_json
def list_command(
    storage: str,
    uri: str | None,
    experiment: str | None,
    sweep: str | None,
    statuses: tuple[str, ...],
    limit: int | None,
    as_json: bool,
) -> None:
    """All runs, newest first; the trials of a sweep as SWEEP/TRIAL."""
    from glowflow.tracking.queries import list_runs
    from glowflow.tracking.tables import format_runs

    name = None if sweep is None else Path(sweep).name
    rows = list_runs(storage, uri=uri, experiment=experiment, sweep=name, statuses=statuses, limit=limit)
    if sweep is not None and not rows and not statuses:
        from glowflow.experiments.journal import find_sweep

        find_sweep(storage, sweep)  # says what it might have been
    echo_json(rows) if as_json else click.echo(format_runs(rows))
    _leave_quickly()


@runs.command()
@click.argument("run")
@_storage
@_uri
@_json
def show(run: str, storage: str, uri: str | None, as_json: bool) -> None:
    """One run: where it stands, what it arrived at, where its checkpoints are."""
    from glowflow.tracking.queries import show_run
    from glowflow.tracking.tables import format_run

    shown = show_run(storage, run, uri=uri)
    echo_json(shown) if as_json else click.echo(format_run(shown))


@runs.command()
@click.argument("names", nargs=-1, metavar="[RUN|SWEEP]...")
@_storage
@click.option("--uri", help="Take the runs straight from this MLflow store instead of the run directories.")
@click.option("--experiment", help="Take the runs straight from MLflow; without names, all of this experiment.")
@click.option(
    "--filter", "filters", multiple=True, metavar="COND", help="'training.lr>1e-3'; also = != < <= >=, metrics."
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME[:max]", help="What to show; the first one decides.")
@click.option("--at-step", type=click.IntRange(min=0), help="Also the value at this step.")
@click.option("--at-tokens", type=click.FloatRange(min=0), help="Also the value after so many tokens.")
@click.option("--at-time", metavar="TIME", help="Also the value after this time: 90s, 10m, 2h.")
@click.option("--by", multiple=True, metavar="KEY", help="Group by this key; default: by all that differ but the seed.")
@click.option("--format", "form", type=_formats, help="Default: what the ending of --out says, else text.")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write there instead of to the terminal.")
@_json
def compare(
    names: tuple[str, ...],
    storage: str,
    at_time: str | None,
    form: str | None,
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Runs, or all trials of sweeps, side by side: config keys that differ, results, cost, and what seeds say."""
    from glowflow.experiments.compare import FORMATS
    from glowflow.experiments.compare import compare as compare_runs

    comparison = compare_runs(storage, names, at_time=_seconds(at_time), **options)
    text = "" if as_json and out is None else FORMATS[form or _format_of(out)](comparison)
    if out is not None:
        _write(out, text)
        note(f"{len(comparison['rows'])} runs: {out}")
    if as_json:
        echo_json(comparison)
    elif out is None:
        click.echo(text)
    _leave_quickly()


def _leave_quickly() -> None:
    """Else Python looks through the hundreds of thousands of objects that MLflow leaves behind before it ends."""
    gc.freeze()


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem("out", f"cannot be written: {error.strerror or error}", path)) from error


def _seconds(text: str | None) -> float | None:
    from glowflow.config.spaces.settings import read_duration

    seconds, problems = read_duration("at-time", text)
    if problems:
        raise ConfigError(problems)
    return seconds


def _format_of(out: str | None) -> str:
    endings = {".md": "markdown", ".csv": "csv", ".html": "html", ".htm": "html"}
    return endings.get(Path(out).suffix.lower(), "text") if out is not None else "text"


@runs.command()
@click.argument("names", nargs=-1, metavar="[RUN|SWEEP]...")
@_storage
@_uri
@_json
def sync(names: tuple[str, ...], storage: str, uri: str | None, as_json: bool) -> None:
    """Bring MLflow level with what runs, or a sweep and its trials, wrote down. Without names: with everything."""
    reports = [report for directory in _to_sync(storage, names) for report in _sync(directory, uri)]
    if as_json:
        echo_json({report.pop("run"): report for report in reports})
        return
    for report in reports:
        click.echo(f"{report.pop('run')}: " + ", ".join(f"{key} {value}" for key, value in report.items()))


def _to_sync(storage: str, names: tuple[str, ...]) -> list[Path]:
    """Directories of sweeps, and of the runs that belong to none of them."""
    from glowflow.experiments.journal import JOURNAL_NAME, find_sweep, iter_sweeps
    from glowflow.tracking.runrecord import find_run, iter_runs

    if not names:
        sweeps = iter_sweeps(storage)
        return [*sweeps, *(run_dir for run_dir in iter_runs(storage) if run_dir.parent not in sweeps)]
    known = [(Path(storage) / name, Path(name)) for name in names]
    is_sweep = [any((folder / JOURNAL_NAME).is_file() for folder in folders) for folders in known]
    return [
        find_sweep(storage, name) if sweep else find_run(storage, name)
        for name, sweep in zip(names, is_sweep, strict=True)
    ]


def _sync(directory: Path, uri: str | None) -> list[dict[str, Any]]:
    from glowflow.experiments.journal import JOURNAL_NAME
    from glowflow.tracking.family import sync_sweep
    from glowflow.tracking.sync import sync as sync_run

    if (directory / JOURNAL_NAME).is_file():
        return [report.to_dict() for report in sync_sweep(directory, uri=uri)]
    return [sync_run(directory, uri=uri).to_dict()]


runs.add_command(best)


@click.command()
@_storage
@_uri
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 5000 if it is free, else any free port.")
def ui(storage: str, uri: str | None, port: int | None) -> int:
    """Serve the MLflow UI for the right store on 127.0.0.1 until Ctrl-C."""
    from glowflow.tracking.ui import ui_plan

    plan = ui_plan(storage, uri=uri, port=port)
    if plan.command is None:
        note(f"the tracking server has its own pages: {plan.url}")
        return 0
    note(f"MLflow UI: {plan.url} (Ctrl-C stops it)")
    server = subprocess.Popen(plan.command, env={**os.environ, **plan.environment})
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return 0
