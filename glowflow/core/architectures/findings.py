"""What is wrong with a custom architecture, collected while it is tried: no finding stops the others.

Code of the user's own may raise anything; ``attempt`` turns that into a problem that names the method and the line.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from glowflow.config.errors import GlowFlowError, Problem

__all__ = ["Findings"]

T = TypeVar("T")

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[2])


class Findings:
    """Problems and warnings of one class.

    Args:
        owner: its name, which stands before that of the method in every problem.

    ``on_meta`` says that the model is too large to be tried with values: what only the meta device cannot do is then
    a warning and no problem.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.on_meta = False
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def add(self, method: str, rule: str, value: object = None, hint: str = "") -> None:
        """Note a problem, once: several passes may come upon the same."""
        problem = Problem(f"{self.owner}.{method}", rule, value, hint)
        if str(problem) not in map(str, self.problems):
            self.problems.append(problem)

    def warn(self, text: str) -> None:
        """Note, once, what is allowed but probably not meant, or could not be tried."""
        if text not in self.warnings:
            self.warnings.append(text)

    def of(self, method: str) -> bool:
        """Whether this method is known to be wrong."""
        return any(problem.key == f"{self.owner}.{method}" for problem in self.problems)

    def attempt(self, method: str, call: Callable[[], T], doing: str = "", hint: str = "") -> tuple[T] | None:
        """``(what call gives,)``, or None and a problem when it raises."""
        try:
            return (call(),)
        except GlowFlowError as error:
            self.add(method, f"{doing} fails: {error}".strip(), hint=hint)
        except Exception as error:
            text = f"{type(error).__name__}: {_first_line(error)}{_place(error)}"
            if self.on_meta and re.search(r"\bmeta\b", str(error), re.IGNORECASE):
                self.warn(f"{self.owner}.{method} could only be tried as far as the meta device goes ({text})")
            else:
                self.add(method, f"{doing} raises {text}".strip(), hint=hint)
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _place(error: Exception) -> str:
    """`` (file.py:12)``: the innermost line that is the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(root) for root in _LIBRARIES)]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
