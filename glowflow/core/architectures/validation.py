"""A custom model is looked at before anything is trained: every problem at once, each with the method to change.

A config goes in; warnings come out, or one ``ConfigError``. Only architectures that do not come with GlowFlow are
tried: their class, then a module without memory (the meta device), then two sequences of eight tokens on the CPU. A
model of more than ``LARGEST`` parameters stays on the meta device, unless its ``small_config`` gives a smaller one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from glowflow.config.architectures import ArchitectureConfig
from glowflow.config.errors import ConfigError
from glowflow.config.registry import ARCHITECTURES
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture, InitSpec, ParameterRole
from glowflow.core.architectures.findings import Findings
from glowflow.core.architectures.trial import Trial
from glowflow.core.initialization import draw
from glowflow.core.model import architecture_class

__all__ = ["LARGEST", "validate_architecture"]

LARGEST = 2**25
"""Parameters up to which a model is tried on the CPU: with gradients a quarter of a GiB."""

T = TypeVar("T")

_STAND_IN_VOCABULARY = 512  # where the tokenizer decides and is not known yet

# How the loop, the strategies, evaluation and generation call each method: positional and keyword arguments.
_CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "forward": (2, ("compute_loss",)),
    "shard_units": (0, ()),
    "init_spec": (1, ()),
    "parameter_role": (1, ()),
    "logits": (1, ()),
    "new_cache": (4, ()),
    "decode": (2, ("last_only",)),
    "flops_per_token": (1, ()),
}


def validate_architecture(config: GlowFlowConfig) -> list[str]:
    """Try the architecture that ``model.arch`` names, if it is not one of GlowFlow's own.

    Args:
        config: the experiment; ``model.vocab_size`` may still be open.

    Returns:
        Warnings: what is allowed but limits the model, and what could not be tried.

    Raises:
        ConfigError: with everything that would fail, or silently go wrong, in training.
    """
    entry = ARCHITECTURES.get(config.model.arch)
    if entry is not None and entry.builtin:
        return []
    target = architecture_class(config.model.arch)
    findings = Findings(target.__name__)
    with torch.random.fork_rng(devices=[]):
        _examine(target, config.model, findings)
    if findings.problems:
        raise ConfigError(findings.problems, title=f"model.arch {config.model.arch} cannot be trained")
    return findings.warnings


def _examine(target: type[BaseArchitecture], section: ArchitectureConfig, findings: Findings) -> None:
    _check_class(target, findings)
    small = _small(target, section, findings)
    module = None if small is None else _build(target, small, findings)
    if small is None or module is None:
        return
    units = _units(module, findings)
    specs = _check_parameters(module, findings)
    _check_numbers(module, findings)
    if module.num_parameters() <= LARGEST:
        module = _with_memory(module, target, small, specs, findings)
    else:
        findings.on_meta = True
        findings.warn(
            f"{findings.owner} has {module.num_parameters():,} parameters, too many to try here: shapes and gradients "
            "were checked without values (a small_config(config) of fewer parameters would be tried whole)"
        )
    if not findings.of("forward") and not findings.of("parameters"):
        findings.attempt("forward", Trial(module, units, findings).run, "trying it")


# -- the class --------------------------------------------------------------------------------------------------------


def _check_class(target: type[BaseArchitecture], findings: Findings) -> None:
    schema = target.config_class
    if not (isinstance(schema, type) and issubclass(schema, ArchitectureConfig)):
        rule = "must be a class derived from glowflow.config.architectures.ArchitectureConfig"
        findings.add("config_class", rule, schema)
    if not _own(target, "forward"):
        rule = "is missing: it takes (batch, carry=None, *, compute_loss=True) and returns (ModelOutput, carry)"
        findings.add("forward", rule)
    for there, missing in (("decode", "new_cache"), ("new_cache", "decode")):
        if _own(target, there) and not _own(target, missing):
            findings.add(missing, f"is missing: cached decoding needs it beside {there}")
    for method in _CALLS:
        if _own(target, method):
            _check_signature(target, method, findings)


def _own(target: type[BaseArchitecture], method: str) -> bool:
    return getattr(target, method) is not getattr(BaseArchitecture, method)


def _check_signature(target: type[BaseArchitecture], method: str, findings: Findings) -> None:
    positional, keywords = _CALLS[method]
    try:
        inspect.signature(getattr(target, method)).bind(*[None] * (1 + positional), **dict.fromkeys(keywords))
    except (TypeError, ValueError):
        wanted = str(inspect.signature(getattr(BaseArchitecture, method))).partition(" ->")[0]
        findings.add(method, f"must take {wanted}", _signature(getattr(target, method)))


def _signature(method: object) -> str:
    return str(inspect.signature(method)) if callable(method) else type(method).__name__


# -- the module without memory ----------------------------------------------------------------------------------------


def _small(
    target: type[BaseArchitecture], section: ArchitectureConfig, findings: Findings
) -> ArchitectureConfig | None:
    """What is tried: the class's own smaller config, with a vocabulary."""
    given = findings.attempt("small_config", lambda: target.small_config(section))
    if given is None:
        return None
    (small,) = given
    if not isinstance(small, type(section)):
        findings.add("small_config", f"must return a {type(section).__name__}", type(small).__name__)
        return None
    return small.model_copy(update={"vocab_size": small.vocab_size or _STAND_IN_VOCABULARY})


