"""Runners for ``glowflow bench train``: the bare loop, ``--local`` and Ray Train with one worker, in alternation.

The benchmark room says what a measurement is; here are the runners that need Ray.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from glowflow.benchmark.measure import Measurement, alternate, summarise
from glowflow.benchmark.train import bare_loop, report
from glowflow.config.loader import apply_overrides, load_config, to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.orchestration.bench_record import record_benchmark
from glowflow.orchestration.pipeline import TrainingPipeline
from glowflow.tracking.spool import curves

__all__ = ["bench_train", "record_train"]

_LOG_INTERVAL = 5


def bench_train(
    source: str | Path,
    overrides: list[str],
    *,
    steps: int,
    warmup: int,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure one config three ways with one worker.

    Args:
        source: config file. overrides: key=value.
        steps: steps that are timed per round and variant. warmup: steps before them.
        rounds: how often the variants take turns.
        progress: told what is being measured.

    Returns:
        JSON-able: per variant step time, tokens/s, speed relative to the bare loop, data-wait share, seconds to the
        first step; plus the bare loop's utilisation.
    """
    config = load_config(source, [*overrides, "resources.workers=1"])
    with tempfile.TemporaryDirectory(prefix="glowflow-bench-") as scratch:
        config = _measured_config(config, steps + warmup, scratch)
        sized = _with_vocabulary(config)
        runners: dict[str, Callable[[], Measurement]] = {
            "bare": partial(bare_loop, sized, steps, warmup),
            "local": partial(_run_pipeline, config, True, warmup),
            "ray": partial(_run_pipeline, config, False, warmup),
        }
        results = alternate(runners, rounds, progress)
    document = report(sized, results["bare"][0])
    document["variants"] = summarise(results, baseline="bare")
    document |= {"config": to_dict(config), "steps": steps, "warmup": warmup, "rounds": rounds}
    return document


def _measured_config(config: GlowFlowConfig, steps: int, scratch: str) -> GlowFlowConfig:
    """The config with nothing in it that interrupts the steady state."""
    from glowflow.training.seeds import choose_threads

    threads = config.training.threads or choose_threads(None, None, 1)[0]
    return apply_overrides(
        config,
        {
            "training.max_steps": steps,
            "training.checkpoint_interval": steps,
            "training.val_interval": steps,
            "training.val_batches": 1,
            "training.log_interval": _LOG_INTERVAL,
            "training.threads": threads,
            "tracking.storage": scratch,
            "tracking.run": None,
            "tracking.backend": "jsonl",
            "tracking.system_metrics": False,
        },
    )


def _with_vocabulary(config: GlowFlowConfig) -> GlowFlowConfig:
    """Build the data beforehand, so that its time is not measured, and size the model for the bare loop."""
    from glowflow.core.model import GlowFlowModel
    from glowflow.data.prepare import ensure_built

    manifest = ensure_built(config.data, use_ray=False)[0][0]
    return GlowFlowModel(config, {"vocab_size": manifest.tokenizer().vocab_size}).config


def _run_pipeline(config: GlowFlowConfig, local: bool, warmup: int) -> Measurement:
    """One run of the real thing; its step times are what it logged itself."""
    record = TrainingPipeline(config).fit(local=local, progress=False)
    run_dir = Path(record.config["tracking"]["storage"]) / record.run
    logged = curves(run_dir / "metrics.jsonl")
    steady = [step for step in logged["step_time_ms"] if step > warmup]
    waits = [logged["data_wait_share"][step] for step in steady]
    return Measurement(
        step_ms=[logged["step_time_ms"][step] for step in steady],
        tokens_per_step=_tokens_per_step(config, logged["tokens"]),
        data_wait_share=sum(waits) / len(waits),
        seconds_to_first_step=_seconds_to_first_step(run_dir),
        details={"run": record.run, "threads": config.training.threads},
    )


def _tokens_per_step(config: GlowFlowConfig, tokens: Mapping[int, float]) -> int:
    """Of sequences of one length; of samples of unequal length the mean over the run."""
    if config.layout != "bucketed":
        return config.training.batch_size * config.data.context
    last = max(tokens)
    return round(tokens[last] / last)


def _seconds_to_first_step(run_dir: Path) -> float:
    """From the creation of the run to the first logged step."""
    from datetime import datetime

    started = datetime.fromisoformat(json.loads((run_dir / "run.json").read_text())["started"]).timestamp()
    with (run_dir / "metrics.jsonl").open() as lines:
        first = json.loads(next(lines))
    return float(first["timestamp_ms"]) / 1000 - started


def record_train(document: dict[str, Any], storage: str | Path) -> str:
    """Keep the result of `bench_train` as an MLflow run; returns its name."""
    values = [(name, 0, value) for name, value in _metrics(document)]
    return record_benchmark(document, storage, config=document["config"], values=values)


def _metrics(document: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of every variant as metrics: ``ray/step_ms``."""
    shown = ("step_ms", "tokens_per_second", "speed_relative_to_bare", "data_wait_share", "seconds_to_first_step")
    rows = document["variants"].items()
    return [(f"{name}/{key}", float(row[key])) for name, row in rows for key in shown if row[key] is not None]
