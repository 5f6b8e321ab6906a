"""The one error family that users see: a list of problems, each with the value, the rule and the key to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GlowFlowError",
    "PreflightError",
    "Problem",
    "RuleError",
    "RunError",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        key: the dotted config key, file path or argument that must change.
        rule: the rule that does not hold, as a full sentence without the key.
        value: the offending value (shown with ``repr``); leave it out when there is none.
        hint: what to do about it (``did you mean 'model.depth'?``).
        related: other keys that the rule reads; the problem is left out when one of them is wrong by itself.
    """

    key: str
    rule: str
    value: object = None
    hint: str = ""
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "" if self.value is None else f" (got {_short(self.value)})"
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.key}: {self.rule}{shown}{hint}"


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class GlowFlowError(Exception):
    """Base of all errors meant for users; the CLI prints it without a stack trace and exits with 2."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Sequence[Problem], title: str = "") -> None:
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = () if isinstance(problems, str) else tuple(problems)
        lines = [problems] if isinstance(problems, str) else [str(p) for p in self.problems]
        if title and len(lines) == 1:
            text = f"{title}: {lines[0]}"
        elif title:
            text = "\n".join([f"{title}: {len(lines)} problems", *(f"  - {line}" for line in lines)])
        else:
            text = "\n".join(lines)
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders under Ray: rebuild from the finished text.
        return (_rebuild, (type(self), str(self), self.problems))


def _rebuild(cls: type[GlowFlowError], text: str, problems: tuple[Problem, ...]) -> GlowFlowError:
    error = cls(text)
    error.problems = problems
    return error


class RuleError(ValueError):
    """Raised inside a schema's validator: one or several broken rules, with keys relative to that schema.

    The loader turns them into problems with full dotted keys, next to all others of the file.
    """

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class ConfigError(GlowFlowError):
    """The config file, an override or an argument is wrong."""


class DataError(GlowFlowError):
    """A source, shard, manifest or tokenizer is missing, damaged or does not match."""


class CheckpointError(GlowFlowError):
    """A checkpoint is missing, incomplete, corrupt or belongs to something else."""


class PreflightError(GlowFlowError):
    """The run can never work as asked: resources, storage or addresses."""


class RunError(GlowFlowError):
    """A run is unknown, already exists, or failed."""
