"""``glowflow attention``: which kernel computes what, why not another, and whether all of them are right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from glowflow.cli.output import echo_json, note

if TYPE_CHECKING:
    from glowflow.config.architectures import DecoderConfig
    from glowflow.config.schema import GlowFlowConfig
    from glowflow.core.attention.backends.base import Conditions
    from glowflow.core.attention.check import CheckRow
    from glowflow.core.attention.spec import AttentionSpec

__all__ = ["attention", "explain_document"]

_DEVICE = click.Choice(["cpu", "cuda"])
_DTYPES = {"float64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@click.group()
def attention() -> None:
    """Which attention kernel is used and why; whether the kernels are right."""


@attention.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--device", type=_DEVICE, help="Explain for this device. Default: the one that training would take.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def explain(config: str, overrides: tuple[str, ...], device: str | None, as_json: bool) -> None:
    """Show for each kind of attention in CONFIG every kernel: chosen, usable, or why not. Starts nothing."""
    from glowflow.config.loader import load_config

    document = explain_document(load_config(config, overrides), device)
    echo_json(document) if as_json else _print_explained(document)


@attention.command()
@click.option("--device", type=_DEVICE, default="cpu", show_default=True)
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Check this one alone; may be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(_DTYPES)), help="Default: by device.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def check(device: str, backends: tuple[str, ...], dtypes: tuple[str, ...], as_json: bool) -> int:
    """Compare every kernel that is there with a float64 reference, outputs and gradients; exit code 1 on a failure."""
    import torch

    from glowflow.core.attention.check import check_attention

    rows: list[CheckRow] = []
    chosen = [getattr(torch, _DTYPES[dtype]) for dtype in dtypes]
    for row in check_attention(device, backends=backends, dtypes=chosen):
        rows.append(row)
        if row.status == "failed":
            note(f"failed: {row.backend} {row.dtype}: {row.kind}, {row.case}")
    document = _check_document(device, rows)
    echo_json(document) if as_json else _print_checked(document, rows)
    return 0 if document["ok"] else 1


def explain_document(config: GlowFlowConfig, device: str | None = None) -> dict[str, Any]:
    """Everything that ``explain`` shows, as one JSON-able mapping.

    Args:
        device: ``cpu`` or ``cuda``; None: what training would take.

    Raises:
        ConfigError: the architecture has no layers whose kernels GlowFlow chooses.
    """
    from glowflow.config.architectures import DecoderConfig
    from glowflow.config.errors import ConfigError, Problem
    from glowflow.core.attention.backends.base import Conditions
    from glowflow.core.attention.build import layer_specs
    from glowflow.orchestration.preflight import resolve_accelerator
    from glowflow.training.precision import compute_dtype

    model = config.model
    if not isinstance(model, DecoderConfig):
        rule = "is an architecture without `attention`: there is nothing to explain"
        raise ConfigError(Problem("model.arch", rule, model.arch))
    device = device or ("cuda" if resolve_accelerator(config, joined=False) == "gpu" else "cpu")
    dtype = compute_dtype(config.training.precision)
    conditions = Conditions.here(device, dtype, training=True, documents=config.data.document_mask)
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "capability": None if conditions.capability is None else "{}.{}".format(*conditions.capability),
        "backend": model.attention.backend,
        "kinds": [_explained(model, spec, conditions) for spec in layer_specs(model)],
    }


def _explained(model: DecoderConfig, spec: AttentionSpec, conditions: Conditions) -> dict[str, Any]:
    """One kind: its layers, its kernels, and what is chosen to train and to generate."""
    from dataclasses import asdict, replace

    from glowflow.core.attention.dispatch import explain

    rows = explain(spec, conditions, model.attention.backend)
    # A named backend is meant for whole sequences.
    generating = explain(spec, replace(conditions, training=False, documents=False, decoding=True))
    return {
        "kind": spec.kind,
        "layers": _layers(model, spec),
        "chosen": next((row.name for row in rows if row.chosen), None),
        "chosen_to_generate": next((row.name for row in generating if row.chosen), None),
        "backends": [asdict(row) for row in rows],
    }


def _layers(model: DecoderConfig, spec: AttentionSpec) -> list[int]:
    """The layers that compute the spec for sequences of any length; none for what ``by_length`` turns to."""
    from glowflow.core.attention.build import layer_spec

    def specs(layer: int) -> list[AttentionSpec]:
        kind = model.attention.layer_kind(layer)
        return [layer_spec(model, one) for one in (("windowed", "linear") if kind == "gated" else (kind,))]

    return [layer for layer in range(model.depth) if spec in specs(layer)]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 4] -> "0-2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print_explained(document: dict[str, Any]) -> None:
    from glowflow.tracking.tables import table

    gpu = f", compute capability {document['capability']}" if document["capability"] else ""
    click.echo(f"training in {document['dtype']} on {document['device']}{gpu}; backend: {document['backend']}")
    for kind in document["kinds"]:
        layers = f"layer{'' if len(kind['layers']) == 1 else 's'} {_ranges(kind['layers'])}"
        where = layers if kind["layers"] else "long sequences"
        click.echo(f"\n{kind['kind']} ({where})")
        click.echo(table(["backend", "", "why"], [line for row in kind["backends"] for line in _lines(row)]))
        generating = kind["chosen_to_generate"] or "nothing can serve; override with model.attention.backend=auto"
        click.echo(f"to train: {kind['chosen'] or 'nothing can serve'}; to generate with a cache: {generating}")


def _lines(row: dict[str, Any]) -> Iterable[list[str]]:
    """One line per reason."""
    verdict = "chosen" if row["chosen"] else "cannot" if row["reasons"] else "usable"
    for number, text in enumerate(row["reasons"] or [row["advice"]]):
        yield ["" if number else row["name"], "" if number else verdict, text]


def _check_document(device: str, rows: list[CheckRow]) -> dict[str, Any]:
    from dataclasses import asdict

    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "device": device,
        "device_name": name,
        "torch": torch.__version__,
        "ok": all(row.status != "failed" for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def _print_checked(document: dict[str, Any], rows: list[CheckRow]) -> None:
    """One line per kind, kernel and type with its worst errors; failures in full; why the others were not checked."""
    from glowflow.tracking.tables import table

    click.echo(f"{document['device_name']}, torch {document['torch']}: relative errors against float64")
    groups: dict[tuple[str, str, str], list[CheckRow]] = {}
    for row in rows:
        if row.status != "cannot":
            groups.setdefault((row.kind, row.backend, row.dtype), []).append(row)
    click.echo(
        table(["kind", "backend", "dtype", "cases", "output", "gradients", ""], list(map(_summary, groups.values())))
    )
    for row in (row for row in rows if row.status == "failed"):
        click.echo(f"\nfailed: {row.backend} in {row.dtype}: {row.kind}, {row.case} {row.note}".rstrip())
        for name, error in row.errors.items():
            mark = "" if error <= row.limits[name] else "  <- too far off"
            click.echo(f"  {name:<7} {error:.2e}  (at most {row.limits[name]:.2e}){mark}")
    _print_refusals(rows)


def _summary(rows: list[CheckRow]) -> list[object]:
    outputs = [row.errors["out"] for row in rows if row.errors]
    gradients = [error for row in rows for name, error in row.errors.items() if name != "out"]
    failed = sum(row.status == "failed" for row in rows)
    verdict = f"{failed} failed" if failed else rows[0].note or "ok"
    worst = [f"{max(errors):.1e}" if errors else "-" for errors in (outputs, gradients)]
    return [rows[0].kind, rows[0].backend, rows[0].dtype, len(rows), *worst, verdict]


def _print_refusals(rows: list[CheckRow]) -> None:
    """Kernels that served no case at all, with what stood in the way of the first case of a kind of theirs."""
    served = {row.backend for row in rows if row.status != "cannot"}
    refused: dict[str, str] = {}
    for row in rows:
        if row.backend not in served and "computes only" not in row.note:
            refused.setdefault(row.backend, row.note)
    if refused:
        click.echo("\nnot checked here")
        click.echo("\n".join(f"  {name:<13} {reasons}" for name, reasons in refused.items()))
