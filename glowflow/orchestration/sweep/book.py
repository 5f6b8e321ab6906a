"""The driver's book of a sweep: which trial is next, what each has reported, in the journal and in MLflow.

Tune calls in from its own thread, one call at a time; nothing is decided here but the order of the trials.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.config.errors import Problem, RunError
from glowflow.config.loader import to_dict, to_yaml
from glowflow.experiments.journal import Journal, SweepState, Trial
from glowflow.experiments.searchers import Ask, SearchStrategy, outcome_of, unclaimed
from glowflow.orchestration.sweep.settings import MIN_FAILED, SweepSettings
from glowflow.tracking.base import RunStatus
from glowflow.training.markers import latest_complete, read_info

if TYPE_CHECKING:
    from glowflow.tracking.family import SweepTracking

__all__ = ["SPECS", "STOP_FILE", "SweepBook", "TrialSpec"]

logger = logging.getLogger(__name__)

SPECS = ".specs"
STOP_FILE = ".stop"
_MLFLOW_STATUS: dict[str, RunStatus] = {"FINISHED": "FINISHED", "FAILED": "FAILED"}


@dataclass(frozen=True)
class TrialSpec:
    """What an actor needs to know of its trial; a file, since a population scheduler copies Tune's configs about."""

    trial: str
    seed: int
    params: dict[str, Any]
    resume_from: str | None = None

    def save(self, folder: Path, tune_id: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{tune_id}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, tune_id: str) -> TrialSpec:
        return cls(**json.loads((folder / f"{tune_id}.json").read_text(encoding="utf-8")))


