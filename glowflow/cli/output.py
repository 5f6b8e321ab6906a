"""What several commands print: one JSON document on stdout, notes on stderr."""

from __future__ import annotations

import json
import math
from typing import Any

import click

__all__ = ["echo_json", "human_bytes", "human_count", "note"]


def echo_json(document: Any) -> None:
    """Print one JSON document; non-finite numbers become null, since JSON has none."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def note(text: str) -> None:
    """A line for the person, on stderr, so that stdout stays clean."""
    click.echo(text, err=True)


def human_count(value: float) -> str:
    """1,234,567 -> 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:g}"


def human_bytes(value: float) -> str:
    """Bytes with a binary unit."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"
