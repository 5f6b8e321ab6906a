"""What an experiment tries: a space file, a Python function or a table of named variants, over any config.

`load_space` reads one and reports all that is wrong with it in itself; `check_space` holds it against a config, so
that nothing is refused in the middle of a sweep.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.spaces.check import check_space
from glowflow.config.spaces.dimensions import Dimension
from glowflow.config.spaces.draws import Draw, RandomDraw
from glowflow.config.spaces.model import Space
from glowflow.config.spaces.program import load_program
from glowflow.config.spaces.reading import TOP_KEYS, read_back, read_space
from glowflow.config.spaces.settings import METRICS, SCHEDULERS, SEARCHERS, Scheduler, Searcher
from glowflow.config.spaces.values import close_to
from glowflow.config.yaml12 import parse_yaml

__all__ = [
    "METRICS",
    "SCHEDULERS",
    "SEARCHERS",
    "Dimension",
    "Draw",
    "RandomDraw",
    "Scheduler",
    "Searcher",
    "Space",
    "check_space",
    "load_space",
]

FOLDER = "tune_spaces"
"""Where a bare name is looked for, in the current directory."""

_ENDINGS = (".yaml", ".yml", ".py")


def load_space(
    source: str | os.PathLike[str] | Mapping[str, Any] | Space, overrides: Mapping[str, Any] | None = None
) -> Space:
    """Read a space and check it in itself.

    Args:
        source: path of a YAML or Python file, the bare name of one in tune_spaces/, the mapping that such a file
            holds, or a space.
        overrides: keys of the file's top level to replace (`trials`, `seeds`, `searcher`, ...); None leaves a key as
            it is. A searcher or scheduler given by name keeps the file's other keys where they still mean the same;
            another metric starts with mode `min` again.

    Returns:
        The space.

    Raises:
        ConfigError: the file cannot be read, or anything in it is wrong; it holds all problems.
    """
    space = _read(source)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    return read_back(space.to_dict(), lambda raw: _overridden(raw, given)) if given else space


def _read(source: str | os.PathLike[str] | Mapping[str, Any] | Space) -> Space:
    if isinstance(source, Space):
        return source
    if isinstance(source, Mapping):
        return read_space(source, name="space", source=None)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(Problem("space", "must be a path, a name, a mapping or a Space", source))
    path = _find(Path(source).expanduser())
    text = _text(path)
    if path.suffix == ".py":
        program, raw = load_program(path, text)
        return read_space(raw, name=path.stem, source=str(path), program=program)
    body = parse_yaml(text, str(path))
    if not isinstance(body, Mapping):
        rule = "is empty" if body is None else f"must hold a mapping, not a {type(body).__name__}"
        raise ConfigError(Problem(str(path), rule, hint=f"keys: {', '.join(TOP_KEYS)}"))
    return read_space(body, name=path.stem, source=str(path))


def _overridden(raw: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**raw, **given}
    if "metric" in given and "mode" not in given:
        merged.pop("mode", None)
    for key, kept in (("searcher", ("seed",)), ("scheduler", ("interval_steps",))):
        old, new = raw.get(key), given.get(key)
        if isinstance(new, str) and isinstance(old, Mapping):
            same_name = old.get("name") == new
            merged[key] = {**{k: v for k, v in old.items() if same_name or k in kept}, "name": new}
    return merged


def _find(given: Path) -> Path:
    """The file that is meant: the path itself, else one of that name in tune_spaces/."""
    candidates = [given]
    if given.parent == Path("."):
        endings = ("",) if given.suffix in _ENDINGS else _ENDINGS
        candidates += [Path(FOLDER) / f"{given.name}{ending}" for ending in endings]
    found = next((path for path in candidates if path.is_file()), None)
    if found is not None:
        return found
    if given.is_dir():
        raise ConfigError(Problem(str(given), "is a directory, not a space file"))
    folder = Path(FOLDER) if given.parent == Path(".") else given.parent
    paths = sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS) if folder.is_dir() else []
    names = [path.name if given.suffix else path.stem for path in paths]
    hint = close_to(given.name, names, f"{folder} has") if names else ""
    raise ConfigError(Problem(str(given), "space file does not exist", hint=hint))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte {error.start})"
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}"
    raise ConfigError(Problem(str(path), rule))
