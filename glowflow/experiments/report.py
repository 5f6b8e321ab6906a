"""The report of a sweep: the question, the table, the figures, and under them what they were made with.

Everything comes from the journal and the curves, the date too: the same sweep gives the same bytes, wherever it is
reported. No path of the machine stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from glowflow.config.errors import ConfigError, PreflightError, Problem
from glowflow.config.spaces.proxy import Proxy
from glowflow.experiments import views
from glowflow.experiments.labels import command_line, decimals, fixed, plain, relative, short_value
from glowflow.experiments.results import ALPHA, Outcome, Results, read_results
from glowflow.experiments.tables import Cells, group_cells, leaderboard_csv, main_tables, ranking_cells, reason
from glowflow.experiments.winner import FULL_WIDTH_NAME
from glowflow.tracking.files import jsonable

__all__ = ["FORMATS", "markdown", "report_data", "write_report"]

FORMATS = ("md", "png", "html", "csv")
_MOST_ROWS = 30
_MOST_LOST = 10
_ENDINGS = {"RUNNING": "is running", "STOPPED": "was stopped", "FAILED": "failed", "KILLED": "was cut off"}
_CAPTIONS = {
    "intervals": "means over seeds with 95 % intervals",
    "pareto": "Pareto front",
    "slices": "the metric against each parameter",
    "learning_curves": "learning curves",
    "parallel_coordinates": "parallel coordinates",
    "importance": "importance of the parameters; trials that were stopped count with their last value",
}


def write_report(
    sweep_dir: str | Path, out: str | Path | None = None, *, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write report.md, report.html, leaderboard.csv and the figures as PNG.

    Args:
        sweep_dir: the sweep's directory; it may still be running.
        out: where to; default SWEEP/report.
        formats: some of ``md``, ``png``, ``html`` and ``csv``; report.md shows the figures if ``png`` is among them.

    Returns:
        The files, report.md first.

    Raises:
        RunError: it is no sweep.
        ConfigError: an unknown format.
        PreflightError: the place cannot be written.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError([Problem("formats", f"is none of {', '.join(FORMATS)}", name) for name in unknown])
    results = read_results(sweep_dir)
    folder = Path(sweep_dir) / "report" if out is None else Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(results, folder, formats)
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise PreflightError(Problem("--out", rule, str(folder), "choose another directory")) from error


def _write(results: Results, folder: Path, formats: Sequence[str]) -> list[Path]:
    from glowflow.experiments.plots import write_plots

    images = write_plots(results, folder) if "png" in formats else {}
    texts: dict[str, tuple[str, Callable[[], str]]] = {
        "md": ("report.md", lambda: markdown(results, {name: path.name for name, path in images.items()})),
        "html": ("report.html", lambda: _html(results)),
        "csv": ("leaderboard.csv", lambda: leaderboard_csv(results)),
    }
    written = []
    for kind, (name, make) in texts.items():
        if kind in formats:
            written.append(folder / name)
            written[-1].write_text(make(), encoding="utf-8")
    return [*written, *images.values()]


def report_data(sweep_dir: str | Path) -> dict[str, Any]:
    """What the report says, as values that JSON can hold.

    Returns:
        sweep, question, status, why, proxy, metric, mode, max_steps, steps, counts, best, ``trials`` (by rank),
        ``groups`` (metric -> settings over seeds with intervals, tests and verdicts), ``importance`` (metric ->
        importances or the reason for none), ``provenance``.

    Raises:
        RunError: it is no sweep.
    """
    results = read_results(sweep_dir)
    trials = [
        {
            "rank": o.rank,
            "trial": o.trial,
            "label": o.label,
            "point": o.point,
            "seed": o.seed,
            "status": o.status,
            "step": o.step,
            "params": dict(o.params),
            "metrics": dict(o.values),
            "seconds": o.seconds,
            "why": reason(o.why, o.error, results.storage) or None,
        }
        for o in results.outcomes
    ]
    data = {
        "sweep": results.name,
        "question": question(results),
        "status": results.status,
        "why": results.why,
        "proxy": results.about.get("proxy"),
        "metric": list(results.metrics),
        "mode": list(results.modes),
        "max_steps": results.max_steps,
        "steps": results.steps,
        "counts": results.counts,
        "best": results.best,
        "trials": trials,
        "groups": {metric: [group.to_dict() for group in groups] for metric, groups in results.groups.items()},
        "importance": {metric: explanation.to_dict() for metric, explanation in results.importances.items()},
        "provenance": provenance(results),
    }
    return dict(jsonable(data))


def question(results: Results) -> str:
    """What the sweep asks, in words."""
    wants = [f"{'lowest' if mode == 'min' else 'highest'} {name}" for name, mode in _goals(results)]
    goal = " and the ".join(wants)
    if results.space.variants:
        return f"Which of {len(results.space.variants)} variants has the {goal}?"
    keys = list(results.space.keys()) or results.keys
    return f"Which {_listed(keys)} {'gives' if len(keys) == 1 else 'give'} the {goal}?"


def _goals(results: Results) -> list[tuple[str, str]]:
    return list(zip(results.metrics, results.modes, strict=True))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def provenance(results: Results) -> dict[str, str]:
    """Command, versions, device, date, config: with what the numbers were made."""
    about = results.about
    found = {"command": command_line(results.command, results.storage)}
    versions = {str(k): str(v) for k, v in dict(about.get("versions") or {}).items()}
    versions |= {"git": _short_commit(versions["git"])} if "git" in versions else {}
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    found["device"] = relative(plain(str(about.get("device") or "")))
    found["date"] = _date(results)
    found["config"] = f"fingerprint {str(about.get('config_fingerprint') or '')[:12]}"
    return {key: value for key, value in found.items() if value}


def _short_commit(commit: str) -> str:
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def _date(results: Results) -> str:
    if results.started is None:
        return ""
    day = f"{results.started[:16].replace('T', ' ')} UTC"
    if results.ended is None:
        return day
    seconds = (datetime.fromisoformat(results.ended) - datetime.fromisoformat(results.started)).total_seconds()
    return f"{day}, {duration(seconds)}"


def duration(seconds: float) -> str:
    """``45 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def answer(results: Results) -> list[str]:
    """What came out, in one sentence each."""
    lines = [_amount(results)]
    if results.status != "FINISHED":
        why = f": {relative(plain(results.why), results.storage)}" if results.why else ""
        lines.append(f"The sweep {_ENDINGS.get(results.status, results.status.lower())}{why}.")
    if (proxy := Proxy.from_dict(results.about.get("proxy"))) is not None:
        lines.append(f"All of it was {proxy}; the best config at that width is {FULL_WIDTH_NAME}, beside the trials.")
    if results.best is None:
        return [*lines, "No trial has a result."]
    if results.by_seeds:
        return lines + [_verdict_line(results, metric) for metric in results.metrics]
    best = next(o for o in results.outcomes if o.trial == results.best)
    values = ", ".join(f"{m} {fixed(best.values[m], decimals([best.values[m]]))}" for m in results.metrics)
    params = ", ".join(f"{key} {short_value(value, 60)}" for key, value in best.params.items())
    first = "First by the leaderboard" if len(results.metrics) > 1 else "Best"
    return [*lines, f"{first}: trial {best.trial} with {params}: {values} at step {best.step}."]


