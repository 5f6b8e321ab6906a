"""Iterating a Ray data set without leaving threads behind.

Ray Data (2.60) only tells the threads of an iteration to stop when its iterator is closed. One that asks Ray for a
block after ``ray.shutdown()`` ends the whole process with exit code 1, without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from typing import Any

__all__ = ["iterate"]

_NAME = "iter_threaded"  # what Ray Data calls the threads that read and convert blocks
_JOIN_SECONDS = 10.0


def iterate(iterable: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield what a Ray data set's ``iter_batches`` or ``iter_rows`` gives.

    Closing it, or its end or error, stops the executor and its tasks at once, and waits for the threads that read.
    """
    others = set(threading.enumerate())
    iterator = iter(iterable)
    threads: list[threading.Thread] = []
    try:
        for given in iterator:
            threads = threads or _new(others)
            yield given
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
        for thread in threads or _new(others):
            thread.join(_JOIN_SECONDS)


def _new(others: set[threading.Thread]) -> list[threading.Thread]:
    # Noted at the first element, since later ones may belong to another data set that this process iterates.
    return [thread for thread in threading.enumerate() if thread.name == _NAME and thread not in others]
