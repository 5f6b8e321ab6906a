"""From what a person names (a run, a checkpoint directory, an exported file) to a model with config and tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glowflow.config.errors import CheckpointError, ConfigError, Problem
from glowflow.config.loader import load_config
from glowflow.config.schema import DataConfig, GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.prepare import ensure_built
from glowflow.data.processors.text import tokenizer_from_spec
from glowflow.evaluation.analyzer import check_tokenizer
from glowflow.tracking.runrecord import RECORD_NAME, find_run
from glowflow.training.checkpoint import load_full_state_dict, read_extra, resolve_checkpoint

__all__ = ["Target", "export_target", "load_manifest", "load_target"]

logger = logging.getLogger(__name__)

_FILES = (".pt", ".safetensors")


@dataclass(frozen=True)
class Target:
    """A model ready for use.

    ``path`` is the file or checkpoint directory that it came from; ``run_dir`` the run around it, if there is one.
    """

    model: GlowFlowModel
    tokenizer_spec: dict[str, Any]
    step: int
    path: Path
    run_dir: Path | None

    @property
    def module(self) -> BaseArchitecture:
        """The parameters, on the CPU in fp32, in evaluation mode."""
        return self.model.module.eval()

    @property
    def config(self) -> GlowFlowConfig:
        """The whole config that it was trained with."""
        return self.model.config


def load_target(target: str | Path, storage: str | Path = "runs", *, best_metric: str | None = None) -> Target:
    """Load the model that a person means.

    Args:
        target: a run's name or directory (its newest complete checkpoint), a directory ``step-N``, or a .pt or
            .safetensors file.
        storage: where runs are looked for by name.
        best_metric: of a run, take the checkpoint that is best in this metric instead of the newest.

    Raises:
        RunError: no such run. CheckpointError: no complete checkpoint, a damaged one, or of another architecture.
    """
    path = _locate(target, Path(storage).expanduser())
    if path.is_file():
        model = GlowFlowModel.load(path)
        return _target(model, model.tokenizer_spec, path)
    checkpoint = resolve_checkpoint(path, best_metric=best_metric)
    extra = read_extra(checkpoint)
    try:
        model = GlowFlowModel(load_config(extra["config"], strict=False), extra["tokenizer"])
    except KeyError as error:
        raise CheckpointError(Problem(str(checkpoint), f"does not carry its {error.args[0]}")) from error
    except ConfigError as error:
        problems = [Problem(f"{checkpoint}: {p.key}", p.rule, p.value, p.hint) for p in error.problems]
        raise CheckpointError(problems or str(error), title="the checkpoint's config cannot be used") from error
    model.load_state_dict(load_full_state_dict(checkpoint), str(checkpoint))
    model.step = int(extra["step"])
    return _target(model, extra["tokenizer"], checkpoint)


def _target(model: GlowFlowModel, tokenizer_spec: dict[str, Any] | None, path: Path) -> Target:
    if tokenizer_spec is None:
        hint = "export it from a run, whose checkpoints carry the tokenizer"
        raise CheckpointError(Problem(str(path), "carries no tokenizer, so no text can go through it", hint=hint))
    run_dir = next((parent for parent in path.parents if (parent / RECORD_NAME).is_file()), None)
    return Target(model, dict(tokenizer_spec), model.step, path, run_dir)


def _locate(target: str | Path, storage: Path) -> Path:
    """The file or directory; a name that is neither is looked up among the runs, which suggests close ones."""
    given = Path(target).expanduser()
    for candidate in (given.absolute(), (storage / given).absolute()):
        # A directory in the current one that merely has the run's name is not meant.
        if candidate.is_file() or (candidate.is_dir() and _is_ours(candidate)):
            return candidate
    if given.suffix in _FILES:
        raise CheckpointError(Problem(str(target), "does not exist"))
    if given.name.startswith("step-") or given.is_dir():
        return given.absolute()  # resolve_checkpoint says what is there instead
    return find_run(storage, target)


def _is_ours(path: Path) -> bool:
    return path.name.startswith("step-") or (path / RECORD_NAME).is_file() or (path / "checkpoints").is_dir()


def load_manifest(target: Target, *, dataset: str | None = None, use_ray: bool = False) -> Manifest:
    """The data set to evaluate on: the run's own (its first source), or another one.

    What has yet to be built is built with the model's own tokenizer.

    Args:
        dataset: catalogue name, built directory or path, as in ``data.dataset``.
        use_ray: how a data set that is not built yet is built.

    Raises:
        DataError: it cannot be found or built, or has another tokenizer than the model.
    """
    data: DataConfig = target.config.data
    if dataset is not None:
        data = data.model_copy(update={"dataset": dataset, "sources": []})
    manifest = ensure_built(data, use_ray=use_ray, tokenizer=tokenizer_from_spec(target.tokenizer_spec))[0][0]
    check_tokenizer(target.tokenizer_spec, manifest)
    return manifest


def export_target(target: str | Path, storage: str | Path, file: str | Path) -> Path:
    """Write a run's or checkpoint's model as one file, .pt or .safetensors.

    Raises:
        RunError, CheckpointError: as ``load_target``; or the file cannot be written.
    """
    loaded = load_target(target, storage)
    loaded.model.save(file, loaded.step)
    logger.info("%s at step %d is in %s", loaded.path, loaded.step, file)
    return Path(file)
