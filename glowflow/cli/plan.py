"""``glowflow plan``: what a config would do, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from glowflow.cli.output import echo_json, human_bytes, human_count
from glowflow.config.schema import GlowFlowConfig

if TYPE_CHECKING:
    from glowflow.core.model import GlowFlowModel

__all__ = ["plan", "plan_document"]

_GUESSED_VOCABULARY = 50304
_GUESSED_CLASSES = 10


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option(
    "--vram", type=click.FloatRange(min=0.1), metavar="GIB", help="Say what fits into a GPU with this much memory."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(config: str, overrides: tuple[str, ...], vram: float | None, as_json: bool) -> None:
    """Show the resolved CONFIG: parameters, tokens, steps, memory per worker, kernels and why. Starts nothing."""
    from glowflow.config.loader import load_config

    document = plan_document(load_config(config, overrides), vram)
    echo_json(document) if as_json else _print(document)


def plan_document(config: GlowFlowConfig, vram: float | None = None) -> dict[str, Any]:
    """Everything that ``plan`` shows, as one JSON-able mapping."""
    import torch

    from glowflow.config.loader import to_dict, warnings
    from glowflow.core.architectures.validation import validate_architecture
    from glowflow.core.model import GlowFlowModel
    from glowflow.orchestration.preflight import resolve_accelerator
    from glowflow.training.fake_batches import media_sizes
    from glowflow.training.precision import precision_warnings

    config, found, data_note = _data(config)
    notes = validate_architecture(config)
    accelerator = resolve_accelerator(config, joined=False)
    device = "cuda" if accelerator == "gpu" or vram is not None else "cpu"
    model = GlowFlowModel(config)
    steps, batch_size = config.training.max_steps, config.training.batch_size
    # Samples with media are of unequal length, which is known only once they are read.
    tokens_per_step = None if config.layout == "bucketed" else batch_size * config.data.context
    tokens = None if tokens_per_step is None else tokens_per_step * steps
    document: dict[str, Any] = {
        "config": to_dict(config),
        "parameters": model.num_parameters(),
        "parameters_without_embedding": model.num_parameters(embedding=False),
        "parameters_by_part": _parts(config),
        "vocab_size": config.model.vocab_size,
        "data": data_note,
        "samples_per_step": batch_size,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "tokens": tokens,
        "epochs": None,
        "flops_per_token": _flops_per_token(model),
        "flops": None,
        "workers": config.resources.workers,
        "micro_batch_size": config.micro_batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "accelerator": accelerator,
        "memory_per_worker": _memory(config, device),
        "media_sizes": {name: list(size) for name, size in media_sizes(config).items()},
        "attention": _attention(config, device),
        "warnings": [
            *warnings(config),
            *notes,
            *(precision_warnings(config.training.precision, torch.device("cpu")) if device == "cpu" else []),
        ],
    }
    if document["flops_per_token"] is not None and tokens is not None:
        document["flops"] = tokens * document["flops_per_token"]
    if found is not None:
        document["epochs"] = steps * batch_size / found
    if vram is not None:
        document["vram"] = _fits(config, vram)
    return document


def _flops_per_token(model: GlowFlowModel) -> float | None:
    """Operations of one training token; None where a custom architecture does not count them."""
    try:
        return model.flops_per_token()
    except NotImplementedError:
        return None


def _parts(config: GlowFlowConfig) -> dict[str, int]:
    """Parameters of the model's direct parts, such as its encoders; {} of architectures for text alone."""
    from glowflow.config.multimodal import MultimodalConfig
    from glowflow.core.model import build_module

    if not isinstance(config.model, MultimodalConfig):
        return {}
    counts: dict[str, int] = {}
    for name, parameter in build_module(config, "meta").named_parameters():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _data(config: GlowFlowConfig) -> tuple[GlowFlowConfig, int | None, str]:
    """(the config with what the model takes from the data, sequences per epoch if they are built, a sentence)."""
    from glowflow.data.prepare import find_built
    from glowflow.training.data_sizes import with_data_sizes
    from glowflow.training.plans import training_plan

    built = find_built(config.data)
    if built is None:
        return _with_guesses(config)
    config = with_data_sizes(config, [manifest for manifest, _ in built])
    manifest = built[0][0]
    split = manifest.split(config.data.train_split)
    what = f"{split.rows:,} samples" if manifest.media else f"{split.documents:,} documents"
    sentence = f"{manifest.name}: {what}, {split.tokens:,} tokens, {human_bytes(split.text_bytes)}"
    if manifest.media:
        sentence += (
            f" of text, {manifest.media.get('images', 0):,} pictures, {manifest.media.get('audio', 0):,} recordings"
        )
    return config, training_plan(config, built).sequences_per_epoch, sentence


def _with_guesses(config: GlowFlowConfig) -> tuple[GlowFlowConfig, None, str]:
    """Of data that are not built: what is known of them beforehand, and a guess at the rest."""
    from glowflow.data.prepare import expected_vocabulary

    known, sizes, sentence = expected_vocabulary(config.data), {}, "not built yet (train builds it)"
    if config.model.vocab_size is None:
        sizes["vocab_size"] = known or _GUESSED_VOCABULARY
        if known is None:
            sentence += f"; the tokenizer is not known, {_GUESSED_VOCABULARY:,} tokens are assumed"
    classifies = getattr(config.model, "task", None) == "classification"
    if classifies and getattr(config.model, "num_classes", None) is None:
        sizes["num_classes"] = _GUESSED_CLASSES
        sentence += f"; the labels are not known, {_GUESSED_CLASSES} classes are assumed"
    model = config.model.model_copy(update=sizes)
    return config.model_copy(update={"model": model}), None, sentence


