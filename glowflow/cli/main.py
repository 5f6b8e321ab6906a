"""The ``glowflow`` command: a tree of lazily imported subcommands and one place where errors become exit codes.

Exit codes: 0 done, 1 the run failed or a bug of ours, 2 the user can fix it, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from glowflow.config.errors import GlowFlowError

__all__ = ["cli", "main"]

# name -> (module:attribute, one line of help); the help is here so that `glowflow --help` imports no command.
_COMMANDS = {
    "train": ("glowflow.cli.train:train", "Train a model from a config file, or go on with a run."),
    "sweep": ("glowflow.cli.sweep:sweep", "Search or compare over any config; resume, watch and report sweeps."),
    "plan": ("glowflow.cli.plan:plan", "Show what a config would do: parameters, tokens, memory, kernels."),
    "data": ("glowflow.cli.data:data", "Build, list, inspect and verify data sets."),
    "eval": ("glowflow.cli.evaluate:evaluate", "Measure perplexity and bits per byte, with confidence intervals."),
    "generate": ("glowflow.cli.generate:generate", "Write text with a trained model."),
    "import": ("glowflow.cli.import_:import_model", "Read weights of llama2.c or Hugging Face (Llama, GPT-2)."),
    "export": ("glowflow.cli.export:export", "Write a checkpoint as one file, for Hugging Face, or for llama2.c."),
    "runs": ("glowflow.cli.runs:runs", "List, show, compare and sync runs."),
    "ui": ("glowflow.cli.runs:ui", "Open the MLflow UI on the right store, on loopback."),
    "attention": (
        "glowflow.cli.attention:attention",
        "Which attention kernel is used and why; whether the kernels are right.",
    ),
    "mup": ("glowflow.cli.mup:mup", "Whether hyper-parameters transfer over the width: the coordinate check."),
    "bench": ("glowflow.cli.bench:bench", "Measure speed."),
    "config": ("glowflow.cli.config:config", "JSON Schema and reference of the config keys."),
    "demo": ("glowflow.cli.demo:demo", "Train the quickstart, evaluate it, and show what it writes."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by import path and loads only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="glowflow", prog_name="glowflow")
@click.option("-v", "--verbose", is_flag=True, help="Show the log of GlowFlow, Ray and the libraries.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """GlowFlow: one YAML file becomes a trained, tracked, evaluated language model."""
    ctx.obj = {"verbose": verbose}
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    logging.captureWarnings(True)
    if not verbose:
        logging.getLogger("py.warnings").setLevel(logging.ERROR)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; never returns."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        result: Any = cli.main(
            args=list(args) if args is not None else None, prog_name="glowflow", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        return 2
    except GlowFlowError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
