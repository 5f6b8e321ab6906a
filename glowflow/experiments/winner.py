"""The best trial of a sweep as a config of its own: the file that trains the same model again, or for longer."""

from __future__ import annotations

from pathlib import Path

from glowflow.config.errors import Problem, RunError
from glowflow.config.loader import apply_overrides, load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.config.space import Space
from glowflow.experiments.journal import Trial, best_trial, read_journal

__all__ = ["winner"]


def winner(sweep_dir: str | Path) -> tuple[Trial, GlowFlowConfig]:
    """The best trial, and the sweep's config with that trial's values, seed and threads.

    Returns:
        (trial, config); the config's tracking is that of the sweep's config, so a run of it is an ordinary one.

    Raises:
        RunError: no trial has a result.
    """
    state = read_journal(sweep_dir)
    best = best_trial(state)
    if best is None:
        raise RunError(Problem(Path(sweep_dir).name, "no trial of the sweep has a result yet"))
    space = Space.from_dict(state.about["space"])
    changes = {**space.fixed, **best.params, "training.seed": best.seed}
    own = Path(sweep_dir) / best.id / "config.yaml"
    if own.is_file():
        # A sum depends on the number of threads in its last digits.
        changes["training.threads"] = load_config(own, strict=False).training.threads
    return best, apply_overrides(load_config(state.about["config"], strict=False), changes)
