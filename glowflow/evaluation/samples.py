"""``evaluate_samples``: a model of samples with media on a whole split, whatever its task.

Language modelling: perplexity of the text, also with media of other samples, answers, and texts about pictures (BLEU).
Classification: accuracy and tables of the classes. Contrastive: retrieval.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from glowflow.config.errors import ConfigError, Problem
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.data.manifest import Manifest
from glowflow.evaluation.analyzer import check_tokenizer
from glowflow.evaluation.classes import measure_classes
from glowflow.evaluation.load import Target
from glowflow.evaluation.perplexity import SampleLosses, sample_losses, summary
from glowflow.evaluation.perplexity import against as compared
from glowflow.evaluation.retrieval import measure_retrieval
from glowflow.evaluation.sample_options import SampleOptions, require_possible
from glowflow.evaluation.sample_reader import Progress, SampleReader
from glowflow.evaluation.writing import measure_answers, measure_bleu, save_lines

__all__ = ["evaluate_samples"]


def evaluate_samples(
    target: Target,
    manifest: Manifest,
    split: str | None = None,
    options: SampleOptions | None = None,
    *,
    context: int | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    against: Target | None = None,
) -> dict[str, Any]:
    """Measure a model whose layout is ``bucketed``.

    Args:
        target: the model.
        manifest: data built with its tokenizer.
        split: default: ``data.val_split`` of its config.
        options: what is measured beside the task's own numbers.
        context: longest sample; default: the config's.
        batch_size: samples at once; changes nothing but the speed.
        device, precision: how it is computed.
        resamples, seed: of the bootstrap over groups.
        progress: called with (steps done, steps in all).
        against: another model of language, measured on the same samples and compared with the first one.

    Returns:
        ``task``, what was measured on, and the numbers of the task: see ``perplexity.summary`` (and ``answers``,
        ``bleu``, ``against`` of their options), ``measure_classes``, ``measure_retrieval``.

    Raises:
        ConfigError: options that the model or its task cannot serve, all of them together.
        DataError: data of another tokenizer, no such split, or nothing in it to measure.
    """
    options = options or SampleOptions()
    config = target.config
    require_possible(options, config)
    check_tokenizer(target.tokenizer_spec, manifest)
    if against is not None:
        _require_comparable(config, against.config)
        check_tokenizer(against.tokenizer_spec, manifest)
    started = time.perf_counter()
    module, device = target.module.to(device), torch.device(device)
    split = split or config.data.val_split
    where = (manifest, split, device, precision, context, batch_size)
    reader = SampleReader(module, config, *where, options.without, progress)
    other = None
    if against is not None:
        other = SampleReader(against.module.to(device), against.config, *where, (), progress)
    written: list[Iterable[Any]] = []
    result = _measured(reader, other, options, written, {"resamples": resamples, "seed": seed})
    if options.predictions is not None:
        save_lines((record for records in written for record in records), options.predictions)
    return {"task": _task(config), **result, **reader.about(), "seconds": time.perf_counter() - started}


def _measured(
    reader: SampleReader,
    other: SampleReader | None,
    options: SampleOptions,
    written: list[Iterable[Any]],
    bootstrap: dict[str, int],
) -> dict[str, Any]:
    """The numbers of the task; what was predicted or written is added to ``written``."""
    task = _task(reader.config)
    if task == "classification":
        result, predicted = measure_classes(reader, **bootstrap)
        written.append(predicted)
        return result
    if task == "contrastive":
        return measure_retrieval(reader, **bootstrap)
    losses = sample_losses(reader, _permuted(options, reader.config))
    result = _language(reader, losses, options, written, bootstrap)
    if other is not None:
        result["against"] = compared(losses, sample_losses(other), **bootstrap)
    return result


def _task(config: GlowFlowConfig) -> str:
    return config.model.task if isinstance(config.model, MultimodalConfig) else "language_modelling"


def _permuted(options: SampleOptions, config: GlowFlowConfig) -> tuple[str, ...]:
    return options.permuted(config.model) if isinstance(config.model, MultimodalConfig) else ()


def _require_comparable(*configs: GlowFlowConfig) -> None:
    """Both must be models of language that read samples."""
    for config in configs:
        if config.layout != "bucketed" or _task(config) != "language_modelling":
            rule = "compares models of language that read samples (arch multimodal, task language_modelling)"
            raise ConfigError(Problem("--against", rule, f"{config.model.arch}, {_task(config)}"))


def _language(
    reader: SampleReader,
    losses: SampleLosses,
    options: SampleOptions,
    written: list[Iterable[Any]],
    bootstrap: dict[str, int],
) -> dict[str, Any]:
    result = summary(losses, _permuted(options, reader.config), **bootstrap)
    if options.answers:
        result["answers"], answers = measure_answers(reader, limit=options.limit, **bootstrap)
        written.append(answers)
    if options.bleu:
        result["bleu"], texts = measure_bleu(reader, beams=options.beams, limit=options.limit, **bootstrap)
        written.append(texts)
    return result
