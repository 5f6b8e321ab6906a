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
    from glowflow.training.precision import precision_warnings

    found, vocabulary, data_note = _data(config)
    if config.model.vocab_size is None:
        config = GlowFlowModel(config, {"vocab_size": vocabulary}).config
    notes = validate_architecture(config)
    accelerator = resolve_accelerator(config, joined=False)
    device = "cuda" if accelerator == "gpu" or vram is not None else "cpu"
    model = GlowFlowModel(config)
    tokens_per_step = config.training.batch_size * config.data.context
    document: dict[str, Any] = {
        "config": to_dict(config),
        "parameters": model.num_parameters(),
        "parameters_without_embedding": model.num_parameters(embedding=False),
        "vocab_size": config.model.vocab_size,
        "data": data_note,
        "tokens_per_step": tokens_per_step,
        "steps": config.training.max_steps,
        "tokens": tokens_per_step * config.training.max_steps,
        "epochs": None,
        "flops": _flops(model, tokens_per_step * config.training.max_steps),
        "workers": config.resources.workers,
        "micro_batch_size": config.micro_batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "accelerator": accelerator,
        "memory_per_worker": _memory(config, device),
        "attention": _attention(config, device),
        "warnings": [
            *warnings(config),
            *notes,
            *(precision_warnings(config.training.precision, torch.device("cpu")) if device == "cpu" else []),
        ],
    }
    if found is not None:
        document["epochs"] = config.training.max_steps * config.training.batch_size / found
    if vram is not None:
        document["vram"] = _fits(config, vram)
    return document


def _flops(model: GlowFlowModel, tokens: int) -> float | None:
    """Operations of the whole training; None where a custom architecture does not count them."""
    try:
        return tokens * model.flops_per_token()
    except NotImplementedError:
        return None


def _data(config: GlowFlowConfig) -> tuple[int | None, int, str]:
    """(sequences per epoch if the data is built, size of the vocabulary, a sentence)."""
    from glowflow.data.plan import plan as make_plan
    from glowflow.data.prepare import expected_vocabulary, find_built

    built = find_built(config.data)
    if built is None:
        known = expected_vocabulary(config.data)
        sentence = "not built yet (train builds it)"
        if known is None and config.model.vocab_size is None:
            sentence += f"; the tokenizer is not known, {_GUESSED_VOCABULARY:,} tokens are assumed"
        return None, config.model.vocab_size or known or _GUESSED_VOCABULARY, sentence
    made = make_plan(
        built,
        seed=config.training.seed,
        context=config.data.context,
        global_batch=config.training.batch_size,
        layout=config.layout,
        split=config.data.train_split,
        window_tokens=config.data.window_tokens,
    )
    split = built[0][0].split(config.data.train_split)
    sentence = (
        f"{built[0][0].name}: {split.documents:,} documents, {split.tokens:,} tokens, {human_bytes(split.text_bytes)}"
    )
    return made.sequences_per_epoch, built[0][0].tokenizer().vocab_size, sentence


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
    click.echo("\nmemory per worker (estimate)")
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
    each, total = document["tokens_per_step"], human_count(document["tokens"])
    split = f"micro-batch {document['micro_batch_size']}, {document['grad_accum_steps']} per step"
    return [
        ["parameters", f"{document['parameters']:,}{only}"],
        ["data", document["data"]],
        ["steps", f"{document['steps']:,} of {each:,} tokens: {total} tokens{epochs}"],
        ["compute", "not counted" if document["flops"] is None else f"{document['flops']:.3g} FLOPs"],
        ["workers", f"{document['workers']} on {document['accelerator']}, {split}"],
    ]


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
