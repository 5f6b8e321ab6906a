"""``glowflow export``: a checkpoint becomes one file that holds weights, config and tokenizer."""

from __future__ import annotations

from pathlib import Path

import click

from glowflow.cli.output import note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["export"]


@click.command()
@click.argument("checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
def export(checkpoint: str, file: Path, storage: str) -> None:
    """Write CHECKPOINT (a run or a checkpoint directory) to FILE (.pt or .safetensors)."""
    from glowflow.evaluation.load import export_target

    if file.suffix not in (".pt", ".safetensors"):
        raise ConfigError(Problem("FILE", "must end in .pt or .safetensors", str(file)))
    export_target(checkpoint, storage, file)
    note(f"wrote {file}")