def _memory(config: GlowFlowConfig, device: str) -> dict[str, float]:
    from glowflow.training.memory import estimate_memory

    estimate = estimate_memory(config, device_type=device)
    return {**estimate.parts(), "total": estimate.total}


def _attention(config: GlowFlowConfig, device: str) -> list[dict[str, Any]]:
    """One row per kind and backend: chosen or not, and why not. Architectures without attention have none."""
    from dataclasses import asdict

    from glowflow.config.architectures import DecoderConfig
    from glowflow.core.attention.backends.base import Conditions
    from glowflow.core.attention.build import layer_specs
    from glowflow.core.attention.dispatch import explain
    from glowflow.training.precision import compute_dtype

    if not isinstance(config.model, DecoderConfig):
        return []
    conditions = Conditions.here(
        device, compute_dtype(config.training.precision), training=True, documents=config.data.document_mask
    )
    return [
        {"kind": spec.kind, **asdict(row)}
        for spec in layer_specs(config.model)
        for row in explain(spec, conditions, config.model.attention.backend)
    ]


def _fits(config: GlowFlowConfig, vram: float) -> dict[str, Any]:
    from glowflow.training.memory import estimate_memory, largest_micro_batch

    estimate = estimate_memory(config, device_type="cuda")
    return {
        "gib": vram,
        "fits": estimate.fits(vram),
        "largest_micro_batch_size": largest_micro_batch(config, vram, device_type="cuda"),
    }


def _print(document: dict[str, Any]) -> None:
    from glowflow.config.loader import load_config, to_yaml
    from glowflow.tracking.tables import table

    click.echo(to_yaml(load_config(document["config"])).rstrip())
    click.echo("\n" + table(["", ""], _rows(document)).split("\n", 2)[2])
    memory = document["memory_per_worker"]
    click.echo(f"\nmemory per worker (estimate{_assumed(document)})")
    click.echo("\n".join(f"  {name:<12} {human_bytes(value):>12}" for name, value in memory.items()))
    if document["attention"]:
        click.echo("\nattention kernels")
    for row in document["attention"]:
        mark = "chosen" if row["chosen"] else "cannot" if row["reasons"] else "could"
        name = f"{row['kind']:<9} {row['name']:<12}"
        click.echo(f"  {name} {mark:<7} {'; '.join(row['reasons']) or row['advice']}")
    if "vram" in document:
        _print_fit(document["vram"], document["micro_batch_size"])
    for text in document["warnings"]:
        click.echo(f"\nwarning: {text}")


def _rows(document: dict[str, Any]) -> list[list[str]]:
    """What is counted, one line each."""
    epochs = "" if document["epochs"] is None else f" ({document['epochs']:.2f} epochs)"
    looked_up = document["parameters"] - document["parameters_without_embedding"]
    only = f" ({looked_up:,} of them looked up only)" if looked_up else ""
    split = f"micro-batch {document['micro_batch_size']}, {document['grad_accum_steps']} per step"
    parts = "".join(f", {name} {count:,}" for name, count in document["parameters_by_part"].items())
    return [
        ["parameters", f"{document['parameters']:,}{only}"],
        *([["of which", parts.removeprefix(", ")]] if parts else []),
        ["data", document["data"]],
        ["steps", f"{document['steps']:,} of {_per_step(document)}{epochs}"],
        ["compute", _compute(document)],
        ["workers", f"{document['workers']} on {document['accelerator']}, {split}"],
    ]


def _per_step(document: dict[str, Any]) -> str:
    each, total = document["tokens_per_step"], document["tokens"]
    if each is None:
        return f"{document['samples_per_step']:,} samples"
    return f"{each:,} tokens: {human_count(total)} tokens"


def _compute(document: dict[str, Any]) -> str:
    """Operations of the whole run, or of what can be known of it."""
    if document["flops"] is not None:
        return f"{document['flops']:.3g} FLOPs"
    if document["flops_per_token"] is None:
        return "not counted"
    without = ", the encoders of media not counted" if document["media_sizes"] else ""
    return f"{document['flops_per_token']:.3g} FLOPs per position{without}"


def _assumed(document: dict[str, Any]) -> str:
    """What the estimate of memory takes a sequence to be, where it has media."""
    sizes = document["media_sizes"]
    if not sizes:
        return ""
    named = {"image": "a picture of {} x {} pixels", "audio": "a recording of {} frames"}
    each = " and ".join(named[name].format(*size) for name, size in sizes.items())
    return f", with {each} in each sequence of {document['config']['data']['context']:,} tokens"


def _print_fit(fit: dict[str, Any], size: int) -> None:
    verdict = "fits" if fit["fits"] else "does not fit"
    click.echo(f"\nmicro-batch {size} {verdict} into {fit['gib']:g} GiB per GPU")
    largest = fit["largest_micro_batch_size"]
    if largest is None:
        click.echo(
            "not even one sequence fits: more workers with fsdp, activation_checkpointing, or a smaller data.context"
        )
    else:
        click.echo(f"largest that fits: training.micro_batch_size={largest}")
