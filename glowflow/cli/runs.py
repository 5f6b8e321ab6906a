"""``glowflow runs`` and ``glowflow ui``: what was trained, how runs differ, and the tracker's own pages."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import click

from glowflow.cli.output import echo_json, note

__all__ = ["runs", "ui"]

_storage = click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
_uri = click.option("--uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the storage.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def runs() -> None:
    """List, show, compare and sync runs."""


@runs.command("list")
@_storage
@_uri
@click.option("--experiment", help="Only runs of this MLflow experiment.")
@_json
def list_command(storage: str, uri: str | None, experiment: str | None, as_json: bool) -> None:
    """All runs, newest first."""
    from glowflow.tracking.queries import list_runs
    from glowflow.tracking.tables import format_runs

    rows = list_runs(storage, uri=uri, experiment=experiment)
    echo_json(rows) if as_json else click.echo(format_runs(rows))


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
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@_storage
@_json
def compare(names: tuple[str, ...], storage: str, as_json: bool) -> None:
    """Runs side by side: the config keys that differ, and the results."""
    from glowflow.tracking.queries import compare_runs
    from glowflow.tracking.tables import format_comparison

    comparison = compare_runs(storage, names)
    echo_json(comparison) if as_json else click.echo(format_comparison(comparison))


@runs.command()
@click.argument("names", nargs=-1, metavar="[RUN...]")
@_storage
@_uri
@_json
def sync(names: tuple[str, ...], storage: str, uri: str | None, as_json: bool) -> None:
    """Bring MLflow level with what the runs wrote down while it was away. Without RUN: all runs."""
    from glowflow.tracking.runrecord import find_run, iter_runs
    from glowflow.tracking.sync import sync as sync_run

    directories = [find_run(storage, name) for name in names] if names else iter_runs(storage)
    reports: dict[str, Any] = {directory.name: sync_run(directory, uri=uri).to_dict() for directory in directories}
    if as_json:
        echo_json(reports)
        return
    for name, report in reports.items():
        click.echo(f"{name}: " + ", ".join(f"{key} {value}" for key, value in report.items()))


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
