"""Everything that is known before a sweep starts: its config and space, checked; what it may go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glowflow.config.errors import ConfigError, Problem, RunError
from glowflow.config.loader import apply_overrides, config_fingerprint, load_config, to_dict
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space, check_space, load_space
from glowflow.config.spaces.proxy import Proxy, make_proxy, transfer_doubts, transfer_rules
from glowflow.experiments.journal import SweepState, find_sweep, read_journal
from glowflow.experiments.searchers import history_of_sweep, make_strategy
from glowflow.orchestration import cluster, preflight
from glowflow.orchestration.sweep.settings import SweepSettings, settle
from glowflow.tracking.client import default_uri
from glowflow.tracking.runrecord import new_run_name

__all__ = [
    "Prepared",
    "check_same",
    "has_work_left",
    "history_for",
    "prepare_sweep",
    "settle_here",
    "settle_on_cluster",
]


class Prepared:
    """A sweep that was checked: what it would run, and where. Nothing is written yet.

    Args:
        config: the base config, with ``data`` and everything that trials share.
        space: the space, with the command line's changes.
        settings: resources and intervals.
        warnings: for the user.
        proxy: the narrow model that ``config`` has in place of the user's own; None: it has the user's.
    """

    def __init__(
        self,
        config: GlowFlowConfig,
        space: Space,
        settings: SweepSettings,
        warnings: Sequence[str],
        proxy: Proxy | None = None,
    ) -> None:
        self.config, self.space, self.settings, self.warnings = config, space, settings, list(warnings)
        self.proxy = proxy

    @property
    def max_steps(self) -> int:
        """Steps of a trial that is not stopped."""
        return apply_overrides(self.config, self.space.fixed).training.max_steps

    def points(self) -> list[Mapping[str, Any]] | None:
        """The points where they are known beforehand: all but those of a searcher that learns."""
        if self.space.searcher.name not in ("random", "grid", "variants") and not self.space.variants:
            return None
        strategy = make_strategy(self.space, self.config)
        found: list[Mapping[str, Any]] = []
        while (ask := strategy.ask()) is not None:
            found.append({"point": ask.point, "label": ask.label, "params": ask.params})
        return found


def prepare_sweep(
    config: str | os.PathLike[str] | GlowFlowConfig,
    space: str | os.PathLike[str] | Mapping[str, Any] | Space,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    proxy: str | None = None,
) -> Prepared:
    """Load and check everything that this machine can tell.

    Args:
        config: the experiment. overrides: ``key=value`` changes of it, for every trial.
        space: what to search. changes: of its settings: trials, seeds, time_budget, ...
        name: of the sweep; default: config, space and the time.
        proxy: ``width=128``: trials train a narrow model, whose winner is exported at the config's own width.

    Raises:
        GlowFlowError: with all problems of the config, the proxy, the space or the resources.
    """
    base, loaded = load_config(config, overrides), load_space(space, changes or {})
    narrow: Proxy | None = None
    if proxy is None:
        warnings = check_space(loaded, base)
    else:
        narrow, warnings = _check_proxy(base, loaded, proxy)
        base = apply_overrides(base, narrow.changes)
    shared = apply_overrides(base, loaded.fixed)
    joined = cluster.ray_address(shared) is not None
    warnings += preflight.preflight(shared, local=not joined and shared.resources.workers == 1, new_run=False)
    stem = Path(config).stem if isinstance(config, (str, os.PathLike)) else shared.data.dataset
    sweep_dir = preflight.storage_dir(base) / (name or new_run_name(f"{stem}-{loaded.name}"))
    problem = preflight.run_name_problem(sweep_dir.name)
    if problem is not None:
        raise ConfigError(Problem("--name", problem.rule, sweep_dir.name))
    if name is not None and sweep_dir.exists():
        hint = f"choose another, or go on with `glowflow sweep --resume {name}`"
        raise RunError(Problem("--name", "a sweep or run of this name exists", name, hint))
    settings = settle_here(base, shared, loaded, sweep_dir)
    return Prepared(base, loaded, settings, warnings, narrow)


def _check_proxy(config: GlowFlowConfig, space: Space, text: str) -> tuple[Proxy, list[str]]:
    """The proxy that is asked for and warnings; what is wrong with it and with the space comes out at once."""
    proxy, problems = make_proxy(config, text)
    problems += transfer_rules(space)
    warnings = list(transfer_doubts(space))
    try:
        # Without a proxy the space is still held against something.
        warnings += check_space(space, config if proxy is None else apply_overrides(config, proxy.changes))
    except ConfigError as error:
        unknown = {found.key for found in error.problems if found.rule.endswith("not a known key")}
        problems = [*(found for found in problems if found.key not in unknown), *error.problems]
    if proxy is None or problems:
        raise ConfigError(problems, f"--proxy {text}")
    return proxy, warnings


def settle_here(base: GlowFlowConfig, shared: GlowFlowConfig, space: Space, sweep_dir: Path) -> SweepSettings:
    joined = cluster.ray_address(shared) is not None
    if joined:
        # Known only inside; until then what the cluster has is taken as enough.
        return settle(base, space, sweep_dir, cpus=1e6, gpus=10**6, accelerator=shared.resources.accelerator)
    accelerator = preflight.resolve_accelerator(shared, joined=False)
    gpus = 0
    if accelerator == "gpu":
        import torch

        gpus = torch.cuda.device_count()
    return settle(base, space, sweep_dir, cpus=cluster.logical_cpus(), gpus=gpus, accelerator=accelerator)


def settle_on_cluster(prepared: Prepared, shared: GlowFlowConfig) -> SweepSettings:
    preflight.check_cluster(shared)
    nodes = cluster.cluster_cpus()
    accelerator = preflight.resolve_accelerator(shared, joined=True)
    sweep_dir = prepared.settings.sweep_dir
    cpus, gpus = sum(nodes["CPU"]), int(sum(nodes["GPU"]))
    return settle(prepared.config, prepared.space, sweep_dir, cpus=cpus, gpus=gpus, accelerator=accelerator)


def check_same(
    state: SweepState, config: str | None, space: str | None, overrides: Sequence[str], text: str | None = None
) -> None:
    """Refuse to go on with another config, space or proxy (``text``); what is None is the sweep's own."""
    problems = []
    proxy = Proxy.from_dict(state.about.get("proxy"))
    if text is not None:
        own = None if proxy is None else f"width={proxy.width}"
        if text.replace(" ", "") != own:
            rule = f"differs from that of the sweep, which has {own or 'none'}"
            problems.append(Problem("--proxy", rule, text, "leave it out to go on with the sweep's own"))
    if config is not None:
        given = config_fingerprint(apply_overrides(load_config(config, overrides), proxy.changes if proxy else {}))
        if given != state.about["config_fingerprint"]:
            rule = "differs from the config that the sweep was begun with"
            problems.append(Problem("CONFIG", rule, config, "leave it out to go on with the sweep's own"))
    if space is not None and load_space(space).digest != state.about["space"]["digest"]:
        rule = "differs from the space that the sweep was begun with"
        problems.append(Problem("SPACE", rule, space, "leave it out, or start a new sweep"))
    if problems:
        raise RunError(problems, title="A sweep is resumed as it was begun")


def has_work_left(prepared: Prepared, state: SweepState) -> bool:
    settings = prepared.settings
    over = sum(trial.status in ("FINISHED", "STOPPED", "FAILED") for trial in state.trials.values())
    return over < settings.num_points * len(settings.seeds)


def history_for(source: str, prepared: Prepared) -> list[tuple[dict[str, Any], list[float]]]:
    space = prepared.space
    if source.startswith("mlflow:"):
        from glowflow.tracking.family import history_from_mlflow

        uri = default_uri(prepared.config.tracking.storage, prepared.config.tracking.uri)
        fixed = {key: value for key, value in _flat(to_dict(prepared.config)).items() if key.startswith("model.")}
        fixed = {key: value for key, value in fixed.items() if key not in space.keys()}
        return list(history_from_mlflow(uri, source.removeprefix("mlflow:"), space.keys(), fixed, space.metrics))
    earlier = read_journal(find_sweep(preflight.storage_dir(prepared.config), source))
    return list(history_of_sweep(earlier, space))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
