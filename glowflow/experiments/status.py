"""Where a sweep stands, for a terminal of any width and for a log file: plain lines, no control characters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.space import Space
from glowflow.config.spaces.proxy import Proxy
from glowflow.experiments.journal import best_trial, driver_of
from glowflow.experiments.labels import clip, decimals, fixed, plain, short_params
from glowflow.experiments.tables import reason
from glowflow.experiments.views import STATUS_WORDS
from glowflow.tracking.curves import last_step
from glowflow.tracking.files import jsonable
from glowflow.tracking.spool import METRICS_NAME

if TYPE_CHECKING:
    from glowflow.experiments.journal import SweepState, Trial

__all__ = ["format_status", "live_step", "sweep_json"]

_GAP = "  "
_ROOMY = 120


def format_status(state: SweepState, *, width: int = 100, now: datetime | None = None) -> str:
    """A table with one line a trial in the order of claim, and how far the sweep is.

    Args:
        width: columns of the terminal; no line is longer, as long as there are at least 60.
        now: up to when the time of a running sweep is counted; default: the present.

    Returns:
        Lines of printable ASCII where the names are ASCII; ``*`` marks the best trial so far.
    """
    space = Space.from_dict(state.about["space"])
    lines = _headline(state, space)
    if state.trials:
        lines += ["", *_table(state, space, width)]
    lines += ["", *_summary(state, space, now)]
    return "\n".join(line for text in lines for line in _folded(text, width))


def _headline(state: SweepState, space: Space) -> list[str]:
    goals = ", ".join(f"{name} ({mode})" for name, mode in zip(state.metrics, state.modes, strict=True))
    how = space.searcher.name + ("" if space.scheduler.name == "fifo" else f", {space.scheduler.name}")
    lines = [f"sweep {state.about.get('name')}: {'DEAD' if _abandoned(state) else state.status}; {how}; {goals}"]
    if (proxy := Proxy.from_dict(state.about.get("proxy"))) is not None:
        lines.append(f"proxy: {proxy}")
    if state.why:
        lines.append(f"why: {reason(state.why, None, state.about.get('storage'))}")
    if _abandoned(state):
        lines.append(f"no process drives it; to go on: glowflow sweep --resume {state.about.get('name')}")
    return lines


def _abandoned(state: SweepState) -> bool:
    """Whether a sweep counts as running whose driver is gone, as far as its directory can be seen from here."""
    name, storage = state.about.get("name"), state.about.get("storage")
    if state.status != "RUNNING" or not name or not storage:
        return False
    folder = Path(storage) / str(name)
    return folder.is_dir() and driver_of(folder) is None


def _table(state: SweepState, space: Space, width: int) -> list[str]:
    best = best_trial(state)
    metric, mode = state.metrics[0], state.modes[0]
    trials = list(state.trials.values())
    last, bests = [trial.value(metric) for trial in trials], [_best_value(trial, metric, mode) for trial in trials]
    places = decimals([*last, *bests])
    marks = ["*" if best is not None and trial.id == best.id else " " for trial in trials]
    columns: list[tuple[str, list[str], bool]] = [
        ("  trial", [f"{mark} {trial.id}" for mark, trial in zip(marks, trials, strict=True)], False),
        ("state", [trial.status.lower() for trial in trials], False),
        ("step/max", [f"{live_step(state, trial)}/{_max_steps(state, trial)}" for trial in trials], True),
    ]
    rung = _rung_column(state, space)
    if rung is not None:
        columns.append(rung)
    columns += [
        (metric, [fixed(value, places) for value in last], True),
        ("best so far", [fixed(value, places) for value in bests], True),
    ]
    params = [plain(short_params(trial.params)) for trial in trials]
    if width >= _ROOMY and any(params):
        columns.append(("params", [clip(text, max(20, (width - 90) * 2 // 3)) for text in params], False))
    columns.append(("why", [reason(trial.why, trial.error, state.about.get("storage")) for trial in trials], False))
    return _aligned(columns, width)


def _aligned(columns: Sequence[tuple[str, list[str], bool]], width: int) -> list[str]:
    """Columns as wide as they need; the first gives way to leave the last one room, the last one takes the rest."""
    widths = [max(map(len, [head, *cells])) for head, cells, _ in columns]
    fixed_width = sum(widths[1:-1]) + len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(12, width - fixed_width - min(widths[-1], 16)))
    widths[-1] = min(widths[-1], max(0, width - fixed_width - widths[0]))
    rows = list(zip(*([head, *cells] for head, cells, _ in columns), strict=True))
    lines = []
    for row in rows:
        cells = []
        for text, size, (_, _, right) in zip(row, widths, columns, strict=True):
            shown = clip(text, size) if size > 3 else text[:size]
            cells.append(shown.rjust(size) if right else shown.ljust(size))
        lines.append(_GAP.join(cells).rstrip())
    return [lines[0], _GAP.join("-" * size for size in widths).rstrip(), *lines[1:]]


def _best_value(trial: Trial, metric: str, mode: str) -> float | None:
    found = [metrics[metric] for _, metrics in trial.reports if metric in metrics]
    found += [values[metric] for values in (trial.metrics, trial.best) if metric in values]
    finite = [value for value in found if math.isfinite(value)]
    return (min(finite) if mode == "min" else max(finite)) if finite else None


def live_step(state: SweepState, trial: Trial) -> int:
    """How far a trial is: between its reports, which may be long apart, its own curves know."""
    name, storage = state.about.get("name"), state.about.get("storage")
    if trial.status != "RUNNING" or not name or not storage:
        return trial.step
    return max(trial.step, last_step(Path(storage) / str(name) / trial.id / METRICS_NAME) or 0)


def _max_steps(state: SweepState, trial: Trial) -> int:
    return int(trial.params.get("training.max_steps", state.about.get("max_steps") or 0))


def _rung_column(state: SweepState, space: Space) -> tuple[str, list[str], bool] | None:
    """How many rungs a trial has reached, or from whom it copied weights; None for schedulers without either."""
    scheduler, trials = space.scheduler, state.trials.values()
    if scheduler.name in ("pbt", "pb2"):
        cells = [f"{len(t.lineage)} (from {t.lineage[-1]['donor']})" if t.lineage else "0" for t in trials]
        return "copies", cells, False
    rungs = scheduler.rungs(int(state.about.get("interval") or 0) or 1, int(state.about.get("max_steps") or 0) or 1)
    if not rungs:
        return None
    return "rung", [f"{sum(rung <= trial.step for rung in rungs)}/{len(rungs)}" for trial in trials], True


def _summary(state: SweepState, space: Space, now: datetime | None) -> list[str]:
    counts = Counter(trial.status for trial in state.trials.values())
    planned = _planned(space)
    over = sum(trial.over for trial in state.trials.values())
    parts = [f"{over} of {planned} trials over" if planned else f"{over} trials over"]
    parts += [f"{counts[status]} {word}" for status, word in STATUS_WORDS.items() if counts[status]]
    if planned is not None and planned > len(state.trials):
        parts.append(f"{planned - len(state.trials)} to come")
    lines = [f"{parts[0]}: {', '.join(parts[1:])}" if parts[1:] else parts[0]]
    steps = sum(trial.step for trial in state.trials.values())
    elapsed = _elapsed(state, now)
    lines.append(f"{steps} training steps" + (f" in {elapsed}" if elapsed else ""))
    best = best_trial(state)
    if best is not None:
        values = {metric: best.value(metric) for metric in state.metrics}
        shown = ", ".join(f"{name} {fixed(v, decimals([v]))}" for name, v in values.items())
        params = plain(short_params(best.params))
        lines.append(f"best: {best.id}, {shown} at step {best.step}" + (f" ({params})" if params else ""))
    return lines


def _planned(space: Space) -> int | None:
    points = space.trials if space.trials is not None else space.num_points()
    return None if points is None else points * len(space.seeds)


def _elapsed(state: SweepState, now: datetime | None) -> str:
    if state.started is None:
        return ""
    end = datetime.fromisoformat(state.ended) if state.ended else now or datetime.now(timezone.utc)
    seconds = max(0, round((end - datetime.fromisoformat(state.started)).total_seconds()))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds % 60:02d}s"


def _folded(text: str, width: int) -> list[str]:
    """A line that is too long goes on in the next one, set in."""
    import textwrap

    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def sweep_json(state: SweepState) -> dict[str, Any]:
    """What ``glowflow sweep --json`` and ``sweep status --json`` print.

    Returns:
        sweep, status, why, proxy, metric, mode, mlflow_run_id, ``trials`` (in the order of claim: trial, point, label,
        seed, params, status, step, metrics, best, why, seconds, mlflow_run_id, directory) and ``best``, one of them or
        None.
    """
    trials = {trial.id: _trial_json(trial, state.metrics) for trial in state.trials.values()}
    best = best_trial(state)
    found = {
        "sweep": state.about.get("name"),
        "status": state.status,
        "why": state.why,
        "proxy": state.about.get("proxy"),
        "metric": list(state.metrics),
        "mode": list(state.modes),
        "mlflow_run_id": state.about.get("mlflow_run_id"),
        "trials": list(trials.values()),
        "best": None if best is None else trials[best.id],
    }
    return dict(jsonable(found))


def _trial_json(trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    last = dict(trial.reports[-1][1]) if trial.reports else {}
    return {
        "trial": trial.id,
        "point": trial.point,
        "label": trial.label,
        "seed": trial.seed,
        "params": dict(trial.params),
        "status": trial.status,
        "step": trial.step,
        "metrics": {**last, **trial.metrics, **{name: trial.value(name) for name in names}},
        "best": dict(trial.best),
        "why": trial.why,
        "seconds": trial.seconds,
        "mlflow_run_id": trial.mlflow_run_id,
        "directory": trial.directory,
    }
