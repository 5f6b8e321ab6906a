"""Where benchmarks are kept: a finished MLflow run each, in the experiment ``benchmarks``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glowflow.tracking.base import Point
from glowflow.tracking.mlflow import MlflowTracker, create_run, default_uri
from glowflow.tracking.request import change_request
from glowflow.tracking.runrecord import RunRecord, create_run_dir, new_run_name, now_iso, this_process

__all__ = ["EXPERIMENT", "FILES", "record_benchmark"]

EXPERIMENT = "benchmarks"
FILES = "benchmark"
"""The folder of a run directory, and of the run's artifacts, that holds tables and figures."""


def record_benchmark(
    document: Mapping[str, Any],
    storage: str | Path,
    *,
    config: Mapping[str, Any],
    values: Sequence[tuple[str, int, float]],
    files: Mapping[str, bytes] | None = None,
    uri: str | None = None,
) -> str:
    """Keep a result as a run; the document itself is RUN/benchmark.json, in a run directory like any other.

    Args:
        document: with ``benchmark``, the name of what was measured, and ``environment``.
        storage: where run directories are.
        config: becomes the run's params.
        values: (metric, step, value).
        files: name -> content, of what goes into the folder `FILES`.
        uri: of the tracker; default: the store of ``storage``.

    Returns:
        The run's name.
    """
    run_dir = create_run_dir(storage, new_run_name(f"bench-{document['benchmark']}"))
    (run_dir / "benchmark.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    record = RunRecord(run_dir.name, config=dict(config), started=now_iso(), process=this_process())
    record.save(run_dir)
    store = default_uri(storage, uri)
    tags = {f"environment.{key}": value for key, value in document["environment"].items()}
    params = {"benchmark": document["benchmark"], **config}
    run_id = create_run(run_dir, name=run_dir.name, config=params, uri=store, experiment=EXPERIMENT, tags=tags)
    if files:
        (run_dir / FILES).mkdir()
        for name, content in files.items():
            (run_dir / FILES / name).write_bytes(content)
        change_request(run_dir, lambda request: replace(request, artifacts={FILES: FILES}))
    tracker = MlflowTracker(store, run_id, run_dir)
    now = int(time.time() * 1000)
    tracker.log_points([Point(name, step, value, now) for name, step, value in values])
    tracker.finish("FINISHED")
    tracker.close()
    record.status, record.ended, record.mlflow_run_id = "FINISHED", now_iso(), run_id
    record.final = {name: value for name, _, value in values}
    record.save(run_dir)
    return run_dir.name
