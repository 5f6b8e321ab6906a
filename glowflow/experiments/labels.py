"""How the tables and figures of a sweep write things: metrics with units, short keys and values, no machine paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

__all__ = [
    "clip",
    "command_line",
    "decimals",
    "fixed",
    "metric_label",
    "plain",
    "relative",
    "short_keys",
    "short_params",
    "short_value",
    "wrap",
]

# Units of what a training run reports; a name with "/" is a user's own.
_UNITS = {
    "train_loss": "nats per target",
    "val_loss": "nats per target",
    "val_bits_per_byte": "bits per byte",
    "val_accuracy": "share of samples",
    "val_recall_at_1": "share of texts",
    "tokens_per_second": "tokens/s",
}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_PATH = re.compile(r"(?<![\w.~/:-])~?/(?:[\w.+@%~-]+/)*([\w.+@%~-]+)/?")
_STORE = re.compile(r"\b(sqlite|file):/+(?:[^\s'\"]*/)?([^\s'\"/]+)")
_PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")


def metric_label(name: str) -> str:
    """The metric with its unit: ``val_loss (nats per target)``."""
    return f"{name} ({_UNITS[name]})" if name in _UNITS else name


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> as few of its last parts as tell it from the others: ``training.lr`` -> ``lr``."""
    parts = {key: key.split(".") for key in keys}
    short: dict[str, str] = {}
    for key, names in parts.items():
        tails = [names[-count:] for count in range(1, len(names) + 1)]
        alone = (tail for tail in tails if sum(other[-len(tail) :] == tail for other in parts.values()) == 1)
        short[key] = ".".join(next(alone, names))
    return short


def short_value(value: Any, limit: int = 24) -> str:
    """A value of a parameter in few characters; a mapping as ``dim 128, depth 6``."""
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        text = short_params(value)
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(short_value(item) for item in value) + "]"
    else:
        text = relative(plain(str(value)))
    return clip(text, limit)


def short_params(params: Mapping[str, Any]) -> str:
    """All parameters in one line: ``lr 0.003, depth 4``."""
    names = short_keys(map(str, params))
    return ", ".join(f"{names[str(key)]} {short_value(value)}" for key, value in params.items())


def clip(text: str, limit: int) -> str:
    """At most ``limit`` characters; what is left out shows as three dots."""
    return text if len(text) <= limit else text[: max(limit - 3, 1)].rstrip(" ,._-") + "..."


def wrap(text: str, width: int, lines: int = 2) -> str:
    """Broken behind separators into at most ``lines`` lines of about ``width`` characters; the rest is cut."""
    rows = [""]
    for piece in re.findall(r"[^\s._/,-]+[\s._/,-]*|[\s._/,-]+", text):
        if rows[-1] and len(rows[-1]) + len(piece.rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    if len(rows) > lines:
        rows = [*rows[: lines - 1], clip("".join(rows[lines - 1 :]), width)]
    return "\n".join(clip(row.strip(), width + 3) for row in rows)


def plain(text: str) -> str:
    """One line without control characters, also of an error that holds a coloured stack trace."""
    return "".join(c for c in " ".join(_ANSI.sub("", text).split()) if c.isprintable())


def relative(text: str, storage: str | None = None) -> str:
    """Free text whose absolute paths are relative to the storage, or only a name: a report goes to other machines."""
    text = _STORE.sub(r"\1:\2", _PASSWORD.sub("", text))
    if storage:
        text = text.replace(storage.rstrip("/") + "/", "")
    return _PATH.sub(r"\1", text)


def command_line(arguments: Iterable[str], storage: str | None = None) -> str:
    """The words of a command as they are typed, the program and paths without the folders of this machine."""
    import shlex

    given = [str(word) for word in arguments]
    words = [_word(word, storage) for word in given]
    if given and given[0].endswith("/__main__.py"):
        words[:1] = ["python", "-m", PurePosixPath(given[0]).parent.name]
    return shlex.join(words)


def _word(word: str, storage: str | None) -> str:
    name, equals, value = word.rpartition("=")
    if not value.startswith(("/", "~")):
        return relative(word, storage)
    path = PurePosixPath(value)
    if storage and path != PurePosixPath(storage) and path.is_relative_to(storage):
        return f"{name}{equals}{path.relative_to(storage)}"
    return f"{name}{equals}{path.name}"


def decimals(values: Iterable[float | None], digits: int = 5) -> int:
    """Decimals that show ``digits`` digits of a number of the median size, so that a column lines up."""
    sizes = sorted(abs(value) for value in values if value and math.isfinite(value))
    if not sizes:
        return digits - 1
    return min(max(digits - 1 - math.floor(math.log10(sizes[len(sizes) // 2])), 0), 12)


def fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    """A number with so many decimals; with an exponent where they would show nothing, ``-`` for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    tiny = value != 0 and abs(value) < 0.5 * 10**-places
    return format(value, ("+" if sign else "") + (".1e" if tiny or abs(value) >= 1e9 else f".{places}f"))
