"""Derivatives of derivatives: where they are needed, layers leave their hand-written gradients and fused kernels.

These know a first derivative only. Inside ``twice_differentiable()`` a forward pass is made of operations that torch
can differentiate any number of times; it costs more time and memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["is_twice_differentiable", "twice_differentiable"]

_wanted: ContextVar[bool] = ContextVar("twice_differentiable", default=False)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forward passes of this thread can be differentiated twice; attention goes by ``auto``, whatever is named."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_twice_differentiable() -> bool:
    """Whether the pass that runs is inside ``twice_differentiable()``."""
    return _wanted.get()
