"""Runs side by side: the config keys that differ, what each metric came to, what it cost, and what seeds say.

``compare`` gives plain values for ``--json``; ``compare_formats`` makes text, Markdown, CSV and HTML of them. Runs with
equal configs but for the seed form a group; groups are told apart by Welch's test, corrected for their number.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glowflow.config.errors import ConfigError, Problem, RunError
from glowflow.experiments.compare_formats import FORMATS, to_csv, to_html, to_markdown, to_text
from glowflow.experiments.filters import Condition, parse_conditions, unknown_keys
from glowflow.experiments.sources import Found, Run, runs_in_mlflow, runs_in_storage
from glowflow.metrics.comparison import holm, mean_interval, welch
from glowflow.tracking.base import Point
from glowflow.tracking.client import default_uri
from glowflow.tracking.curves import Curve
from glowflow.tracking.reading import StoreReader

__all__ = ["FORMATS", "compare", "to_csv", "to_html", "to_markdown", "to_text"]

_SEED = "training.seed"
# A run's name and place are no property of what it computes.
_PLACES = ("tracking.run", "tracking.storage", "tracking.uri", "tracking.experiment", "tracking.backend")
_MORE_IS_BETTER = ("tokens_per_second", "mfu", "goodput", "accuracy")
_ROW_KEYS = ("status", "source", "sweep", "label", "seed")


def compare(
    storage: str | Path,
    names: Sequence[str],
    *,
    uri: str | None = None,
    experiment: str | None = None,
    filters: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    at_step: int | None = None,
    at_tokens: float | None = None,
    at_time: float | None = None,
    by: str | Sequence[str] | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """What differs between runs, and what each arrived at.

    Args:
        storage: directory of the run directories.
        names: runs (names or paths) and sweeps, which stand for all their trials.
        uri, experiment: with one of them the runs are taken straight from MLflow, without names all there are.
        filters: conditions on config keys, metrics and status that must all hold, such as ``training.lr>1e-3``.
        metrics: to show, with ``:max`` where more is better; default: the sweeps' own, else the monitored one.
        at_step, at_tokens, at_time: also the value at this step, number of tokens, or second since the start.
        by: group by these config keys (or label, sweep, status) instead of by everything but the seed.
        level: of the intervals; differences are tested at 1 - level.

    Returns:
        Columns, one value per run: ``runs``, ``status``, ``config`` (keys that differ), ``metrics`` (last values),
        ``best`` (of run.json), ``tokens_per_second``, ``last_step``. Then ``metric`` and ``mode`` (what is shown, the
        first decides), ``at``, ``level``, ``rows`` (one run each, best first where a sweep or experiment was asked
        for), ``groups`` and ``pairwise`` (each group against the best; empty where no runs share a config).

    Raises:
        RunError: a run is unknown; all unknown ones are named.
        ConfigError: a condition, metric or key makes no sense.
    """
    conditions = parse_conditions(filters)
    at = _check_at(at_step=at_step, at_tokens=at_tokens, at_time=at_time)
    found = _find(storage, names, uri, experiment)
    runs = _filtered(found, conditions)
    goals = _goals(found, runs, metrics)
    found.read(runs, goals, at is not None)
    _check_metrics(goals, runs, metrics is not None)
    measured = [{name: _measure(run, name, mode, at) for name, mode in goals.items()} for run in runs]
    order = _order(runs, measured, goals) if found.expanded else list(range(len(runs)))
    return _document([runs[i] for i in order], [measured[i] for i in order], goals, at, by, level)


def _find(storage: str | Path, names: Sequence[str], uri: str | None, experiment: str | None) -> Found:
    if uri is not None or experiment is not None:
        found = runs_in_mlflow(StoreReader(default_uri(storage, uri)), experiment, names)
    elif names:
        found = runs_in_storage(storage, names)
    else:
        raise ConfigError(Problem("run", "is missing", hint="name runs or a sweep, or give --experiment"))
    if not found.runs:
        raise RunError(Problem("run", "there is none to compare", hint="`glowflow runs list` shows what there is"))
    return found


def _check_at(**given: float | None) -> tuple[str, float] | None:
    chosen = [(name.removeprefix("at_"), value) for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        names = ", ".join(f"--at-{name}" for name, _ in chosen)
        raise ConfigError(Problem(names, "only one of them can be given"))
    return chosen[0] if chosen else None


def _filtered(found: Found, conditions: Sequence[Condition]) -> list[Run]:
    """The runs for which all conditions hold; only metrics that no record holds are read from the curves."""
    if not conditions:
        return found.runs
    keys = {condition.key for condition in conditions}
    unread = {key for key in keys if not any(key in _values(run) for run in found.runs)}
    found.read(found.runs, unread, False)
    problems = unknown_keys(conditions, {key for run in found.runs for key in _values(run)})
    if problems:
        raise ConfigError(problems)
    left = [run for run in found.runs if all(condition.holds(_values(run)) for condition in conditions)]
    if not left:
        rule = f"no run of {len(found.runs)} meets " + " and ".join(map(str, conditions))
        raise ConfigError(Problem("filter", rule))
    return left


def _values(run: Run) -> dict[str, Any]:
    """All that a condition can name."""
    measured = {name: curve.last.value for name, curve in run.curves.items() if curve.last is not None}
    return {**{key: _attribute(run, key) for key in _ROW_KEYS}, **run.params, **measured, **run.final}


def _attribute(run: Run, key: str) -> Any:
    return getattr(run, key) if key in _ROW_KEYS else run.params.get(key)


# -- metrics ----------------------------------------------------------------------------------------------------------


def _goals(found: Found, runs: Sequence[Run], metrics: Sequence[str] | None) -> dict[str, str]:
    """Metric -> min or max, the deciding one first."""
    if not metrics:
        return found.goals or {_monitored(runs): _monitor_mode(runs)}
    goals: dict[str, str] = {}
    for text in metrics:
        name, _, mode = text.partition(":")
        if mode not in ("", "min", "max"):
            raise ConfigError(Problem("metric", "must be NAME, NAME:min or NAME:max", text))
        more = name in _MORE_IS_BETTER or "accuracy" in name
        goals[name] = mode or found.goals.get(name) or ("max" if more else "min")
    return goals


def _monitored(runs: Sequence[Run]) -> str:
    """The metric that the configs monitor, if it was measured; else a loss."""
    monitored = runs[0].params.get("training.monitor_metrics") if runs else None
    named = list(monitored) if isinstance(monitored, list) else []
    candidates = [*named, "val_loss", "train_loss"]
    return next((name for name in candidates if any(name in run.final for run in runs)), "train_loss")


def _monitor_mode(runs: Sequence[Run]) -> str:
    return "max" if runs and runs[0].params.get("training.monitor_mode") == "max" else "min"


def _check_metrics(goals: Mapping[str, str], runs: Sequence[Run], asked: bool) -> None:
    known = sorted({name for run in runs for name in run.final})
    problems = []
    for name in goals if asked else ():
        if not any(name in run.final or run.curves.get(name, _EMPTY).points for run in runs):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            problems.append(Problem("metric", "was measured in none of these runs", name, hint))
    if problems:
        raise ConfigError(problems)


_EMPTY = Curve([])


def _measure(run: Run, name: str, mode: str, at: tuple[str, float] | None) -> dict[str, Any]:
    """One metric of one run: last, last_step, best, best_step, and at, at_step where they were asked for."""
    curve = run.curves.get(name, _EMPTY)
    last, best = curve.last, curve.best(mode)
    entry: dict[str, Any] = {
        "last": run.final.get(name) if last is None else last.value,
        "last_step": run.steps if last is None else last.step,
        "best": run.best.get(name) if best is None else best.value,
        "best_step": run.best.get("step") if best is None else best.step,
    }
    if at is not None:
        point = _point_at(run, curve, *at)
        entry |= {"at": None if point is None else point.value, "at_step": None if point is None else point.step}
    return entry


def _point_at(run: Run, curve: Curve, unit: str, amount: float) -> Point | None:
    """The last measurement up to there; None for a run that did not get that far."""
    last = curve.last
    if last is None:
        return None
    if unit == "time":
        if run.started_ms is None:
            return None
        until = run.started_ms + 1000 * amount
        over = run.seconds is not None and run.seconds >= amount
        return curve.at(timestamp_ms=until) if over or last.timestamp_ms >= until else None
    if unit == "tokens":
        if run.tokens_per_step is None:
            return None
        amount = amount / run.tokens_per_step
    return curve.at(step=amount) if max(run.steps or 0, last.step) >= amount else None


def _order(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]], goals: Mapping[str, str]) -> list[int]:
    """Best first by the first metric: runs that trained to their end, then the others."""
    name, mode = next(iter(goals.items()))
    key = "at" if measured and "at" in measured[0][name] else "last"

    def rank(index: int) -> tuple[int, float, int]:
        value = measured[index][name][key]
        missing = value is None or not math.isfinite(value)
        group = 2 if missing else int(key == "last" and runs[index].status != "FINISHED")
        return (group, 0.0 if missing else (-value if mode == "max" else value), index)

    return sorted(range(len(runs)), key=rank)


# -- the document -----------------------------------------------------------------------------------------------------


def _document(
    runs: Sequence[Run],
    measured: Sequence[Mapping[str, Any]],
    goals: Mapping[str, str],
    at: tuple[str, float] | None,
    by: str | Sequence[str] | None,
    level: float,
) -> dict[str, Any]:
    config = _differing(runs)
    rows = [_row(run, entry, config) for run, entry in zip(runs, measured, strict=True)]
    groups = _groups(runs, measured, goals, config, _keys(by), level, at is not None)
    return {
        "runs": [run.name for run in runs],
        "status": [run.status for run in runs],
        "config": config,
        "metrics": _columns([run.final for run in runs]),
        "best": _columns([run.best for run in runs]),
        "tokens_per_second": [run.tokens_per_second for run in runs],
        "last_step": [run.steps for run in runs],
        "metric": list(goals),
        "mode": list(goals.values()),
        "at": None if at is None else {at[0]: at[1]},
        "level": level,
        "rows": rows,
        "groups": groups,
        "pairwise": _pairwise(groups, next(iter(goals.values())), level),
    }


def _row(run: Run, measured: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {
        "run": run.name,
        "status": run.status,
        "sweep": run.sweep,
        "trial": run.trial,
        "label": run.label,
        "seed": run.seed,
        "params": {key: run.params.get(key) for key in keys},
        "metrics": dict(measured),
        "steps": run.steps,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "device_hours": run.device_hours,
        "tokens_per_second": run.tokens_per_second,
        "source": run.source,
        "directory": run.directory,
        "mlflow_run_id": run.mlflow_run_id,
    }


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config keys whose values are not all equal: key -> one value per run."""
    columns = _columns([{k: v for k, v in run.params.items() if k not in _PLACES} for run in runs])
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Mappings side by side: key -> one value per mapping, None where it lacks the key."""
    keys = sorted({key for row in rows for key in row})
    return {key: [row.get(key) for row in rows] for key in keys}


# -- groups -----------------------------------------------------------------------------------------------------------


def _keys(by: str | Sequence[str] | None) -> list[str]:
    return [by] if isinstance(by, str) else list(by or ())


def _groups(
    runs: Sequence[Run],
    measured: Sequence[Mapping[str, Any]],
    goals: Mapping[str, str],
    config: Mapping[str, Any],
    by: Sequence[str],
    level: float,
    at: bool,
) -> list[dict[str, Any]]:
    """Runs that share label and all keys but the seed (or share the keys ``by``), best mean first."""
    _check_by(by, runs)
    keys = list(by) or [key for key in config if key != _SEED]
    members: dict[tuple[str, ...], list[int]] = {}
    for index, run in enumerate(runs):
        shared = [repr(_attribute(run, key)) for key in keys]
        members.setdefault((*shared, "" if by else str(run.label)), []).append(index)
    if not by and len(members) == len(runs) and not any(run.label for run in runs):
        return []
    name, mode = next(iter(goals.items()))
    value = "at" if at else "last"
    groups = []
    for indices in members.values():
        # Runs that broke off have their last value at another step: they count where a common point was asked for.
        counted = [measured[i][name][value] for i in indices if at or runs[i].status == "FINISHED"]
        first = runs[indices[0]]
        about: dict[str, Any] = {
            "group": None if by else first.label,
            "params": {key: _attribute(first, key) for key in keys},
        }
        about |= {"runs": [runs[i].name for i in indices], "metric": name}
        groups.append(about | _statistics(counted, len(indices), level))
    _name(groups, every_key=bool(by))
    sign = -1 if mode == "max" else 1
    return sorted(groups, key=lambda group: math.inf if _bad(group["mean"]) else sign * group["mean"])


def _statistics(counted: Sequence[float | None], size: int, level: float) -> dict[str, Any]:
    values = [value for value in counted if value is not None and math.isfinite(value)]
    interval = mean_interval(values, level) if values else None
    return {
        "n": len(values),
        "left_out": size - len(values),
        "values": values,
        "mean": None if interval is None else interval.estimate,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
    }


def _name(groups: Sequence[dict[str, Any]], *, every_key: bool) -> None:
    """The label where it is the only one of its kind; else also the keys that differ between groups."""
    params = _columns([group["params"] for group in groups])
    differ = [key for key in groups[0]["params"] if every_key or any(v != params[key][0] for v in params[key])]
    labels = [group["group"] for group in groups]
    short = [", ".join(f"{key}={_short(group['params'][key])}" for key in differ) or "all" for group in groups]
    exact = [", ".join(f"{key}={group['params'][key]}" for key in differ) or "all" for group in groups]
    for group, label, brief, full in zip(groups, labels, short, exact, strict=True):
        text = brief if short.count(brief) == 1 else full
        group["group"] = text if label is None else label if labels.count(label) == 1 else f"{label}: {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_by(by: Iterable[str], runs: Sequence[Run]) -> None:
    known = sorted({*_ROW_KEYS, *(key for run in runs for key in run.params)})
    problems = []
    for key in by:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"a config key or one of {', '.join(_ROW_KEYS)}"
            problems.append(Problem("by", "is a key that no run has", key, hint))
    if problems:
        raise ConfigError(problems)


def _pairwise(groups: Sequence[Mapping[str, Any]], mode: str, level: float) -> list[dict[str, Any]]:
    """Each group against the best by Welch's test; p values adjusted for all of them at once (Holm)."""
    tested = [group for group in groups if group["n"] and not _bad(group["mean"])]
    if len(tested) < 2:
        return []
    best, others = tested[0], tested[1:]
    tests = [welch(group["values"], best["values"], level) for group in others]
    adjusted = holm([test.p_value for test in tests])
    pairs = []
    for group, test, p_value in zip(others, tests, adjusted, strict=True):
        untested = math.isnan(test.p_value)
        verdict = "not tested" if untested else "different" if p_value < 1 - level else "not different"
        entry = {"group": group["group"], "best": best["group"], **test.to_dict(), "p_adjusted": p_value}
        pairs.append(entry | {"verdict": verdict})
    return pairs


def _bad(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
