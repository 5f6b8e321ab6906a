"""The result of ``glowflow bench attention`` as files, and as an MLflow run whose curves go over the length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from glowflow.benchmark.attention_results import left_out, table_rows
from glowflow.config.errors import ConfigError, Problem
from glowflow.experiments.plots_of_attention import attention_costs
from glowflow.orchestration.bench_record import record_benchmark
from glowflow.tracking.tables import table

__all__ = ["attention_files", "attention_table", "read_document", "record_attention"]

_NAMES = {
    "ms": "ms",
    "tflops": "tflops",
    "speed_relative_to_dense": "speed_relative_to_dense",
    "peak_bytes": "peak_mib",
}


def attention_table(document: Mapping[str, Any]) -> str:
    """What a person reads: the times, how they grow, and what was not measured and why."""
    headers, cells = table_rows(document["rows"])
    parts = [table(headers, cells)]
    grown = [
        [one["pass"], one["kind"], one["backend"], f"{one['from']} to {one['to']}", one["exponent"], one["spread"]]
        for one in document["growth"]
    ]
    if grown:
        heads = ["pass", "kind", "backend", "lengths", "time grows as length to the", "largest deviation from median"]
        rounded = [[*row[:4], *(round(value, 2) for value in row[4:])] for row in grown]
        parts.append(table(heads, rounded))
    missing = left_out(document["rows"])
    if missing:
        parts.append("\n".join(["not measured:", *(f"  {line}" for line in missing)]))
    for device, length in document.get("dense_up_to", {}).items():
        parts.append(
            f"dense_up_to on {device}: {length}, the longest that trains less than 1.1 times as fast with the window"
        )
    return "\n\n".join(parts)


def attention_files(document: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content: the document, the table, and the figure where there is something to draw."""
    files = {
        "attention.json": (json.dumps(document, indent=2) + "\n").encode(),
        "attention.txt": (attention_table(document) + "\n").encode(),
    }
    if any(row["ms"] is not None for row in document["rows"]):
        with TemporaryDirectory(prefix="glowflow-bench-") as folder:
            files["attention.png"] = attention_costs(document, Path(folder) / "attention.png").read_bytes()
    return files


def record_attention(document: Mapping[str, Any], storage: str | Path, files: Mapping[str, bytes]) -> str:
    """Keep a result, with its files, as a run in the experiment ``benchmarks``; returns the run's name."""
    values = [
        (f"{row['kind']}.{row['backend']}/{row['pass']}_{name}", row["length"], _scaled(key, row[key]))
        for row in document["rows"]
        for key, name in _NAMES.items()
        if row["ms"] is not None and row[key] is not None
    ]
    return record_benchmark(document, storage, config=document["grid"], values=values, files=files)


def _scaled(key: str, value: float) -> float:
    return value / 2**20 if key == "peak_bytes" else float(value)


def read_document(path: str | Path) -> dict[str, Any]:
    """A document that was written before, perhaps on another machine.

    Raises:
        ConfigError: the file cannot be read, or is not one.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--read", f"cannot be read: {error}", str(path))) from None
    if not isinstance(document, dict) or document.get("benchmark") != "attention":
        rule = "must be what `glowflow bench attention --json` wrote"
        raise ConfigError(Problem("--read", rule, str(path)))
    return document
