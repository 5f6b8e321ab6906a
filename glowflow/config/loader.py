"""From a YAML file (or a mapping) and `key=value` overrides to one checked config, and back to plain values.

Order: defaults < YAML < overrides. Everything that is wrong is reported at once, as one ``ConfigError``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.mup import mup_warnings
from glowflow.config.optimizers import OptimizerConfig
from glowflow.config.registry import OPTIMIZERS
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.validation import check
from glowflow.config.yaml12 import dump_yaml, parse_yaml

__all__ = ["apply_overrides", "config_fingerprint", "load_config", "to_dict", "to_yaml", "warnings"]

Overrides = Sequence[str] | Mapping[str, Any]

_OPTIMIZER = "training.optimizer"

# Keys that change where and how often something is written, or how data travel, but no number of the training.
_NOT_IN_FINGERPRINT: dict[str, tuple[str, ...]] = {
    "data": (
        "cache_dir",
        "max_bad_fraction",
        "on_bad_file",
        "parallel_items",
        "prefetch_items",
        "steps_per_item",
        "verify",
    ),
    "training": (
        "checkpoint_interval",
        "export_interval",
        "keep_checkpoints",
        "log_interval",
        "log_samples",
        "max_failures",
        "monitor_metrics",
        "monitor_mode",
    ),
}


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | GlowFlowConfig | None,
    overrides: Overrides = (),
    *,
    strict: bool = True,
) -> GlowFlowConfig:
    """Read and check an experiment.

    Args:
        source: path of a YAML file, a mapping of sections, a config, or None for the defaults.
        overrides: `a.b=value` texts whose values are read as YAML (`training.lr=3e-4`), of which a later one wins, or
            a mapping from dotted keys to values, in which a section comes before its keys wherever it stands.
        strict: False drops unknown keys with a logged warning, to read what another version has written.

    Returns:
        The checked config.

    Raises:
        ConfigError: the file cannot be read or parsed, any key is wrong, or an override changes the optimiser's name
            and would leave it keys that were set for another one; it holds all problems.
    """
    data, name = _read(source)
    problems = _override(data, overrides)
    config, found = check(data, strict=strict)
    if config is None or problems:
        raise ConfigError([*problems, *found], name)
    return config


def apply_overrides(config: GlowFlowConfig, overrides: Overrides) -> GlowFlowConfig:
    """A new config with some keys changed; see `load_config` for the forms of ``overrides``.

    Raises:
        ConfigError: an override is malformed, or the result breaks a rule.
    """
    return load_config(config, overrides)


def to_dict(config: GlowFlowConfig) -> dict[str, Any]:
    """The whole config, defaults filled in, as values that JSON can hold; `load_config` takes it back."""
    return config.model_dump(mode="json")


def to_yaml(config: GlowFlowConfig) -> str:
    """The whole config, defaults filled in, as YAML; `load_config` takes it back."""
    return dump_yaml(to_dict(config))


def config_fingerprint(config: GlowFlowConfig) -> str:
    """sha256 (hex) over what decides the numbers of a training: model, data and training.

    Left out are storage, tracking and resources (so the number of workers), and the keys that only say how often
    something is written or how data travel.
    """
    values = to_dict(config)
    chosen = {
        section: {
            key: value for key, value in values[section].items() if key not in _NOT_IN_FINGERPRINT.get(section, ())
        }
        for section in ("model", "data", "training")
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def warnings(config: GlowFlowConfig) -> list[str]:
    """What is allowed but probably not meant; each sentence names the keys with their values."""
    training, found = config.training, []
    if training.warmup_steps >= training.max_steps:
        found.append(
            f"training.warmup_steps ({training.warmup_steps}) is not smaller than training.max_steps "
            f"({training.max_steps}): the learning rate never reaches training.lr ({training.lr:g})"
        )
    decay = round(training.decay_fraction * training.max_steps)
    if training.schedule == "wsd" and training.warmup_steps < training.max_steps < training.warmup_steps + decay:
        found.append(
            f"training.warmup_steps ({training.warmup_steps}) and the last training.decay_fraction "
            f"({training.decay_fraction:g}, {decay} steps) overlap in training.max_steps ({training.max_steps})"
        )
    for key in ("checkpoint_interval", "val_interval", "export_interval"):
        interval = getattr(training, key)
        if interval is not None and interval > training.max_steps:
            found.append(
                f"training.{key} ({interval}) is greater than training.max_steps ({training.max_steps}): "
                "it happens at the last step only"
            )
    return [*found, *mup_warnings(config)]


def _read(source: object) -> tuple[dict[str, Any], str]:
    """The user's values, unchecked, and how to call their source in messages."""
    if source is None:
        return {}, "config"
    if isinstance(source, GlowFlowConfig):
        # What was never set stays a default, so that an override may choose another architecture or optimiser.
        return source.model_dump(mode="json", exclude_unset=True), "config"
    if isinstance(source, Mapping):
        return _sections(copy.deepcopy(dict(source)), "config"), "config"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return _sections(parse_yaml(_text(path), str(path)), str(path)), str(path)
    raise ConfigError(Problem("config", "must be a path, a mapping or a GlowFlowConfig", source))


def _text(path: Path) -> str:
    """A config file's text, or the reason why there is none."""
    hint = ""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        rule = "config file does not exist"
        others = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"{path.parent} has: {', '.join(others)}" if others else ""
    except IsADirectoryError:
        rule = "is a directory, not a config file"
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte {error.start})"
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}"
    raise ConfigError(Problem(str(path), rule, hint=hint))


