"""A space as a Python function: ``space(draw)`` asks for its values and returns the point.

The file is code that the user names on the command line, like a pipeline script; no YAML file can name one. Whatever
it raises becomes one ConfigError with the file and the line.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.abc import ExecutionLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

from glowflow.config.errors import ConfigError, GlowFlowError, Problem
from glowflow.config.spaces.dimensions import Dimension, faults
from glowflow.config.spaces.draws import Draw, Point
from glowflow.config.spaces.values import clash, flatten, same, show, strange

__all__ = ["Program", "load_program"]


class _WrongDraw(ValueError):
    """A question that has no answer, or one asked twice; raised through the user's function to learn its line."""


@dataclass(frozen=True)
class Program:
    """The function ``space`` of a file with this content; loaded when it is first called.

    Args:
        path: the file.
        digest: sha256 (hex) of its text.
    """

    path: str
    digest: str

    def __call__(self, draw: Draw) -> Point:
        """One point.

        Raises:
            ConfigError: the file is no longer the same, its function raised, or what it returns is no point.
        """
        return self.run(draw)[0]

    def run(self, draw: Draw) -> tuple[Point, dict[str, Dimension]]:
        """One point, and the dimensions that it was asked for."""
        function, _ = _load(self.path, self.digest)
        asked = _Asked(draw)
        try:
            result = function(asked)
        except (Exception, SystemExit) as error:
            _fail(error, self.path, "space() raised")
        return _point(result, asked, self.path), asked.dimensions


def load_program(path: Path, text: str) -> tuple[Program, dict[str, Any]]:
    """The function of a file, and its mapping ``SPACE`` of settings.

    Raises:
        ConfigError: the file raises, has no function ``space``, or its ``SPACE`` is no mapping.
    """
    program = Program(str(path.absolute()), hashlib.sha256(text.encode()).hexdigest())
    _, settings = _load(program.path, program.digest)
    return program, dict(settings)


@lru_cache(maxsize=16)
def _load(path: str, digest: str) -> tuple[Callable[[Draw], Any], Mapping[str, Any]]:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(path, f"the space's file cannot be read: {error}")) from None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        rule = "has been changed since the sweep was started"
        raise ConfigError(Problem(path, rule, hint="put it back, or start a new sweep"))
    # Not from a cached .pyc, whose times may lag behind: what runs is the text with this digest.
    spec = spec_from_file_location("glowflow_space", path, loader=_Text(path, text))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        _fail(error, path, "raised")
    function, settings = getattr(module, "space", None), getattr(module, "SPACE", {})
    problems = []
    if not callable(function):
        problems.append(Problem("space", "must be a function that takes a draw: def space(draw)", function))
    if not isinstance(settings, Mapping):
        problems.append(Problem("SPACE", "must be a mapping of settings", settings))
    else:
        problems += [
            Problem(f"SPACE.{key}", "is given by the function space(draw)")
            for key in ("space", "variants")
            if key in settings
        ]
    if problems:
        raise ConfigError(problems, path)
    assert callable(function)
    return function, settings


class _Text(ExecutionLoader):
    """Runs a module's text, which is already here."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._text = path, text

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_source(self, fullname: str) -> str:
        return self._text


def _fail(error: BaseException, path: str, what: str) -> NoReturn:
    """One sentence with the last line of the user's file that was on the way."""
    if isinstance(error, GlowFlowError):
        raise error
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, what = [error.lineno], "is not Python:"
    where = f"{path}:{lines[-1]}" if lines else path
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    rule = text if isinstance(error, _WrongDraw) else f"{what} {type(error).__name__}: {text}".rstrip(": ")
    raise ConfigError(Problem(where, rule)) from None


class _Asked:
    """Passes on what a function asks for; refuses bounds that make no sense and a key asked for twice."""

    def __init__(self, source: Draw) -> None:
        self._source = source
        self.dimensions: dict[str, Dimension] = {}
        self.drawn: Point = {}

    def uniform(self, key: str, low: float, high: float, step: float | None = None) -> float:
        return float(self._ask(key, Dimension("uniform", low, high, step)))

    def loguniform(self, key: str, low: float, high: float) -> float:
        return float(self._ask(key, Dimension("loguniform", low, high)))

    def randint(self, key: str, low: int, high: int, step: int = 1) -> int:
        return int(self._ask(key, Dimension("randint", low, high, step)))

    def choice(self, key: str, values: Sequence[Any]) -> Any:
        return self._ask(key, Dimension("choice", values=tuple(values)))

    def _ask(self, key: str, dimension: Dimension) -> Any:
        call = f"draw.{dimension.kind}({key!r})"
        if not isinstance(key, str) or not all(key.split(".")):
            raise _WrongDraw(f"{call}: the key must be a dotted key of the config")
        wrong = "; ".join(faults(dimension))
        if wrong:
            raise _WrongDraw(f"{call}: {wrong}")
        if key in self.dimensions:
            raise _WrongDraw(f"{call}: this point has drawn the key already")
        if dimension.kind == "uniform":
            step = None if dimension.step is None else float(dimension.step)
            dimension = Dimension("uniform", float(dimension.low), float(dimension.high), step)
        self.dimensions[key] = dimension
        self.drawn[key] = dimension.draw(key, self._source)
        return self.drawn[key]


def _point(result: Any, asked: _Asked, path: str) -> Point:
    """What the function returned as a flat point.

    What was drawn must be in it: the journal keeps points, and a searcher learns from them what it had proposed.
    """
    why = strange(result) if isinstance(result, Mapping) else "must be a mapping from config keys to values"
    if why:
        raise ConfigError(Problem("space(draw)", f"what it returns {why}", show(result)), path)
    pairs = list(flatten("", result))
    point = dict(pairs)
    problems = [
        Problem(key, "is returned twice, once inside of a section", point[key])
        for key in point
        if sum(clash(key, other) for other, _ in pairs) > 1
    ]
    for name, value in asked.drawn.items():
        missing = [key for key, item in flatten(name, value) if key not in point or not same(point[key], item)]
        if missing:
            rule = "was drawn but is not returned as it was drawn"
            problems.append(Problem(missing[0], rule, value, f"put {name!r} into the mapping that space(draw) returns"))
    if problems:
        raise ConfigError(problems, path)
    return point
