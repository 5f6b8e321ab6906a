"""What is asked of an evaluation of samples, and whether the model can answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig

__all__ = ["SampleOptions", "require_possible"]


@dataclass(frozen=True)
class SampleOptions:
    """What is measured beside the task's own numbers.

    Args:
        without: modalities that are removed from every sample.
        permute: ``image``, ``audio`` or ``all``: also measure with the media of another sample.
        answers: write the answer to every prompt, and compare it with the sample's.
        bleu: write a text for every group, and compare it with all texts of the group.
        beams: of the search for these texts; 1: greedy.
        limit: write answers for the first samples, texts for the first groups only.
        predictions: JSON lines file for what was written or predicted.
    """

    without: tuple[str, ...] = ()
    permute: str | None = None
    answers: bool = False
    bleu: bool = False
    beams: int = 1
    limit: int | None = None
    predictions: Path | None = None

    def permuted(self, config: MultimodalConfig) -> tuple[str, ...]:
        """The modalities whose media come from other samples."""
        if self.permute is None:
            return ()
        return config.modalities if self.permute == "all" else (self.permute,)

    @property
    def given(self) -> list[str]:
        """Names of the command's options that were given."""
        names = {
            "--without": self.without,
            "--permute": self.permute,
            "--answers": self.answers,
            "--bleu": self.bleu,
            "--beams": self.beams > 1,
            "--limit": self.limit,
            "--predictions": self.predictions,
        }
        return [name for name, value in names.items() if value]


def require_possible(options: SampleOptions, config: GlowFlowConfig) -> None:
    """Refuse what the model cannot do.

    Raises:
        ConfigError: with everything that is wrong.
    """
    if config.layout != "bucketed":
        rule = f"needs a model of samples (data.layout bucketed); the layout of this one is {config.layout}"
        if options.given:
            raise ConfigError([Problem(name, rule) for name in options.given])
        return
    model = config.model
    problems = _general(options)
    if not isinstance(model, MultimodalConfig):
        rule = f"needs a model that reads media, and this one is {model.arch}"
        problems += [Problem(name, rule) for name in options.given if name in ("--without", "--permute")]
        task = "language_modelling"
    else:
        problems += _of_modalities(options, model, config.data.without)
        task = model.task
    if task != "language_modelling":
        rule = f"needs model.task language_modelling, and the model was trained for {task}"
        names = [name for name in options.given if name in ("--permute", "--answers", "--bleu")]
        problems += [Problem(name, rule) for name in names]
    writes = options.answers or options.bleu
    if options.predictions is not None and not writes and task != "classification":
        problems.append(Problem("--predictions", "has nothing to write down", hint="add --answers or --bleu"))
    if options.limit is not None and not writes:
        problems.append(Problem("--limit", "limits what is written with --answers or --bleu; give one of them"))
    if problems:
        raise ConfigError(problems)


def _general(options: SampleOptions) -> list[Problem]:
    problems = []
    if options.beams < 1:
        problems.append(Problem("--beams", "must be at least 1", options.beams))
    elif options.beams > 1 and not options.bleu:
        problems.append(Problem("--beams", "is of the texts of --bleu, which is not given"))
    if options.limit is not None and options.limit < 1:
        problems.append(Problem("--limit", "must be at least 1", options.limit))
    return problems


def _of_modalities(options: SampleOptions, model: MultimodalConfig, left_out: Sequence[str]) -> list[Problem]:
    """Removed and permuted modalities must be there."""
    reads = ", ".join(model.modalities) or "text alone"
    problems = [
        Problem("--without", f"the model reads no {name} (it reads {reads})", name)
        for name in dict.fromkeys(options.without)
        if name not in model.modalities
    ]
    if model.task == "contrastive" and options.without:
        problems.append(Problem("--without", "leaves nothing to find for a model of task contrastive"))
    if options.permute is None:
        return problems
    if options.permute == "all" and not model.modalities:
        problems.append(Problem("--permute", "the model reads text alone", "all"))
    for name in options.permuted(model):
        if name not in model.modalities:
            problems.append(Problem("--permute", f"the model reads no {name} (it reads {reads})", name))
        elif name in options.without:
            problems.append(Problem("--permute", f"{name} is removed by --without", options.permute))
        elif name in left_out:
            problems.append(Problem("--permute", f"the run leaves {name} out (data.without)", options.permute))
    return problems
