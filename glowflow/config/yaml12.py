"""Reads and writes YAML with the scalars of YAML 1.2: text in, plain Python values out.

PyYAML follows YAML 1.1, where ``3e-4`` is text, ``010`` is eight, ``no`` is false and ``2026-11-22`` is a date. Here
they are a number, ten and two strings (yaml.org/spec/1.2.2, section 10.3), and a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from glowflow.config.errors import ConfigError, Problem

__all__ = ["dump_yaml", "parse_yaml"]

# Underscores (1_000_000) are no longer in YAML 1.2 but read well and cannot be mistaken for anything else.
_RESOLVERS: list[tuple[str, str, str]] = [
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers above; tags that name code stay refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), [*_first, *([""] if _tag.endswith("null") else [])])
    if not _tag.endswith("merge"):
        _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what to call it in messages (a file's path, an override's key).

    Raises:
        ConfigError: a syntax error with its line and column, or every key that is given twice.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _contains_itself(node, set(), set()):
            raise ConfigError(Problem(name, "holds an alias that contains itself"))
        duplicates = [Problem(name, rule) for rule in _duplicates(node, set())]
        if duplicates:
            raise ConfigError(duplicates, "duplicate keys" if len(duplicates) > 1 else "")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(Problem(name, f"YAML syntax error{_position(error)}")) from None
    except RecursionError:
        raise ConfigError(Problem(name, "YAML is nested too deeply")) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """Plain values as block-style YAML that `parse_yaml` reads back equal, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _contains_itself(node: yaml.Node, above: set[int], done: set[int]) -> bool:
    """Whether following aliases (`&a {x: *a}`) leads back to where one came from."""
    if id(node) in above:
        return True
    if id(node) in done or isinstance(node, yaml.ScalarNode):
        return False
    children = node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
    found = any(_contains_itself(child, above | {id(node)}, done) for child in children)
    done.add(id(node))
    return found


def _duplicates(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    """One sentence for each key that a mapping holds twice; walks nodes, since values no longer tell."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _duplicates(child, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines:
                yield f"the key {key.value!r} stands twice, in line {lines[key.value]} and in line {line}"
            lines.setdefault(key.value, line)
        yield from _duplicates(value, seen)


def _position(error: yaml.YAMLError) -> str:
    """` in line L, column C: what`, from whatever PyYAML knows about the error."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    context = getattr(error, "context", None)
    return f"{where}: {what}" + (f" ({context})" if context else "")
