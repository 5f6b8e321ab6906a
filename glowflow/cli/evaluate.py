"""``glowflow eval``: how well a model predicts held-out text."""

from __future__ import annotations

from typing import Any

import click

from glowflow.cli.output import echo_json, note

__all__ = ["evaluate"]


@click.command()
@click.argument("target")
@click.option("--dataset", help="Another data set than the run's own: catalogue name or path.")
@click.option("--split", help="Default: the config's data.val_split.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens per sequence; default: the config's data.context.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Sequences at once.")
@click.option("--best", metavar="METRIC", help="Of a run, take the checkpoint that is best in METRIC, not the newest.")
@click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evaluate(
    target: str,
    dataset: str | None,
    split: str | None,
    context: int | None,
    batch_size: int,
    best: str | None,
    storage: str,
    as_json: bool,
) -> None:
    """Perplexity and bits per byte of TARGET (a run, a checkpoint directory, an exported file) on a whole split."""
    from glowflow.evaluation.load import load_manifest, load_target

    loaded = load_target(target, storage, best_metric=best)
    manifest = load_manifest(loaded, dataset=dataset)
    measured = measure(loaded, manifest, split=split, context=context, batch_size=batch_size)
    if as_json:
        echo_json({"target": target, "checkpoint": str(loaded.path), "step": loaded.step, **measured})
        return
    click.echo(f"{target} at step {loaded.step:,} on {manifest.name}, {measured['split']}: {_extent(measured)}")
    for name, label in (("loss", "nats per token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if measured.get(name) is not None:
            low, high = measured["confidence"][name]
            click.echo(f"  {label:<15} {measured[name]:9.4f}   95 % interval {low:.4f} to {high:.4f}")


def _extent(measured: dict[str, Any]) -> str:
    return f"{measured['tokens']:,} tokens of {measured['documents']:,} documents in {measured['seconds']:.1f} s"


def measure(loaded: Any, manifest: Any, *, split: str | None, context: int | None, batch_size: int) -> dict[str, Any]:
    """What ``eval`` reports, on a GPU where there is one."""
    import torch

    from glowflow.evaluation.analyzer import ModelAnalyzer

    config = loaded.config
    device = "cuda" if torch.cuda.is_available() and config.resources.accelerator != "cpu" else "cpu"
    analyzer = ModelAnalyzer(loaded.module, loaded.tokenizer_spec, device=device)
    return analyzer.perplexity(
        manifest,
        split or config.data.val_split,
        context=context or config.data.context,
        batch_size=batch_size,
        document_mask=config.data.document_mask,
        layout=config.layout,
        progress=_Dots(),
    )


class _Dots:
    """A line on stderr every tenth of a long evaluation."""

    def __init__(self) -> None:
        self._last = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if total >= 200 and tenth > self._last:
            self._last = tenth
            note(f"evaluated {tenth * 10} %")
