"""``glowflow demo``: the quickstart from text to a model that writes, in one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from glowflow.cli.evaluate import measure
from glowflow.cli.generate import stream_text
from glowflow.cli.output import note

__all__ = ["demo"]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("--prompt", default="def ", show_default=True)
@click.pass_context
def demo(ctx: click.Context, overrides: tuple[str, ...], prompt: str) -> int:
    """Train configs/quickstart.yaml, measure it on held-out files beside n-gram models, and show what it writes."""
    from glowflow.evaluation.baselines import ngram_baselines
    from glowflow.evaluation.load import load_manifest, load_target
    from glowflow.orchestration.pipeline import TrainingPipeline

    began = time.monotonic()
    record = TrainingPipeline.from_file(QUICKSTART, overrides, verbose=bool((ctx.obj or {}).get("verbose"))).fit()
    if record.status != "FINISHED":
        return 130 if record.status == "KILLED" else 1
    storage = record.config["tracking"]["storage"]
    note("measuring on held-out files ...")
    loaded = load_target(record.run, storage)
    manifest = load_manifest(loaded)
    measured = measure(loaded, manifest, split=None, context=None, batch_size=32)
    baselines = ngram_baselines(manifest, split=measured["split"])
    _print_quality(measured, baselines)
    click.echo(f"\nwhat it writes after {prompt!r} (temperature 0.7, top-p 0.95):\n\n    {prompt}", nl=False)
    for piece in stream_text(loaded, prompt, max_tokens=120, temperature=0.7, top_k=None, top_p=0.95, seed=0):
        click.echo(piece.replace("\n", "\n    "), nl=False)
    minutes = (time.monotonic() - began) / 60
    click.echo(f"\n\nrun {record.run}: {record.steps:,} steps, {record.tokens:,} tokens; {minutes:.1f} minutes in all")
    _print_next(record.run, record.steps)
    return 0


def _print_quality(measured: dict[str, Any], baselines: list[dict[str, Any]]) -> None:
    """Bits per byte beside byte n-gram models that were trained on the same split."""
    click.echo(f"\nbits per byte on the held-out split {measured['split']!r} ({measured['documents']:,} files)\n")
    rows = [("this model", measured["bits_per_byte"], measured["confidence"]["bits_per_byte"])]
    rows += [(f"order-{row['order']} byte model", row["bits_per_byte"], row["confidence"]) for row in baselines]
    for name, value, (low, high) in rows:
        click.echo(f"    {name:<20} {value:.3f}   95 % interval {low:.3f} to {high:.3f}")


def _print_next(run: str, steps: int) -> None:
    click.echo("\nnext:")
    longer = f"train --resume {run} training.max_steps={2 * steps}"
    for command in (f"runs show {run}", f"generate {run} --prompt 'class '", longer, "ui"):
        click.echo(f"    .venv/bin/glowflow {command}")
