"""``glowflow train``: from a config file, or on from where a run stopped."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from glowflow.cli.output import echo_json, note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["train"]


@click.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--local", is_flag=True, help="Same loop in this process: no Ray, breakpoint() works.")
@click.option("--resume", metavar="RUN", help="Go on exactly where this run stopped.")
@click.option(
    "--from",
    "weights",
    metavar="MODEL",
    help="Start from the weights of a run, a checkpoint or a file, with their model and tokenizer.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Same as resources.workers=N.")
@click.option("--run", "run_name", metavar="NAME", help="Name of the run (same as tracking.run=NAME).")
@click.option("--json", "as_json", is_flag=True, help="Print run.json on stdout at the end.")
@click.pass_context
def train(
    ctx: click.Context,
    config: str | None,
    overrides: tuple[str, ...],
    local: bool,
    resume: str | None,
    weights: str | None,
    workers: int | None,
    run_name: str | None,
    as_json: bool,
) -> int:
    """Train the model that CONFIG describes; OVERRIDES are key=value, as in training.max_steps=200.

    With --from, CONFIG is optional and says everything but the model.
    """
    from glowflow.orchestration.pipeline import TrainingPipeline

    if (resume is not None or weights is not None) and config is not None and "=" in config:
        overrides, config = (config, *overrides), None
    if resume is not None and weights is not None:
        raise ConfigError(Problem("--from", "cannot be given with --resume, which goes on from the run's own weights"))
    if weights is None and (config is None) == (resume is None):
        raise ConfigError(Problem("CONFIG", "give a config file, or --resume RUN, and not both"))
    given = list(overrides)
    if workers is not None:
        given.append(f"resources.workers={workers}")
    if run_name is not None:
        given.append(f"tracking.run={run_name}")
    verbose = bool((ctx.obj or {}).get("verbose"))
    if weights is not None:
        record = TrainingPipeline.from_weights(weights, config, given, verbose=verbose).fit(local=local)
    elif config is None:
        assert resume is not None
        record = TrainingPipeline.resume(resume, given, verbose=verbose, local=local)
    else:
        record = TrainingPipeline.from_file(config, given, verbose=verbose).fit(local=local)
    if as_json:
        echo_json(record.to_dict())
    else:
        _summary(record.to_dict())
    return {"FINISHED": 0, "KILLED": 130}.get(record.status, 1)


def _summary(record: dict[str, Any]) -> None:
    """Three lines: what came out, how fast, and what to type next."""
    name, final = record["run"], record.get("final") or {}
    measured = ", ".join(
        f"{key} {final[key]:.4g}"
        for key in ("train_loss", "val_loss", "perplexity", "val_bits_per_byte", "val_accuracy", "val_recall_at_1")
        if key in final
    )
    # Elsewhere than in the default storage a name alone would not be found.
    storage = Path(record["config"]["tracking"]["storage"])
    target = shlex.quote(name if storage == Path("runs").absolute() else os.path.relpath(storage / name))
    note(f"{record['status'].lower()} {name}: {record['steps']:,} steps, {record['tokens']:,} tokens; {measured}")
    if record["status"] == "FINISHED":
        note(" | ".join(["next: glowflow eval " + target, *_writing(record, target), "glowflow runs show " + target]))
    elif record["status"] == "KILLED":
        note(f"go on with: glowflow train --resume {target}")


def _writing(record: dict[str, Any], target: str) -> list[str]:
    """The command that lets the model write, where it can."""
    model = record["config"]["model"]
    if model.get("task", "language_modelling") != "language_modelling":
        return []
    media = {"image": "--image FILE.jpg", "audio": "--audio FILE.wav"}
    given = [option for name, option in media.items() if model["arch"] == "multimodal" and model.get(name) is not None]
    return [" ".join(["glowflow generate", target, *(given or ["--prompt 'def '"])])]
