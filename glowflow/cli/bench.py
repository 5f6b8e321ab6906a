"""``glowflow bench``: speed, measured in alternation."""

from __future__ import annotations

import click

from glowflow.cli.output import echo_json, note

__all__ = ["bench"]


@click.group()
def bench() -> None:
    """Measure speed."""


@bench.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option(
    "--steps", type=click.IntRange(min=10), default=100, show_default=True, help="Steps timed per round and variant."
)
@click.option("--warmup", type=click.IntRange(min=5), default=20, show_default=True, help="Steps before them.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--storage", default="runs", show_default=True, help="Where the result is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train(
    config: str, overrides: tuple[str, ...], steps: int, warmup: int, rounds: int, storage: str, as_json: bool
) -> None:
    """Time CONFIG as a bare loop, with --local, and under Ray with one worker; an MLflow run in `benchmarks`."""
    from glowflow.orchestration.bench import bench_train, record_benchmark
    from glowflow.tracking.tables import table

    document = bench_train(config, list(overrides), steps=steps, warmup=warmup, rounds=rounds, progress=note)
    document["run"] = record_benchmark(document, storage)
    if as_json:
        echo_json(document)
        return
    columns = ["step_ms", "tokens_per_second", "speed_relative_to_bare", "data_wait_share", "seconds_to_first_step"]
    rows = [[name, *(row[column] for column in columns)] for name, row in document["variants"].items()]
    click.echo(table(["", *columns], rows))
    if document.get("gemm_peak"):
        click.echo(f"bare loop: {document['share_of_measured_gemm_peak']:.0%} of {document['gemm_peak']}")
    elif document["mfu"] is not None:
        click.echo(f"bare loop: MFU {document['mfu']:.1%} of {document['mfu_denominator']}")
    click.echo(f"kept as {document['run']}")
