"""Plain values and dotted keys: what may stand in a space, when two values are the same, sections as flat keys."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["clash", "close_to", "flatten", "is_number", "is_whole", "overlap", "plain", "same", "show", "strange"]

_OPTIMIZER = "training.optimizer"


def is_number(value: object) -> bool:
    """Whether a value is a finite number that fits a float; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    """Whether a value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def strange(value: Any) -> str:
    """Why JSON could not hold a value and give the same back; empty when it can."""
    if isinstance(value, Mapping):
        bad = next((key for key in value if not isinstance(key, str)), None)
        if bad is not None:
            return f"keys must be text, not {bad!r}"
        return next((why for item in value.values() if (why := strange(item))), "")
    if isinstance(value, (list, tuple)):
        return next((why for item in value if (why := strange(item))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if value is None or isinstance(value, (bool, int, float, str)):
        return ""
    return f"must be a number, text, true, false, null, a list or a mapping, not a {type(value).__name__}"


def same(a: Any, b: Any) -> bool:
    """Equality for which 1 and 1.0 are the same, but 1 and true are not."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A section given as a mapping as one (dotted key, value) for each key in it; anything else as it is.

    An optimiser given as a mapping with its ``name`` is that name alone, which begins with its defaults, and its keys.
    """
    if isinstance(value, Mapping):
        named = key == _OPTIMIZER and "name" in value
        if named:
            yield key, plain(value["name"])
        for name, item in value.items():
            if not (named and name == "name"):
                yield from flatten(f"{key}.{name}" if key else str(name), item)
    else:
        yield key, plain(value)


def overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are the same, or one names a section that holds the other."""
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def clash(a: str, b: str) -> bool:
    """Whether two dotted keys cannot both be set: the name of an optimiser goes with the keys that it has."""
    short, long = sorted((a, b), key=len)
    return overlap(a, b) and (short != _OPTIMIZER or long in (_OPTIMIZER, f"{_OPTIMIZER}.name"))


def show(value: Any) -> str:
    """A value as one would type it on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)


def close_to(name: object, known: Iterable[str], what: str = "known here") -> str:
    """`did you mean ...?`, or the whole list when nothing is close."""
    known = list(known)
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"{what}: {', '.join(known)}"