def _build(target: type[BaseArchitecture], section: ArchitectureConfig, findings: Findings) -> BaseArchitecture | None:
    """The module on the meta device, where every model is constructed before it is sharded."""
    hint = "models are first built on the meta device, where tensors have no values: compute with Python numbers"
    with torch.device("meta"):
        given = findings.attempt("__init__", lambda: target(section), hint=hint)
    if given is None:
        return None
    (module,) = given
    if next(module.parameters(), None) is None:
        hint = "hold layers as attributes or in an nn.ModuleList, not in a plain list"
        findings.add("parameters", "there are none, so nothing can be trained", hint=hint)
    return module


def _units(module: BaseArchitecture, findings: Findings) -> list[nn.Module]:
    """The shard units that are as they should be."""
    given = findings.attempt("shard_units", module.shard_units)
    if given is None:
        return []
    (units,) = given
    if not isinstance(units, (list, tuple, nn.ModuleList)):
        findings.add("shard_units", "must return a list of modules", type(units).__name__)
        return []
    inside = {*module.modules()} - {module}
    strangers = [f"item {index}: {type(unit).__name__}" for index, unit in enumerate(units) if unit not in inside]
    if strangers:
        hint = "hold the blocks in an nn.ModuleList"
        findings.add("shard_units", f"must name submodules of the model: {', '.join(strangers[:3])}", hint=hint)
    if len({*map(id, units)}) < len(units):
        findings.add("shard_units", "must name each block once")
    sound = [unit for unit in units if unit in inside]
    _check_nesting(sound, findings)
    return sound


def _check_nesting(units: Sequence[nn.Module], findings: Findings) -> None:
    names = {unit: type(unit).__name__ for unit in units}
    nested = [name for unit, name in names.items() if any(unit in {*other.modules()} - {other} for other in units)]
    if nested:
        findings.add("shard_units", "must not name a block inside another one", nested[0])


def _check_parameters(module: BaseArchitecture, findings: Findings) -> dict[str, InitSpec]:
    """Ties, roles and first values; returns how each parameter starts, where that is told."""
    for names in _owners(module).values():
        if len(names) > 1:
            hint = "keep the module that owns it and use its weight, as OutputHead(tied_to=...) does"
            rule = "one parameter under several names comes apart when memory is given to the model"
            findings.add("parameters", rule, " = ".join(names), hint)
    specs = {}
    for name, _ in module.named_parameters():
        _answer(module, "parameter_role", name, ParameterRole, findings)
        spec = _answer(module, "init_spec", name, InitSpec, findings)
        if spec is not None:
            specs[name] = spec
    return specs


def _answer(module: BaseArchitecture, method: str, name: str, wanted: type[T], findings: Findings) -> T | None:
    """What a method says about one parameter; only the first problem of each method is told."""
    if findings.of(method):
        return None
    given = findings.attempt(method, partial(getattr(module, method), name), f"for {name!r}")
    if given is None or isinstance(given[0], wanted):
        return None if given is None else given[0]
    findings.add(method, f"must return {wanted.__name__}(...) for {name!r}", type(given[0]).__name__)
    return None


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """Parameter -> its names in different modules (a module that is used twice keeps its parameter)."""
    found: dict[int, dict[int, str]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False):
            found.setdefault(id(parameter), {}).setdefault(id(owner), f"{prefix}.{name}".lstrip("."))
    return {key: list(names.values()) for key, names in found.items()}


def _check_numbers(module: BaseArchitecture, findings: Findings) -> None:
    if not _own(type(module), "flops_per_token"):
        findings.warn(f"{findings.owner} has no flops_per_token: its runs have no MFU")
    else:
        flops = findings.attempt("flops_per_token", lambda: module.flops_per_token(8))
        if flops is not None and not (isinstance(flops[0], (int, float)) and 0 < flops[0] < float("inf")):
            findings.add("flops_per_token", "must be a finite number above 0", flops[0])
    count = findings.attempt("num_embedding_parameters", lambda: module.num_embedding_parameters())
    if count is not None and not (isinstance(count[0], int) and 0 <= count[0] <= module.num_parameters()):
        rule = f"must lie between 0 and all {module.num_parameters():,} parameters"
        findings.add("num_embedding_parameters", rule, count[0])


# -- the module with memory -------------------------------------------------------------------------------------------


@torch.no_grad()
def _with_memory(
    module: BaseArchitecture,
    target: type[BaseArchitecture],
    section: ArchitectureConfig,
    specs: dict[str, InitSpec],
    findings: Findings,
) -> BaseArchitecture:
    """The module on the CPU with its first values, by the way that the strategies take."""
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        spec = specs.get(name, InitSpec("normal", 0.02))
        parameter.copy_(draw(spec, parameter.shape, 0, name, parameter.dtype))
    for buffer in module.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() or buffer.is_complex() else 1)
    findings.attempt("reset_buffers", module.reset_buffers)
    reference = findings.attempt("__init__", lambda: target(section))
    wanted = {} if reference is None else dict(reference[0].named_buffers())
    for name, buffer in module.named_buffers():
        if name in wanted and not torch.equal(buffer, wanted[name]):
            hint = "compute them in a method reset_buffers() of the module that owns them, called in __init__ too"
            rule = f"does not restore the buffer {name!r}: memory comes without values"
            findings.add("reset_buffers", rule, hint=hint)
            buffer.copy_(wanted[name])
    return module
