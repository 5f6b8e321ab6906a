"""One calm progress display on stderr: a single line that is rewritten on a terminal, a line now and then elsewhere.

It draws only when it is called, from the calling thread, so a debugger that holds the training thread has the
terminal for itself.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

__all__ = ["NoProgress", "Progress", "ProgressLine", "describe", "make_progress"]

_PLAIN_SECONDS = 10.0
_LABELS = {
    "train_loss": "loss",
    "val_loss": "val loss",
    "perplexity": "ppl",
    "val_bits_per_byte": "bits/byte",
    "grad_norm": "grad norm",
}
_ALWAYS = ("train_loss", "val_loss", "perplexity")


class Progress(Protocol):
    """What a run tells about itself."""

    def phase(self, text: str) -> None: ...

    def update(self, step: int, max_steps: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class NoProgress:
    """Says nothing, for callers that want silence; notes still go to the log of the run."""

    def phase(self, text: str) -> None:
        """Ignore."""

    def update(self, step: int, max_steps: int, metrics: Mapping[str, float]) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def close(self) -> None:
        """Ignore."""


class ProgressLine:
    """Phases, then ``step 120/200 60% | loss 2.31 | 12.3k tok/s | ETA 0:32``.

    Args:
        stream: where it is drawn; default stderr.
        monitor: metrics to show besides loss, validation loss and perplexity.
    """

    def __init__(self, stream: TextIO | None = None, monitor: Sequence[str] = ()) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._shown = [*_ALWAYS, *(m for m in monitor if m not in _ALWAYS)]
        self._first: tuple[int, float] | None = None
        self._last_plain = (0.0, -1.0)  # (time, tenth of the run) of the last plain line
        self._last_text = ""
        self._drawn = ""

    def phase(self, text: str) -> None:
        """Say what goes on before the first step."""
        if self._live:
            self._draw(text)
        else:
            self._line(text)

    def update(self, step: int, max_steps: int, metrics: Mapping[str, float]) -> None:
        """Show where training stands."""
        now = time.monotonic()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        text = describe(step, max_steps, metrics, self._shown, self._eta(step, max_steps, now))
        if self._live:
            self._draw(text)
        elif text != self._last_text and self._due(step, max_steps, now):
            self._last_text = text
            self._line(text)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live and self._drawn:
            self._write("\r\x1b[K")
        self._line(text)
        if self._live and self._drawn:
            self._write(self._drawn)

    def close(self) -> None:
        """End the live line, keeping what it says."""
        if self._live and self._drawn:
            self._write("\n")
        self._drawn = ""

    def _eta(self, step: int, max_steps: int, now: float) -> float | None:
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (max_steps - step)

    def _due(self, step: int, max_steps: int, now: float) -> bool:
        last_time, last_tenth = self._last_plain
        tenth = float(10 * step // max(1, max_steps))
        if now - last_time < _PLAIN_SECONDS and tenth <= last_tenth and step < max_steps:
            return False
        # Very short runs pass a tenth every moment: keep at least half a second between lines, but show the end.
        if now - last_time < 0.5 and step < max_steps:
            return False
        self._last_plain = (now, tenth)
        return True

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._drawn = text[:width]
        self._write(f"\r\x1b[K{self._drawn}")

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # A closed terminal must not end a training run.
            self._live = False


def describe(
    step: int, max_steps: int, metrics: Mapping[str, float], shown: Sequence[str] = _ALWAYS, eta: float | None = None
) -> str:
    """One line about a step; ``eta`` in seconds."""
    parts = [f"step {step:,}/{max_steps:,} {100 * step // max(1, max_steps)}%"]
    for name in shown:
        if name in metrics:
            parts.append(f"{_LABELS.get(name, name)} {metrics[name]:.4g}")
    if "tokens_per_second" in metrics:
        parts.append(f"{_short(metrics['tokens_per_second'])} tok/s")
    if eta is not None and step < max_steps:
        parts.append(f"ETA {_duration(eta)}")
    return " | ".join(parts)


def make_progress(progress: Any, monitor: Sequence[str] = ()) -> Progress:
    """None: the line on stderr; False: silence; anything else is taken as a display."""
    if progress is None or progress is True:
        return ProgressLine(monitor=monitor)
    if progress is False:
        return NoProgress()
    display: Progress = progress
    return display


def _short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
