"""The best trial of a sweep as a config of its own: the file that trains the same model again, or for longer.

Of a sweep on a proxy it is the config at the full width, with what the proxy found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glowflow.config.errors import Problem, RunError
from glowflow.config.loader import apply_overrides, load_config, to_dict, to_yaml
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space
from glowflow.config.spaces.proxy import Proxy
from glowflow.experiments.journal import SweepState, Trial, best_trial, read_journal

__all__ = ["FULL_WIDTH_NAME", "Winner", "config_of", "winner", "write_full_width"]

FULL_WIDTH_NAME = "best_full.yaml"
"""The winner of a sweep on a proxy, in the sweep's directory."""


def config_of(state: SweepState, *, strict: bool = True) -> GlowFlowConfig:
    """The config that the trials of a sweep vary.

    What was never set stays a default, so that a point may choose another architecture or optimiser, as in the sweep;
    unless defaults are no longer those of the sweep.

    Args:
        strict: as in `load_config`.
    """
    whole = load_config(state.about["config"], strict=strict)
    if state.about.get("given") is None:
        return whole
    given = load_config(state.about["given"], strict=strict)
    return given if to_dict(given) == to_dict(whole) else whole


@dataclass(frozen=True)
class Winner:
    """The best trial of a sweep, and what trains it again.

    Args:
        sweep: name of the sweep.
        trial: the best one.
        config: the sweep's, with the trial's values and seed; its tracking is the sweep's config's own, so a run of it
            is an ordinary one. Of a sweep on a proxy it has the full width, and resources and threads of its own.
        proxy: what the trial trained in place of the full width.
    """

    sweep: str
    trial: Trial
    config: GlowFlowConfig
    proxy: Proxy | None

    def to_yaml(self) -> str:
        """The config as the text of a file, which says where it comes from."""
        head = f"# {self.sweep}/{self.trial.id}, the best trial of the sweep {self.sweep}"
        head += "" if self.proxy is None else f", {self.proxy}"
        return f"{head}\n{to_yaml(self.config)}"


def winner(sweep_dir: str | Path) -> Winner:
    """The best trial as a config.

    Raises:
        RunError: no trial has a result.
    """
    state, name = read_journal(sweep_dir), Path(sweep_dir).name
    best = best_trial(state)
    if best is None:
        raise RunError(Problem(name, "no trial of the sweep has a result yet"))
    space, proxy = Space.from_dict(state.about["space"]), Proxy.from_dict(state.about.get("proxy"))
    changes = {**space.fixed, **best.params, "training.seed": best.seed}
    own = Path(sweep_dir) / best.id / "config.yaml"
    if proxy is not None:
        changes = {key: value for key, value in changes.items() if not key.startswith("resources.")} | proxy.full
    elif own.is_file():
        # A sum depends on the number of threads in its last digits.
        changes["training.threads"] = load_config(own, strict=False).training.threads
    return Winner(name, best, apply_overrides(config_of(state, strict=False), changes), proxy)


def write_full_width(sweep_dir: Path) -> Path | None:
    """Write the winner of a sweep on a proxy beside its journal; None where there is no proxy or no result yet."""
    state = read_journal(sweep_dir)
    if state.about.get("proxy") is None or best_trial(state) is None:
        return None
    path = sweep_dir / FULL_WIDTH_NAME
    path.write_text(winner(sweep_dir).to_yaml(), encoding="utf-8")
    return path
