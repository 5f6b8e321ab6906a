"""The actor in which Tune runs trials, one after another in the same warm process.

A class, not a function: each ``step()`` returns at a report of the loop, so that a trial which Tune stops or pauses
there has done not one step more, and the process can take up the next trial. Tune's checkpoint of a trial is a
pointer to one of ours (``POINTER``), written when Tune pauses the trial or lets another copy its weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ray import tune

from glowflow.config.errors import GlowFlowError
from glowflow.core.allocator import return_freed_memory
from glowflow.orchestration.sweep.book import SPECS, STOP_FILE, TrialSpec
from glowflow.orchestration.sweep.settings import SweepSettings
from glowflow.orchestration.sweep.trial_run import Ended, TrialRun, train_trial
from glowflow.training.markers import latest_complete, read_info

__all__ = ["OBJECTIVE", "PAYLOAD", "STEP", "SweepTrial"]

STEP = "glow_step"
OBJECTIVE = "objective"
PAYLOAD = "payload"
_POINTER = "pointer.json"


class SweepTrial(tune.Trainable):
    """One trial at a time; ``config`` holds the values that a population scheduler may change, nothing else counts.

    Results hold STEP, OBJECTIVE (finite or infinitely bad, so that a scheduler can compare it) and PAYLOAD, a JSON
    text for the driver: metrics, checkpoint, and at the end status and error.
    """

    def setup(self, config: dict[str, Any], settings: SweepSettings | None = None) -> None:
        assert settings is not None
        self._settings = settings
        self._run: TrialRun | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial, or the same one with other values."""
        self._end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        return_freed_memory()  # what the trial before had, in a thread of its own
        self._spec = TrialSpec.load(self._settings.sweep_dir / SPECS, self.trial_id)
        self._params = {key: config.get(key, value) for key, value in self._spec.params.items()}
        self._resume_from = None if self._spec.resume_from is None else Path(self._spec.resume_from)
        self._copied: dict[str, Any] | None = None

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def step(self) -> dict[str, Any]:
        """Train to the next report, or to the end."""
        if self._run is None:
            self._run = TrialRun(self._train, self._settings.sweep_dir / STOP_FILE)
        else:
            self._run.go_on()
        event = self._run.next()
        if isinstance(event, Ended):
            self._run = None
            return self._outcome(event)
        checkpoint = None if event.checkpoint is None else str(event.checkpoint)
        return self._result(event.step, event.metrics, {"checkpoint": checkpoint}, done=False)

    def _train(self, report: Any, signal: Any) -> Any:
        settings, spec = self._settings, self._spec
        config = settings.trial_config(self._params, spec.seed, spec.trial)
        return train_trial(
            config, accelerator=settings.accelerator, resume_from=self._resume_from, report=report, signal=signal
        )

    def _outcome(self, event: Ended) -> dict[str, Any]:
        record, error = event.record, event.error
        if error is not None:
            if not isinstance(error, (GlowFlowError, Exception)):
                raise error
            text = error.problems[0].rule if isinstance(error, GlowFlowError) and error.problems else str(error)
            return self._result(0, {}, {"status": "FAILED", "error": text}, done=True)
        content = {"status": record.status, "best": record.best, "seconds": record.seconds}
        metrics = {name: value for name, value in record.final.items() if value is not None}
        return self._result(record.steps, metrics, content, done=True)

    def _result(self, step: int, metrics: dict[str, float], content: dict[str, Any], *, done: bool) -> dict[str, Any]:
        space = self._settings.space
        worst = math.inf if space.modes[0] == "min" else -math.inf
        value = metrics.get(space.metrics[0], worst)
        copied, self._copied = self._copied, None
        payload = {**content, "step": step, "metrics": metrics, "copied": copied}
        return {
            STEP: step,
            OBJECTIVE: value if math.isfinite(value) else worst,
            PAYLOAD: json.dumps(payload),
            "done": done,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer to the newest checkpoint: that of the step at which the run waits, or of its end."""
        newest = latest_complete(self._settings.sweep_dir / self._spec.trial)
        info = None if newest is None else read_info(newest)
        pointer = {
            "trial": self._spec.trial,
            "step": 0 if info is None else info.step,
            "checkpoint": None if newest is None else str(newest),
        }
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps(pointer), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a pointer: this trial's own, or a donor's, whose weights and optimiser state are then copied."""
        pointer = json.loads((Path(checkpoint) / _POINTER).read_text(encoding="utf-8"))
        self._end()
        if pointer["checkpoint"] is None:
            return
        self._resume_from = Path(pointer["checkpoint"])
        if pointer["trial"] != self._spec.trial:
            self._copied = {
                "donor": pointer["trial"],
                "donor_step": pointer["step"],
                "checkpoint": pointer["checkpoint"],
                "params": self._params,
            }
