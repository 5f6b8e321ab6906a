"""``glowflow bench``: speed, measured in alternation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from glowflow.benchmark.attention_options import OPTIONS
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
    from glowflow.orchestration.bench import bench_train, record_train
    from glowflow.tracking.tables import table

    document = bench_train(config, list(overrides), steps=steps, warmup=warmup, rounds=rounds, progress=note)
    document["run"] = record_train(document, storage)
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


def _grid_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the grid, as the benchmark room lists them."""
    for option in reversed(OPTIONS):
        name = option.name.replace("-", "_")
        decorate = click.option(
            f"--{option.name}", name, default=option.default, show_default=bool(option.default), help=option.help
        )
        command = decorate(command)
    return command


@bench.command()
@_grid_options
@click.option("--read", "source", type=click.Path(), help="Measure nothing: take the JSON document in this file.")
@click.option("--out", type=click.Path(file_okay=False), help="Write the table, the figure and the JSON here too.")
@click.option("--storage", default="runs", show_default=True, help="Where the result is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def attention(source: str | None, out: str | None, storage: str, as_json: bool, **grid: str) -> None:
    """Time attention kinds x backends x lengths, taking turns; an MLflow run in `benchmarks`.

    TFLOP/s counts the pairs of query and key that are seen, each once. MiB is the peak of torch's allocator beyond the
    inputs, and in decoding the layer's cache. A case that cannot run or does not fit says why.
    """
    from glowflow.orchestration.bench_attention import (
        attention_files,
        attention_table,
        read_document,
        record_attention,
    )

    if source is None:
        from glowflow.benchmark.attention import bench_attention
        from glowflow.benchmark.attention_grid import read_grid

        document = bench_attention(read_grid({key.replace("_", "-"): value for key, value in grid.items()}), note)
    else:
        document = read_document(source)
    files = attention_files(document)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (Path(out) / name).write_bytes(content)
    run = record_attention(document, storage, files)
    if as_json:
        echo_json({**document, "run": run})
    else:
        click.echo(f"{attention_table(document)}\n\nkept as {run}")
