"""``glowflow config``: the JSON Schema for editors, and the reference page."""

from __future__ import annotations

from pathlib import Path

import click

from glowflow.cli.output import echo_json, note

__all__ = ["config"]


@click.group()
def config() -> None:
    """JSON Schema and reference of the config keys."""


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
def schema(file: Path | None) -> None:
    """Write the JSON Schema to FILE (or stdout), so that editors complete and check configs."""
    from glowflow.config.json_schema import json_schema, write_json_schema

    if file is None:
        echo_json(json_schema())
        return
    write_json_schema(file)
    note(f"wrote {file}")


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
def reference(file: Path | None) -> None:
    """Write the reference of all keys (Markdown) to FILE (or stdout)."""
    from glowflow.config.reference import reference_page, write_reference

    if file is None:
        click.echo(reference_page())
        return
    write_reference(file)
    note(f"wrote {file}")


@config.command()
@click.argument("config_file", metavar="CONFIG")
@click.argument("overrides", nargs=-1)
def show(config_file: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved config as YAML."""
    from glowflow.config.loader import load_config, to_yaml

    click.echo(to_yaml(load_config(config_file, overrides)), nl=False)
