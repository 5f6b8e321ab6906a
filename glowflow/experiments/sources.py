"""Where the runs of a comparison come from: run directories, the journals of sweeps, MLflow. All become ``Run``.

Configs are compared as MLflow keeps them, flat and read back from text, so that a directory and a store agree. Curves
are read for the metrics that somebody asks for and no others; MLflow's are, where possible, taken from the tag in
which a run says what its curves came to.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glowflow.config.errors import Problem, RunError
from glowflow.experiments.journal import JOURNAL_NAME, Trial, iter_sweeps, read_journal
from glowflow.tracking.client import flatten
from glowflow.tracking.curves import SUMMARY_TAG, Curve, last_step, parse_summary, read_curves
from glowflow.tracking.reading import MlflowRun, StoreReader, parse_param
from glowflow.tracking.request import KIND_TAG, PARENT_TAG, SWEEP_TAG
from glowflow.tracking.runrecord import RECORD_NAME, RunRecord, display_status, find_run, run_name
from glowflow.tracking.spool import METRICS_NAME

__all__ = ["Found", "Run", "runs_in_mlflow", "runs_in_storage"]

ENDED = ("FINISHED", "STOPPED", "FAILED", "KILLED")


@dataclass
class Run:
    """One run, wherever it is known from.

    Args:
        name: as commands take it: RUN, or SWEEP/TRIAL.
        status: RUNNING, DEAD (its process is gone), FINISHED, STOPPED, FAILED or KILLED.
        source: ``directory`` or ``mlflow``.
        params: its config: dotted key -> value.
        final: metric -> its last value, as far as that is known without reading curves.
        best: what run.json says of the best validation.
        curves: those that were read.
        started_ms: Unix time in milliseconds.
        label, sweep, trial: of a trial.
    """

    name: str
    status: str
    source: str
    params: Mapping[str, Any]
    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    started_ms: int | None = None
    sweep: str | None = None
    trial: str | None = None
    label: str | None = None
    directory: str | None = None
    mlflow_run_id: str | None = None

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of every step; None where they are not known, or not the same (samples of unequal length)."""
        if self.params.get("model.arch") == "multimodal" or self.params.get("data.layout") == "bucketed":
            return None
        batch, context = self.params.get("training.batch_size"), self.params.get("data.context")
        return batch * context if isinstance(batch, int) and isinstance(context, int) else None

    @property
    def seed(self) -> Any:
        return self.params.get("training.seed")

    @property
    def device_hours(self) -> float | None:
        """Hours times workers, each of which has one device."""
        workers = self.params.get("resources.workers")
        return None if self.seconds is None else self.seconds / 3600 * (workers if isinstance(workers, int) else 1)


@dataclass
class Found:
    """Runs, and what the sweeps among them are about.

    Args:
        runs: in the order asked for.
        goals: metric -> ``min`` or ``max``, of the sweeps.
        expanded: whether some of them stand for a sweep or an experiment, which have no order of their own.
        read: reads the curves of these metrics, of these runs.
    """

    runs: list[Run]
    goals: dict[str, str]
    expanded: bool
    read: Callable[[Sequence[Run], Iterable[str], bool], None]


# -- run directories --------------------------------------------------------------------------------------------------


def runs_in_storage(storage: str | Path, names: Sequence[str]) -> Found:
    """Runs and sweeps by name or path.

    Raises:
        RunError: some are unknown; all of them are named.
    """
    found = Found([], {}, False, _read_spools)
    problems: list[Problem] = []
    for name in names:
        try:
            _add(found, Path(storage).expanduser().absolute(), name)
        except RunError as error:
            problems.extend(error.problems)
    if problems:
        raise RunError(problems)
    unique = {run.directory or run.name: run for run in found.runs}
    found.runs = list(unique.values())
    return found


def _add(found: Found, storage: Path, name: str) -> None:
    given = Path(name).expanduser()
    for sweep_dir in (storage / given, given.absolute()):
        if (sweep_dir / JOURNAL_NAME).is_file():
            state = read_journal(sweep_dir)
            found.goals |= dict(zip(state.metrics, state.modes, strict=True))
            found.expanded = True
            found.runs += [_trial(sweep_dir, trial, state.about) for trial in state.trials.values()]
            return
    try:
        run_dir = find_run(storage, name)
    except RunError as error:
        sweeps = difflib.get_close_matches(name, [path.name for path in iter_sweeps(storage)], n=3)
        if not sweeps:
            raise
        hint = "did you mean the sweep " + " or ".join(map(repr, sweeps)) + "?"
        raise RunError(Problem("run", "is not known", name, hint)) from error
    found.runs.append(_trial_or_run(run_dir))


def _trial_or_run(run_dir: Path) -> Run:
    """A run by its directory; of a trial the journal knows more than run.json."""
    if (run_dir.parent / JOURNAL_NAME).is_file():
        state = read_journal(run_dir.parent)
        if run_dir.name in state.trials:
            return _trial(run_dir.parent, state.trials[run_dir.name], state.about)
    return _run(run_dir)


def _run(run_dir: Path) -> Run:
    record = RunRecord.load(run_dir)
    status, path = display_status(record, run_dir), run_dir / METRICS_NAME
    ended = status in ("FINISHED", "STOPPED")
    run = Run(
        name=run_name(run_dir),
        status=status,
        source="directory",
        params=_params(record.config),
        final=_numbers(record.final),
        best=_numbers(record.best),
        steps=record.steps if ended else max(last_step(path) or 0, record.steps),
        seconds=record.seconds,
        tokens_per_second=record.tokens_per_second,
        started_ms=record.started_ms(),
        directory=str(run_dir),
        mlflow_run_id=record.mlflow_run_id,
    )
    run.tokens = record.tokens or _times(run.steps, run.tokens_per_step)
    return run


