"""Text tables, and those of what ``queries`` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["cell", "format_run", "format_runs", "table"]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    numbers = (int, float, type(None))
    right = [bool(rows) and all(isinstance(row[i], numbers) for row in rows) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def cell(value: object) -> str:
    """A value as tables show it: ``-`` for none, numbers with four decimals, small and large ones with four digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1e5 or 0 < abs(value) < 0.1 else f"{value:.4f}".rstrip("0").rstrip(".")
    return str(value)


def format_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of ``glowflow runs list``."""
    if not rows:
        return "no runs"
    columns = ["run", "status", "started", "seconds", "steps", "train_loss", "val_loss"]
    return table(columns, [[_short(name, row.get(name)) for name in columns] for row in rows])


def _short(name: str, value: Any) -> Any:
    if name == "started" and isinstance(value, str):
        return value[:19].replace("T", " ")
    return round(value, 1) if name == "seconds" and isinstance(value, float) else value


def format_run(shown: Mapping[str, Any]) -> str:
    """The page of ``glowflow runs show``: one line a fact, nested ones dotted."""
    simple = {key: value for key, value in shown.items() if key not in ("config", "checkpoints", "process")}
    if shown["status"] == "RUNNING" and not shown["alive"]:
        sweep, is_trial, _ = shown["run"].partition("/")
        resume = f"sweep --resume {sweep}" if is_trial else f"train --resume {shown['run']}"
        simple["status"] = f"DEAD: its process is gone; to go on: glowflow {resume}"
    lines: list[tuple[str, object]] = []
    for key, value in simple.items():
        if isinstance(value, Mapping):
            lines.extend((f"{key}.{name}", item) for name, item in value.items())
        else:
            lines.append((key, value))
    lines.extend(("checkpoint", checkpoint) for checkpoint in shown.get("checkpoints", []))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key.ljust(width)}  {cell(value)}" for key, value in lines)