def _amount(results: Results) -> str:
    full = sum(int(o.params.get("training.max_steps", results.max_steps)) for o in results.outcomes)
    text = f"{views.count_line(results.outcomes)}; {results.steps} training steps"
    if full and results.steps < full:
        text += f", {100 * results.steps / full:.0f} % of the {full} that all of them in full would take"
    return f"{text}."


def _verdict_line(results: Results, metric: str) -> str:
    groups = results.groups[metric]
    best = next((group for group in groups if group.verdict == "best"), None)
    if best is None or best.interval is None:
        return f"{metric}: no setting has a result of a trial that ran to the end."
    mean = best.interval.estimate
    text = f"{metric}: {best.name} is best with a mean of {fixed(mean, decimals([mean]))}"
    for verdict, words in (("not different", "not different from it"), ("different", "different"), ("not tested",) * 2):
        names = [group.name for group in groups if group.verdict == verdict]
        shown = [*names[:8], f"{len(names) - 8} more"] if len(names) > 9 else names
        text += f"; {words}: {', '.join(shown)}" if names else ""
    return f"{text}."


def remarks(results: Results) -> list[str]:
    """What a reader must know of the figures: trials that are missing, importance that could not be had."""
    lost = [o for o in results.outcomes if o.status in ("FAILED", "KILLED")]
    lines = [_lost_line(results, outcome) for outcome in lost[:_MOST_LOST]]
    lines += [f"{len(lost) - _MOST_LOST} more trials were lost."] if len(lost) > _MOST_LOST else []
    copied = [(o.trial, copy) for o in results.outcomes for copy in o.copies]
    if copied:
        steps = [f"{trial} from {copy.get('donor')} at step {copy.get('donor_step')}" for trial, copy in copied]
        shown = [*steps[:_MOST_LOST], f"{len(steps) - _MOST_LOST} more"] if len(steps) > _MOST_LOST else steps
        lines.append(f"Weights were copied: {', '.join(shown)}; parameters are those at the end.")
    for metric, explanation in results.importances.items():
        if explanation.reason is not None:
            lines.append(f"No importance for {metric}: {explanation.reason}.")
        elif metric not in results.telling:
            lines.append(f"No importance for {metric}: {explanation.importances[0].key} alone varies.")
    return lines


