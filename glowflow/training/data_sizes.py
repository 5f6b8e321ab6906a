"""What a model takes from its data: the sizes of vocabulary and classes, and whether it can read them at all."""

from __future__ import annotations

from collections.abc import Sequence

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.data.manifest import Manifest

__all__ = ["with_data_sizes"]


def with_data_sizes(config: GlowFlowConfig, manifests: Sequence[Manifest]) -> GlowFlowConfig:
    """The config with the vocabulary of the data's tokenizer, and with the data's classes where it classifies.

    Args:
        config: the whole experiment.
        manifests: the built data sets; tokenizer and labels are those of the first.

    Raises:
        ConfigError: with all reasons why the model cannot read these data.
    """
    problems = [*_reading_problems(config, manifests), *_vocabulary_problems(config, manifests[0])]
    problems += _label_problems(config, manifests)
    if problems:
        raise ConfigError(problems)
    sizes: dict[str, int] = {}
    if config.model.vocab_size is None:
        sizes["vocab_size"] = manifests[0].tokenizer().vocab_size
    if _classifies(config) and getattr(config.model, "num_classes", None) is None:
        sizes["num_classes"] = len(_labels(manifests[0]))
    if not sizes:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def _reading_problems(config: GlowFlowConfig, manifests: Sequence[Manifest]) -> list[Problem]:
    """Media need a model that reads them, and rows that hold one sample each."""
    with_media = [manifest.name for manifest in manifests if manifest.media]
    if not with_media:
        return []
    if not isinstance(config.model, MultimodalConfig) and config.model.layout != "bucketed":
        rule = f"reads text only, and {', '.join(with_media)} has pictures or recordings"
        return [Problem("model.arch", rule, config.model.arch, "set model.arch: multimodal")]
    if config.layout != "bucketed":
        rule = f"must be bucketed for {', '.join(with_media)}: a sample with its media is one sequence"
        return [Problem("data.layout", rule, config.layout, "leave it out", related=("model.arch",))]
    return []


def _vocabulary_problems(config: GlowFlowConfig, manifest: Manifest) -> list[Problem]:
    given, needed = config.model.vocab_size, manifest.tokenizer().vocab_size
    if given is None or given >= needed:
        return []
    hint = "leave it out to take the tokenizer's"
    return [Problem("model.vocab_size", f"must be at least the {needed} tokens of the tokenizer", given, hint)]


def _classifies(config: GlowFlowConfig) -> bool:
    return getattr(config.model, "task", None) == "classification"


def _labels(manifest: Manifest) -> list[str]:
    return list(manifest.media.get("labels", []))


def _label_problems(config: GlowFlowConfig, manifests: Sequence[Manifest]) -> list[Problem]:
    """Every data set must name the same classes, as many as the model tells apart."""
    if not _classifies(config):
        return []
    labels = [_labels(manifest) for manifest in manifests]
    without = [manifest.name for manifest, found in zip(manifests, labels, strict=True) if len(found) < 2]
    if without:
        rule = f"is classification, and {', '.join(without)} has no labels to tell apart"
        hint = "build the data set with data.columns.label, or set model.task: language_modelling"
        return [Problem("model.task", rule, "classification", hint)]
    if any(found != labels[0] for found in labels):
        return [Problem("data.sources", "all sources must have the same labels for model.task: classification")]
    given = getattr(config.model, "num_classes", None)
    if given is not None and given != len(labels[0]):
        rule = f"must be the {len(labels[0])} labels of {manifests[0].name}"
        return [Problem("model.num_classes", rule, given, "leave it out to take those of the data set")]
    return []