def _trial(sweep_dir: Path, trial: Trial, about: Mapping[str, Any]) -> Run:
    """A trial: how it ended from the journal, the rest from its run directory, if it got that far."""
    run_dir = sweep_dir / (trial.directory or trial.id)
    if (run_dir / RECORD_NAME).is_file():
        run = _run(run_dir)
    else:
        params = {**_params(about.get("config") or {}), **trial.params, "training.seed": trial.seed}
        run = Run(f"{sweep_dir.name}/{trial.id}", trial.status, "directory", params, steps=trial.step)
        run.directory = str(run_dir) if run_dir.is_dir() else None
        run.tokens = _times(run.steps, run.tokens_per_step)
    run.best = run.best or dict(trial.best)
    if trial.status in ENDED:
        run.status = trial.status
        run.final = {**run.final, **trial.metrics}
    run.sweep, run.trial, run.label = sweep_dir.name, trial.id, trial.label
    run.mlflow_run_id = run.mlflow_run_id or trial.mlflow_run_id
    run.seconds = trial.seconds if run.seconds is None else run.seconds
    return run


def _read_spools(runs: Sequence[Run], names: Iterable[str], whole: bool) -> None:
    names = set(names)
    for run in runs:
        lacking = names - run.curves.keys()
        if run.directory is not None and lacking:
            run.curves |= read_curves(Path(run.directory) / METRICS_NAME, lacking)


def _params(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: parse_param(text) for key, text in flatten(config).items()}


def _numbers(table: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in table.items() if value is not None}


def _times(count: int | None, each: int | None) -> int | None:
    return None if count is None or each is None else count * each


# -- MLflow -----------------------------------------------------------------------------------------------------------


def runs_in_mlflow(store: StoreReader, experiment: str | None, names: Sequence[str]) -> Found:
    """Runs by their MLflow name or id, sweeps by the name of their parent run; without names every run.

    Raises:
        RunError: some are unknown; all of them are named.
    """
    rows = store.runs(experiment)
    above = {row.tags.get(PARENT_TAG) for row in rows}
    parents = {row.run_id: row for row in rows if row.tags.get(KIND_TAG) == "sweep" or row.run_id in above}
    chosen = [row for row in rows if row.run_id not in parents]
    if names:
        chosen = _named(chosen, {row.run_id: row.name for row in parents.values()}, names)
    by_id = {row.run_id: row for row in chosen}
    summaries = {row.run_id: parse_summary(row.tags.get(SUMMARY_TAG)) for row in chosen if row.status in ENDED}

    def read(runs: Sequence[Run], metrics: Iterable[str], whole: bool) -> None:
        _read_histories(store, runs, set(metrics), whole, summaries)

    expanded = len(names) != len(by_id)
    return Found([_mlflow_run(row) for row in by_id.values()], {}, expanded, read)


def _named(rows: Sequence[MlflowRun], parents: Mapping[str, str], names: Sequence[str]) -> list[MlflowRun]:
    chosen: list[MlflowRun] = []
    problems: list[Problem] = []
    known = sorted({row.name for row in rows} | set(parents.values()))
    for name in names:
        ids = {run_id for run_id, parent in parents.items() if name in (run_id, parent)}
        found = [row for row in rows if name in (row.run_id, row.name) or row.tags.get(PARENT_TAG) in ids]
        if not found:
            close = difflib.get_close_matches(name, known, n=3)
            hint = "did you mean " + " or ".join(map(repr, close)) + "?" if close else f"{len(rows)} runs are there"
            problems.append(Problem("run", "is not in MLflow", name, hint))
        chosen += found
    if problems:
        raise RunError(problems)
    return chosen


def _mlflow_run(row: MlflowRun) -> Run:
    seconds = (row.ended_ms - row.started_ms) / 1000 if row.ended_ms and row.started_ms else None
    tokens = row.metrics.get("tokens")
    return Run(
        name=row.name,
        status=row.status,
        source="mlflow",
        params=row.params,
        final={name: value for name, value in row.metrics.items() if not name.startswith("system/")},
        steps=row.steps,
        tokens=None if tokens is None else round(tokens),
        seconds=seconds,
        tokens_per_second=row.metrics.get("tokens_per_second"),
        started_ms=row.started_ms,
        sweep=row.tags.get(SWEEP_TAG),
        trial=row.tags.get("glowflow.sweep.trial"),
        label=row.tags.get("glowflow.sweep.label"),
        mlflow_run_id=row.run_id,
    )


def _read_histories(
    store: StoreReader,
    runs: Sequence[Run],
    metrics: set[str],
    whole: bool,
    summaries: Mapping[str, Mapping[str, Curve]],
) -> None:
    wanted: list[tuple[str, str]] = []
    by_id = {str(run.mlflow_run_id): run for run in runs}
    for run_id, run in by_id.items():
        for metric in sorted(metrics & run.final.keys()):
            known = run.curves.get(metric) or summaries.get(run_id, {}).get(metric)
            if known is not None and (known.whole or not whole):
                run.curves[metric] = known
            else:
                wanted.append((run_id, metric))
    for (run_id, metric), curve in store.histories(wanted).items():
        by_id[run_id].curves[metric] = curve
