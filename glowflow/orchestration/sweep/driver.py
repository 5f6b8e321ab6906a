"""Runs a sweep: checks, Ray, data, journal, MLflow family, Tune; then the report.

Tune runs in a thread, so that Ctrl-C and the display belong to this one. The journal is written as things happen;
after a crash ``resume_sweep`` goes on from it, whatever became of Tune's files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import GlowFlowError, Problem, RunError
from glowflow.config.loader import apply_overrides, config_fingerprint, to_dict, to_yaml
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space, check_space, load_space
from glowflow.config.spaces.proxy import Proxy
from glowflow.experiments.journal import (
    Journal,
    SweepState,
    best_trial,
    find_sweep,
    lock_sweep,
    read_journal,
)
from glowflow.experiments.searchers import make_strategy, replay, warm_start
from glowflow.experiments.status import live_step
from glowflow.experiments.winner import FULL_WIDTH_NAME, config_of, write_full_width
from glowflow.orchestration import cluster
from glowflow.orchestration.interrupts import Interrupts
from glowflow.orchestration.progress import Progress, make_progress
from glowflow.orchestration.rundir import CONFIG_NAME
from glowflow.orchestration.sweep.book import SPECS, STOP_FILE, SweepBook
from glowflow.orchestration.sweep.prepare import (
    Prepared,
    check_same,
    has_work_left,
    history_for,
    settle_here,
    settle_on_cluster,
)
from glowflow.orchestration.sweep.settings import SweepSettings
from glowflow.orchestration.sweep.stop import StopRule
from glowflow.tracking.client import default_uri
from glowflow.tracking.runrecord import now_iso
from glowflow.tracking.versions import versions

if TYPE_CHECKING:
    from glowflow.tracking.family import SweepTracking

__all__ = ["resume_sweep", "run_sweep"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_TUNE_FOLDER = ".tune"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_sweep(
    prepared: Prepared,
    *,
    warm: Sequence[str] = (),
    command: Sequence[str] = (),
    verbose: bool = False,
    progress: Any = None,
) -> SweepState:
    """Run a new sweep to its end.

    Args:
        prepared: from ``prepare_sweep``.
        warm: earlier sweeps, or ``mlflow:EXPERIMENT``, whose results the searcher begins with.
        command: what the user typed, for the report.

    Returns:
        What the journal holds at the end.

    Raises:
        GlowFlowError: it could not start, or broke off.
    """
    display = make_progress(progress)
    for warning in prepared.warnings:
        display.note(f"warning: {warning}")
    history = [row for source in warm for row in history_for(source, prepared)]
    if warm:
        used = warm_start(make_strategy(prepared.space, prepared.config), history)
        display.note(f"warm start: {used} of {len(history)} earlier results are usable")
    about = {**_about(prepared, command, resumed=0), "history": history}
    return _drive(prepared, SweepState(about=about), about, display, verbose)


def resume_sweep(
    sweep: str,
    *,
    storage: str | Path = "runs",
    config: str | None = None,
    space: str | None = None,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    proxy: str | None = None,
    verbose: bool = False,
    progress: Any = None,
) -> SweepState:
    """Go on with a sweep: what is done stays done, what was under way goes on from its newest checkpoint.

    Args:
        sweep: its name or directory.
        config, space, overrides, proxy: may be given again, and must then say what they said.
        changes: of the space's settings; trials, time_budget, max_failed and concurrency may change.

    Raises:
        RunError: it is unknown, is being driven, has nothing left to do, or was begun with another config or space.
    """
    sweep_dir = find_sweep(storage, sweep)
    state = read_journal(sweep_dir)
    base = config_of(state)
    stored = Space.from_dict(state.about["space"])
    check_same(state, config, space, overrides, proxy)
    loaded = load_space(stored, changes or {})
    problems = [
        Problem(f"--{key}", "cannot change in a resumed sweep")
        for key in changes or {}
        if key not in ("trials", "time_budget", "max_failed", "concurrency")
    ]
    if problems:
        raise RunError(problems)
    check_space(loaded, base)
    shared = apply_overrides(base, loaded.fixed)
    narrow = Proxy.from_dict(state.about.get("proxy"))
    prepared = Prepared(base, loaded, settle_here(base, shared, loaded, sweep_dir), [], narrow)
    if not has_work_left(prepared, state):
        hint = f"`glowflow sweep report {sweep_dir.name}` shows it; --trials N adds points"
        raise RunError(Problem("resume", "the sweep has nothing left to do", sweep_dir.name, hint))
    about = {**state.about, "space": loaded.to_dict(), "resumed": int(state.about.get("resumed", 0)) + 1}
    (sweep_dir / STOP_FILE).unlink(missing_ok=True)
    return _drive(prepared, state, about, make_progress(progress), verbose)


def _about(prepared: Prepared, command: Sequence[str], resumed: int) -> dict[str, Any]:
    settings, space = prepared.settings, prepared.space
    shared = apply_overrides(prepared.config, space.fixed)
    slots = settings.slots
    workers = shared.resources.workers
    each = f"{workers} worker{'s' if workers > 1 else ''} with {slots.threads or 'default'} threads"
    device = f"{settings.accelerator}; {slots.concurrency} trials at a time x {each}; {cluster.logical_cpus()} CPUs"
    return {
        "name": settings.sweep_dir.name,
        "config": to_dict(prepared.config),
        "given": prepared.config.model_dump(mode="json", exclude_unset=True),
        "proxy": None if prepared.proxy is None else prepared.proxy.to_dict(),
        "space": space.to_dict(),
        "config_fingerprint": config_fingerprint(prepared.config),
        "max_steps": shared.training.max_steps,
        "batch_tokens": shared.training.batch_size * shared.data.context,
        "metric": list(space.metrics),
        "mode": list(space.modes),
        "command": list(command or sys.argv),
        "versions": versions(),
        "device": device,
        "interval": settings.interval,
        "storage": str(settings.sweep_dir.parent),
        "started": now_iso(),
        "resumed": resumed,
    }


# -- the drive --------------------------------------------------------------------------------------------------------


def _drive(
    prepared: Prepared,
    state: SweepState,
    about: dict[str, Any],
    display: Progress,
    verbose: bool,
) -> SweepState:
    settings, space = prepared.settings, prepared.space
    shared = apply_overrides(prepared.config, space.fixed)
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        display.phase("starting Ray ...")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        stack.enter_context(cluster.connected(shared, verbose=verbose))
        interrupts.reinstall()
        if cluster.ray_address(shared) is not None:
            settings = settle_on_cluster(prepared, shared)
        display.phase("preparing the data ...")
        _build_data(shared, settings, display)
        settings.sweep_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock_sweep(settings.sweep_dir))
        (settings.sweep_dir / CONFIG_NAME).write_text(to_yaml(prepared.config), encoding="utf-8")
        journal = Journal(settings.sweep_dir)
        stack.callback(journal.close)
        tracking = _open_tracking(prepared, about)
        about["mlflow_run_id"] = None if tracking is None else tracking.run_id
        state.apply(journal.append("sweep", **about))
        strategy = make_strategy(space, prepared.config)
        replay(strategy, state, space)
        limit = None if settings.slots.pausing else settings.slots.concurrency
        book = SweepBook(settings, strategy, state, journal, tracking, limit)
        display.note(f"sweep {settings.sweep_dir.name} in {settings.sweep_dir}: {book.num_trials} trials")
        status, why = _search(prepared, book, display, interrupts, settings)
        journal.append("ended", status=status, why=why)
        _finish(settings.sweep_dir, tracking, status, display)
    if book.fatal is not None:
        raise book.fatal
    return read_journal(settings.sweep_dir)


def _build_data(shared: GlowFlowConfig, settings: SweepSettings, display: Progress) -> None:
    """Build once what trials will find in the cache; a trial of other data builds its own."""
    from glowflow.data.prepare import ensure_built

    def building(done: int, total: int, tokens: int) -> None:
        display.phase(f"building the data: {done}/{total} shards, {tokens:,} tokens")

    ensure_built(shared.data, use_ray=not settings.slots.in_process, progress=building)


def _open_tracking(prepared: Prepared, about: Mapping[str, Any]) -> SweepTracking | None:
    tracking = prepared.config.tracking
    if tracking.backend != "mlflow":
        return None
    from glowflow.tracking.family import open_sweep_tracking

    sweep_dir, space = prepared.settings.sweep_dir, prepared.space
    tags = {"searcher": space.searcher.name, "scheduler": space.scheduler.name, "space": space.name}
    if prepared.proxy is not None:
        tags["proxy"] = str(prepared.proxy)
    return open_sweep_tracking(
        sweep_dir,
        name=sweep_dir.name,
        uri=default_uri(tracking.storage, tracking.uri),
        experiment=tracking.experiment,
        config=about["config"],
        space=space.to_dict(),
        tags={**tracking.tags, **{f"glowflow.sweep.{key}": value for key, value in tags.items()}},
    )


def _search(
    prepared: Prepared, book: SweepBook, display: Progress, interrupts: Interrupts, settings: SweepSettings
) -> tuple[str, str | None]:
    """Let Tune run until nothing is left or somebody wants to stop; returns status and reason."""
    stop = StopRule(prepared.space, book, interrupts, settings.sweep_dir / STOP_FILE)
    tune = _TuneThread(prepared, book, settings, stop)
    tune.start()
    interrupts.arm()
    shown = ""
    try:
        while tune.is_alive():
            tune.join(_POLL_SECONDS)
            shown = _show(display, book, prepared, shown)
    except KeyboardInterrupt:
        stop.now("stopped at once by the user")
        book.end_all()
        return "KILLED", stop.why
    finally:
        interrupts.disarm()
        _show(display, book, prepared, shown)
        display.close()
    book.end_all()
    if tune.error is not None and stop.why is None and book.fatal is None:
        raise RunError(
            Problem(settings.sweep_dir.name, f"Ray Tune broke off: {_first_line(tune.error)}")
        ) from tune.error
    if book.fatal is not None:
        return "FAILED", book.fatal.problems[0].rule
    return stop.outcome()


def _show(display: Progress, book: SweepBook, prepared: Prepared, shown: str) -> str:
    """One line: how many are done, the best so far, what runs."""
    # Between reports in tenths of a trial: elsewhere than on a terminal each change is a line.
    tenth = max(1, prepared.max_steps // 10)
    at = {trial.id: max(trial.step, live_step(book.state, trial) // tenth * tenth) for trial in book.live()}
    live = ", ".join(f"{name} at {step}" for name, step in at.items())
    metric, best = prepared.space.metrics[0], best_trial(book.state)
    text = f"{len(book.over())}/{book.num_trials} trials done"
    text += f", {book.failed()} failed" if book.failed() else ""
    if best is not None and (value := best.value(metric)) is not None:
        text += f" | best {metric} {value:.4g} ({best.id} at {best.step})"
    text += f" | running: {live}" if live else ""
    if text != shown:
        display.phase(text)
    return text


class _TuneThread(threading.Thread):
    """``Tuner.fit()`` outside the main thread."""

    def __init__(self, prepared: Prepared, book: SweepBook, settings: SweepSettings, stop: StopRule) -> None:
        super().__init__(name="glowflow-tune", daemon=True)
        self._prepared, self._book, self._settings, self._stop_rule = prepared, book, settings, stop
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with _silent_tune():
                self._tuner().fit()
        except BaseException as error:
            logger.debug("Tune broke off", exc_info=True)
            self.error = error

    def _tuner(self) -> Any:
        from ray import tune

        from glowflow.orchestration.sweep.trainable import OBJECTIVE, SweepTrial
        from glowflow.orchestration.sweep.tune import (
            BookCallback,
            BookSearch,
            StopWhen,
            WatchedScheduler,
            make_scheduler,
        )

        book, settings, space = self._book, self._settings, self._prepared.space
        book.closed = lambda: self._stop_rule.requested
        random.seed(space.searcher.seed)  # population schedulers draw from the global generator
        planned = book.num_trials - len(book.over())
        trainable = tune.with_parameters(SweepTrial, settings=settings)
        return tune.Tuner(
            tune.with_resources(trainable, settings.slots.tune_resources()),
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode=space.modes[0],
                search_alg=BookSearch(book),
                scheduler=WatchedScheduler(make_scheduler(settings, self._prepared.max_steps, planned), book),
                num_samples=book.num_trials,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(settings.sweep_dir / _TUNE_FOLDER),
                stop=StopWhen(self._stop_rule),
                callbacks=[BookCallback(book)],
                verbose=0,
            ),
        )


@contextlib.contextmanager
def _silent_tune() -> Iterator[None]:
    """Tune's own warnings (of checkpoint periods, of trials that are small) are not for the user."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.ERROR if before == logging.NOTSET else before)
    try:
        yield
    finally:
        logger.setLevel(before)