class SweepBook:
    """See the module. ``state`` is always what the journal says.

    Args:
        settings: what trials run with.
        strategy: proposes points; a resumed sweep's has been told what was learnt before.
        state: what the journal held when this driver began.
        limit: trials in hand at a time; None where a scheduler pauses trials and must see the whole population.
    """

    def __init__(
        self,
        settings: SweepSettings,
        strategy: SearchStrategy,
        state: SweepState,
        journal: Journal,
        tracking: SweepTracking | None,
        limit: int | None,
    ) -> None:
        self.settings, self.state = settings, state
        self._strategy, self._journal, self._tracking, self._limit = strategy, journal, tracking, limit
        self._resumed = deque(trial.id for trial in state.trials.values() if not trial.over)
        self._asked: deque[tuple[Ask, int]] = deque(unclaimed(state, settings.seeds))
        self._past = {trial.id: list(trial.reports) for trial in state.trials.values()}
        self._ids: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self.past = [trial.id for trial in state.trials.values() if trial.over]
        self.fatal: RunError | None = None
        self.closed: Callable[[], bool] = lambda: False

    @property
    def num_trials(self) -> int:
        """Trials of the whole sweep, those of earlier drivers included."""
        return self.settings.num_points * len(self.settings.seeds)

    def live(self) -> list[Trial]:
        """Trials of this driver that run or are paused."""
        return [trial for name in self._began if (trial := self.state.trials[name]).status == "RUNNING"]

    def over(self) -> list[Trial]:
        """Trials that are never run again."""
        return [trial for trial in self.state.trials.values() if trial.over]

    def failed(self) -> int:
        """How many trials have failed."""
        return sum(trial.status == "FAILED" for trial in self.state.trials.values())

    def too_many_failed(self) -> bool:
        """Whether so many trials failed that the rest would only fail too."""
        failed, over = self.failed(), len(self.over())
        return failed >= min(MIN_FAILED, self.num_trials) and failed > self.settings.space.max_failed * over

    def past_reports(self, trial: str) -> list[tuple[int, float]]:
        """(step, first metric) of what a trial had reported to earlier drivers."""
        metric = self.settings.space.metrics[0]
        return [(step, metrics[metric]) for step, metrics in self._past.get(trial, []) if metric in metrics]

    def name_of(self, tune_id: str) -> str:
        """Our id of Tune's trial."""
        return self._ids[tune_id]

    def _record(self, event: str, **content: Any) -> None:
        self.state.apply(self._journal.append(event, **content))

    # -- proposals ----------------------------------------------------------------------------------------------------

    def next_trial(self, tune_id: str) -> dict[str, Any] | str | None:
        """Claim a trial for Tune's new id: its changeable values, None to wait, "FINISHED" when none is left."""
        if self.closed():
            return "FINISHED"
        if self._limit is not None and len(self.live()) >= self._limit:
            return None
        trial = self.state.trials[self._resumed.popleft()] if self._resumed else self._claim()
        if trial is None:
            return None if self._strategy.waiting else "FINISHED"
        self._ids[tune_id], self._began[trial.id] = trial.id, time.monotonic()
        run_dir, resume_from = self._run_dir(trial), self._donor_checkpoint(trial)
        run_dir.mkdir(parents=True, exist_ok=True)
        spec = TrialSpec(trial.id, trial.seed, dict(trial.params), None if resume_from is None else str(resume_from))
        spec.save(self.settings.sweep_dir / SPECS, tune_id)
        self._record(
            "running",
            trial=trial.id,
            directory=run_dir.name,
            mlflow_run_id=self._open_tracking(trial),
            attempt=trial.attempts + 1,
            from_step=_step_of(resume_from or latest_complete(run_dir)),
        )
        population = self.settings.space.scheduler.name in ("pbt", "pb2")
        return dict(trial.params) if population else {"trial": trial.id}

    def _claim(self) -> Trial | None:
        if not self._asked:
            ask = self._strategy.ask()
            if ask is None:
                return None
            self._asked.extend((ask, seed) for seed in self.settings.seeds)
        ask, seed = self._asked.popleft()
        name = ask.label if ask.label is not None else f"{ask.point:03d}"
        name = f"{name}-s{seed}" if len(self.settings.seeds) > 1 else name
        self._record("claimed", trial=name, point=ask.point, label=ask.label, seed=seed, params=dict(ask.params))
        return self.state.trials[name]

    def _run_dir(self, trial: Trial) -> Path:
        return self.settings.sweep_dir / trial.id

    def _donor_checkpoint(self, trial: Trial) -> Path | None:
        """Where a trial goes on that an earlier driver left right after it had copied another's weights."""
        if not trial.lineage:
            return None
        copied = trial.lineage[-1]
        newest = _step_of(latest_complete(self._run_dir(trial), check=True))
        return Path(copied["checkpoint"]) if newest <= copied["donor_step"] else None

    # -- what trials say ----------------------------------------------------------------------------------------------

    def reported(self, tune_id: str, payload: Mapping[str, Any]) -> None:
        """A trial waits at a report."""
        name, step, metrics = self.name_of(tune_id), int(payload["step"]), dict(payload["metrics"])
        self._note_copy(name, payload)
        seconds = round(time.monotonic() - self._began[name], 3)
        checkpoint = payload.get("checkpoint")
        self._record("reported", trial=name, step=step, metrics=metrics, checkpoint=checkpoint, seconds=seconds)
        missing = [metric for metric in self.settings.space.metrics if metric not in metrics]
        if missing and self.fatal is None:
            hint = f"reported: {', '.join(sorted(metrics))}"
            self.fatal = RunError(Problem("metric", f"is not among what {name} reports", missing[0], hint))
        value = metrics.get(self.settings.space.metrics[0])
        if value is not None:
            self._strategy.prune(self.state.trials[name].point, step, value)

    def _note_copy(self, name: str, payload: Mapping[str, Any]) -> None:
        copied = payload.get("copied")
        if not copied:
            return
        self._record("exploited", trial=name, step=copied["donor_step"], **copied)
        if self._tracking is not None:
            tags = {"donor": copied["donor"], "donor_step": copied["donor_step"]}
            tags |= {f"param.{key}": value for key, value in copied["params"].items()}
            self._tracking.tag_trial(self._run_dir(self.state.trials[name]), _tags(tags))

    def decided(self, tune_id: str, step: int) -> None:
        """The scheduler stops this trial here."""
        name, space = self.name_of(tune_id), self.settings.space
        metric, sign = space.metrics[0], 1.0 if space.modes[0] == "min" else -1.0
        rung = {
            trial.id: sign * metrics[metric]
            for trial in self.state.trials.values()
            for at, metrics in trial.reports
            if at == step and metric in metrics
        }
        mine = rung.get(name, math.nan)
        rank = sum(value < mine for value in rung.values()) + 1 if math.isfinite(mine) else len(rung)
        why = f"{space.scheduler.name} at step {step}: rank {rank} of {len(rung)} so far, {metric} {sign * mine:.4g}"
        self._record("decided", trial=name, step=step, action="stop", why=why)

    def ended(self, tune_id: str, payload: Mapping[str, Any] | None) -> None:
        """A trial is over: by itself (its last payload has a status), by the scheduler, or with the sweep."""
        trial = self.state.trials[self.name_of(tune_id)]
        if trial.status != "RUNNING":
            return
        if payload is not None and "status" in payload:
            self._note_copy(trial.id, payload)
            status, error = str(payload["status"]), payload.get("error")
            why = "stopped with the sweep" if status == "KILLED" else error
            metrics, best = dict(payload["metrics"]), dict(payload.get("best") or {})
            self._close(trial, status, why, int(payload["step"]), metrics, error, best)
        elif trial.decisions and trial.decisions[-1]["step"] == trial.step:
            self._close(trial, "STOPPED", trial.why, trial.step, _last_metrics(trial))
        else:
            self._close(trial, "KILLED", "stopped with the sweep", trial.step, _last_metrics(trial))

    def end_all(self) -> None:
        """Whatever Tune has not closed: the sweep was stopped while it ran or was paused."""
        for tune_id in list(self._ids):
            self.ended(tune_id, None)

    def crashed(self, tune_id: str, text: str) -> None:
        """The trial's process died."""
        trial = self.state.trials[self.name_of(tune_id)]
        if trial.status == "RUNNING" and self.closed():  # its last step was cut off: it goes on when resumed
            self._close(trial, "KILLED", "stopped with the sweep", trial.step, _last_metrics(trial))
        elif trial.status == "RUNNING":
            self._close(trial, "FAILED", text, trial.step, _last_metrics(trial), text)

    def _close(
        self,
        trial: Trial,
        status: str,
        why: str | None,
        step: int,
        metrics: dict[str, float],
        error: str | None = None,
        best: Mapping[str, float] | None = None,
    ) -> None:
        content = {"status": status, "why": why, "step": step, "metrics": metrics, "best": dict(best or {})}
        seconds = round(time.monotonic() - self._began[trial.id], 3)
        self._record("done", trial=trial.id, **content, seconds=seconds, error=error)
        outcome = outcome_of(self.state.points()[trial.point], self.settings.space.metrics, len(self.settings.seeds))
        if outcome is not None:
            self._strategy.tell(trial.point, outcome.values, trial.proposed, step=outcome.step)
        if self._tracking is not None:
            run_dir = self._run_dir(trial)
            self._tracking.tag_trial(run_dir, _tags({"status": status, "why": why, "step": step}))
            self._tracking.close_trial(run_dir, _MLFLOW_STATUS.get(status, "KILLED"))

    # -- the tracker --------------------------------------------------------------------------------------------------

    def _open_tracking(self, trial: Trial) -> str | None:
        if self._tracking is None:
            return None
        settings, space = self.settings, self.settings.space
        config = settings.trial_config(trial.params, trial.seed, trial.id)
        about: dict[str, Any] = {"trial": trial.id, "point": trial.point, "label": trial.label, "seed": trial.seed}
        about |= {"searcher": space.searcher.name, "scheduler": space.scheduler.name}
        about |= {f"param.{key}": value for key, value in trial.params.items()}
        return self._tracking.open_trial(
            self._run_dir(trial),
            name=f"{settings.sweep_dir.name}/{trial.id}",
            config=to_dict(config),
            tags={**config.tracking.tags, **_tags(about)},
            config_yaml=to_yaml(config),
        )


def _tags(about: Mapping[str, Any]) -> dict[str, str]:
    return {f"glowflow.sweep.{key}": str(value) for key, value in about.items() if value is not None}


def _last_metrics(trial: Trial) -> dict[str, float]:
    return dict(trial.reports[-1][1]) if trial.reports else {}


def _step_of(checkpoint: Path | None) -> int:
    info = None if checkpoint is None else read_info(checkpoint)
    return 0 if info is None else info.step