def _lost_line(results: Results, outcome: Outcome) -> str:
    why = reason(outcome.why, outcome.error, results.storage)
    return f"Lost: {outcome.trial} ({outcome.status.lower()} at step {outcome.step}{': ' + why if why else ''})."


def _test_note(results: Results, metric: str) -> str:
    tests = sum(group.p_value is not None for group in results.groups[metric])
    return (
        "Intervals: 95 %, Student t over the seeds. Difference: to the best mean, by Welch's t-test; its interval is"
        f" not adjusted, p is, for {tests} comparison{'' if tests == 1 else 's'} (Holm). Different: p < {ALPHA}."
    )


def markdown(results: Results, images: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        images: name of a figure -> its file beside the report.
    """
    parts = [f"# {_md(results.name)}", _md(question(results)), " ".join(_md(line) for line in answer(results))]
    for metric, cells in main_tables(results).items():
        if cells.rows:
            parts.append(_md_table(cells))
        if results.by_seeds:
            parts.append(_md(_test_note(results, metric)))
    parts += [f"![{caption}]({images[name]})" for name, caption in _CAPTIONS.items() if name in images]
    if notes := remarks(results):
        parts.append("\n".join(f"- {_md(line)}" for line in notes))
    facts = provenance(results)
    command = facts.pop("command", "")
    line = [f"Command: `{command}`"] if command else []
    parts.append("; ".join([*line, *(f"{key}: {_md(value)}" for key, value in facts.items())]) + ".")
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """Text in which nothing is Markdown; underscores inside words are none."""
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _md_table(cells: Cells) -> str:
    rows = [cells.headers, ["---:" if right else "---" for right in cells.right], *cells.rows[:_MOST_ROWS]]
    lines = ["| " + " | ".join(cell if i == 1 else _md(cell) for cell in row) + " |" for i, row in enumerate(rows)]
    if len(cells.rows) > _MOST_ROWS:
        lines.append(f"\n{len(cells.rows) - _MOST_ROWS} more rows are in leaderboard.csv.")
    return "\n".join(lines)


def _html(results: Results) -> str:
    from glowflow.experiments.figures_html import panels_of
    from glowflow.experiments.page import html_page

    tables: dict[str, tuple[Cells, Sequence[str | None], str]] = {}
    for metric in results.groups:
        cells = group_cells(results, metric)
        tables[f"{metric} over seeds"] = (cells, [None] * len(cells.rows), _test_note(results, metric))
    trials = [outcome.trial for outcome in results.outcomes]
    under = "A click on a head sorts; a click on a trial shows it in the figures."
    tables["Leaderboard"] = (ranking_cells(results), trials, under)
    return html_page(
        title=results.name,
        lines=[question(results), *answer(results)],
        tables=tables,
        panels=panels_of(results),
        remarks=remarks(results),
        provenance=provenance(results),
    )
