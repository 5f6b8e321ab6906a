"""Ctrl-C in two steps: the first asks for a checkpoint and a clean end, the second ends at once.

Before training runs there is nothing to save, so there the first signal already ends the program. SIGTERM, which
schedulers send, counts like Ctrl-C. Ray installs handlers of its own in ``ray.init``; ``reinstall`` takes them back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol

__all__ = ["Interrupts", "StopSignal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST = "\nstopping: finishing this step and writing a checkpoint (Ctrl-C again: stop at once)\n"


class StopSignal(Protocol):
    """Who may ask a run to stop; ``arm`` and ``disarm`` frame the time in which a stop can be clean."""

    @property
    def stop_requested(self) -> bool: ...

    def arm(self) -> None: ...

    def disarm(self) -> None: ...


class Interrupts:
    """Context manager that owns SIGINT and SIGTERM while a run goes on.

    Args:
        on_stop: called once, in the main thread, at the first signal after ``arm()``.
    """

    def __init__(self, on_stop: Callable[[], None] | None = None) -> None:
        self._on_stop = on_stop
        self._armed = False
        self._count = 0
        self._previous: dict[int, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether the user asked for a clean end."""
        return self._count > 0

    def arm(self, on_stop: Callable[[], None] | None = None) -> None:
        """From now on the first signal asks for a clean end."""
        self._on_stop = on_stop or self._on_stop
        self._armed = True

    def disarm(self) -> None:
        """From now on every signal ends the program at once (the checkpoint is written)."""
        self._armed = False

    def reinstall(self) -> None:
        """Install the handlers; outside the main thread Python allows none, so there this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if not self._armed or self._count > 1:
            raise KeyboardInterrupt
        # os.write: a buffered stream may be in the middle of a write in this very thread.
        os.write(2, _FIRST.encode())
        if self._on_stop is not None:
            self._on_stop()

    def __enter__(self) -> Interrupts:
        self.reinstall()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()