def _finish(sweep_dir: Path, tracking: SweepTracking | None, status: str, display: Progress) -> None:
    """Remove Tune's files, write the winner of a proxy and the report, close the parent run.

    None of it may lose what was measured.
    """
    from glowflow.experiments.report import write_report

    shutil.rmtree(sweep_dir / _TUNE_FOLDER, ignore_errors=True)
    shutil.rmtree(sweep_dir / SPECS, ignore_errors=True)
    (sweep_dir / STOP_FILE).unlink(missing_ok=True)
    state = read_journal(sweep_dir)
    try:
        write_full_width(sweep_dir)
    except (GlowFlowError, OSError) as error:
        hint = f"try `glowflow runs best {sweep_dir.name} --export FILE`"
        display.note(f"warning: no {FULL_WIDTH_NAME}: {_first_line(error)}; {hint}")
    try:
        write_report(sweep_dir)
    except Exception as error:  # a figure that cannot be drawn must not leave the family open
        logger.debug("no report", exc_info=True)
        display.note(f"warning: no report: {_first_line(error)}; try `glowflow sweep report {sweep_dir.name}`")
    if tracking is None:
        return
    best = best_trial(state)
    if best is not None:
        name = state.about["metric"][0]
        value = best.value(name)
        tracking.tag({"glowflow.sweep.best": best.id})
        if value is not None:
            tracking.log_sweep_metrics({f"best_{name}": value})
    tracking.log_artifacts(sweep_dir / "report")
    tracking.close("FINISHED" if status in ("FINISHED", "STOPPED") else "FAILED" if status == "FAILED" else "KILLED")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
