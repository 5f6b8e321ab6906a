"""``glowflow runs best``: the winner of a sweep, as a config that trains it again."""

from __future__ import annotations

from pathlib import Path

import click

from glowflow.cli.output import echo_json, note
from glowflow.config.errors import Problem, RunError

__all__ = ["best"]


@click.command()
@click.argument("name", metavar="SWEEP")
@click.option("--storage", default="runs", show_default=True, help="Directory of the sweep's directory.")
@click.option("--export", type=click.Path(dir_okay=False), help="Write its config to this YAML file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def best(name: str, storage: str, export: str | None, as_json: bool) -> None:
    """The best trial of SWEEP: its values, where its run is, its config as a file of its own."""
    from glowflow.experiments.journal import find_sweep, read_journal
    from glowflow.experiments.winner import winner

    sweep_dir = find_sweep(storage, name)
    won = winner(sweep_dir)
    trial, proxy = won.trial, won.proxy
    values = {metric: trial.value(metric) for metric in read_journal(sweep_dir).metrics}
    found = {
        "sweep": sweep_dir.name,
        "trial": trial.id,
        "run": f"{sweep_dir.name}/{trial.id}",
        "status": trial.status,
        "step": trial.step,
        "metrics": values,
        "params": trial.params,
        "seed": trial.seed,
        "mlflow_run_id": trial.mlflow_run_id,
        "proxy": None if proxy is None else proxy.to_dict(),
        "exported": export,
    }
    if export is not None:
        _write(Path(export), won.to_yaml())
    if as_json:
        echo_json(found)
        return
    shown = ", ".join(f"{key} {value:.6g}" for key, value in values.items() if value is not None)
    click.echo(f"{found['run']}: {shown} at step {trial.step} ({trial.status.lower()})")
    for key, value in {**trial.params, "training.seed": trial.seed}.items():
        click.echo(f"  {key} = {value}")
    if proxy is not None:
        click.echo(str(proxy))
    if export is not None:
        at = "" if proxy is None else f" at its full width, {proxy.full_width}"
        note(f"wrote {export}{at}; train it with: glowflow train {export}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(Problem("--export", f"cannot be written: {error.strerror or error}", str(path))) from error