def _sections(data: Any, name: str) -> dict[str, Any]:
    """Check the top level: a mapping from names to sections; a section without a body is an empty one."""
    if data is None:
        raise ConfigError(Problem(name, "is empty", hint=f"sections: {', '.join(GlowFlowConfig.model_fields)}"))
    if not isinstance(data, dict):
        rule = f"must hold a mapping of sections, not a {type(data).__name__}"
        raise ConfigError(Problem(name, rule, data, f"sections: {', '.join(GlowFlowConfig.model_fields)}"))
    strange = list(_strange_keys(data, "", set()))
    if strange:
        raise ConfigError([Problem(key or "top level", "keys must be text", value) for key, value in strange], name)
    return {key: {} if value is None and key in GlowFlowConfig.model_fields else value for key, value in data.items()}


def _strange_keys(value: Any, prefix: str, seen: set[int]) -> list[tuple[str, object]]:
    """(mapping, key) of every key that is not text; ``seen`` stops at YAML aliases that lead back."""
    if id(value) in seen or not isinstance(value, (dict, list)):
        return []
    seen.add(id(value))
    if isinstance(value, list):
        return [hit for item in value for hit in _strange_keys(item, prefix, seen)]
    hits: list[tuple[str, object]] = [(prefix, key) for key in value if not isinstance(key, str)]
    for key, child in value.items():
        hits += _strange_keys(child, f"{prefix}.{key}".lstrip("."), seen)
    return hits


def _override(data: dict[str, Any], overrides: Overrides) -> list[Problem]:
    """Write overrides into the data; returns those that cannot be understood."""
    if isinstance(overrides, str):
        overrides = [overrides]
    problems: list[Problem] = []
    if isinstance(overrides, Mapping):
        pairs = sorted(overrides.items(), key=lambda pair: pair[0].count("."))
    else:
        pairs = _pairs(overrides, problems)
    before = _optimizer(data)
    for key, value in pairs:
        problem = _set(data, key, value)
        if problem is not None:
            problems.append(problem)
    return problems + _leftovers(data, before, pairs)


def _optimizer(data: Mapping[str, Any]) -> dict[str, Any]:
    """The optimiser's section, with its name, as far as it is one."""
    training = data.get("training")
    section = training.get("optimizer", {}) if isinstance(training, Mapping) else {}
    section = {"name": section} if isinstance(section, str) else section
    return {"name": "adamw", **section} if isinstance(section, Mapping) else {}


def _leftovers(data: dict[str, Any], before: Mapping[str, Any], pairs: Sequence[tuple[str, Any]]) -> list[Problem]:
    """What was set for one optimiser and would become another's because its name alone was changed; it is taken out."""
    own = dict(before)
    for key, value in pairs:
        if key == _OPTIMIZER or (key == "training" and not (isinstance(value, Mapping) and "optimizer" not in value)):
            own.clear()
        elif key.startswith(f"{_OPTIMIZER}."):
            own.pop(key.split(".")[2], None)
    section = _optimizer(data)
    old, name = before.get("name"), section.get("name")
    entry = OPTIMIZERS.get(name) if isinstance(name, str) else None
    left = [key for key in own if key not in OptimizerConfig.model_fields]
    if entry is None or name == old or not left:
        return []
    for key in left:
        del data["training"]["optimizer"][key]
    shown = " and ".join(f"{key} ({json.dumps(own[key], default=repr)})" for key in left)
    rule = f"would give {name} what is set for {old}: {shown}"
    hint = f"{_OPTIMIZER}={name}, or {_OPTIMIZER}={{name: {name}, ...}}, begins with the defaults of {name}"
    if entry.builtin and set(left) <= entry.schema().model_fields.keys():
        hint += f"; or set {', '.join(f'{_OPTIMIZER}.{key}' for key in left)} too"
    return [Problem(f"{_OPTIMIZER}.name", rule, name, hint)]


def _pairs(overrides: Sequence[str], problems: list[Problem]) -> list[tuple[str, Any]]:
    """Split `a.b=value` texts; the value is YAML."""
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            problems.append(Problem(text, "an override must look like section.key=value"))
            continue
        try:
            pairs.append((key, parse_yaml(value, key)))
        except ConfigError as error:
            hint = f"quote text that YAML would misread: {key}='\"...\"'"
            problems += [Problem(key, p.rule, value, hint) for p in error.problems]
    return pairs


def _set(data: dict[str, Any], key: str, value: Any) -> Problem | None:
    """Set one dotted key, making the sections on the way; returns a problem when a value stands in the way."""
    *sections, leaf = key.split(".")
    here = data
    for depth, part in enumerate(sections):
        path = ".".join(sections[: depth + 1])
        child = here.setdefault(part, {})
        if path == _OPTIMIZER and isinstance(child, str):
            child = here[part] = {"name": child}
        if not isinstance(child, dict):
            return Problem(key, f"cannot be set, since {path} is not a section", child)
        here = child
    old = here.get(leaf)
    if not sections and leaf != "model" and isinstance(old, dict) and isinstance(value, Mapping):
        old.update(value)  # a plain section given as a mapping changes the keys it names and keeps the others
    else:
        here[leaf] = value
    return None
