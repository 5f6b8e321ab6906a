"""When a sweep ends before its trials: the user, the time budget, too many failures, an error."""

from __future__ import annotations

import time
from pathlib import Path

from glowflow.config.space import Space
from glowflow.orchestration.interrupts import StopSignal
from glowflow.orchestration.sweep.book import SweepBook

__all__ = ["StopRule"]

_DRAIN_SECONDS = 60.0  # that trials get to write a checkpoint when the sweep is stopped


class StopRule:
    """Asked by Tune again and again; asks running trials to end first, and Tune to stop when they have.

    Args:
        space: time budget and share of failures.
        stop_file: trials stop when it is there.
    """

    def __init__(self, space: Space, book: SweepBook, interrupts: StopSignal, stop_file: Path) -> None:
        self._space, self._book, self._interrupts, self._file = space, book, interrupts, stop_file
        self._began = time.monotonic()
        self._asked: float | None = None
        self._status = "FINISHED"
        self.why: str | None = None

    def now(self, why: str, status: str = "KILLED") -> None:
        """Ask running trials to end with a checkpoint."""
        if self.why is None:
            self.why, self._status, self._asked = why, status, time.monotonic()
            self._file.touch()

    def __call__(self) -> bool:
        """Whether Tune shall stop everything: only after the trials had the time to end by themselves."""
        book, budget = self._book, self._space.time_budget_s
        if self.why is None:
            if self._interrupts.stop_requested:
                self.now("stopped by the user")
            elif book.fatal is not None:
                self.now(book.fatal.problems[0].rule, "FAILED")
            elif budget is not None and time.monotonic() - self._began > budget:
                self.now(f"the time budget of {budget:g} s is used up", "STOPPED")
            elif book.too_many_failed():
                share = f"{book.failed()} of {len(book.over())} trials failed"
                self.now(f"{share}, more than max_failed ({self._space.max_failed:g})", "FAILED")
        if self._asked is None:
            return False
        return not book.live() or time.monotonic() - self._asked > _DRAIN_SECONDS

    @property
    def requested(self) -> bool:
        """Whether no new trial may begin."""
        return self.why is not None

    def outcome(self) -> tuple[str, str | None]:
        return self._status, self.why
