"""``glowflow eval``: how well a model predicts held-out text, and what it makes of pictures and recordings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from glowflow.cli.output import echo_json, note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["evaluate"]

_MEDIA = ["image", "audio"]
_SECONDS = 10.0  # an evaluation that takes longer tells how far it is


@click.command()
@click.argument("target")
@click.option("--dataset", help="Another data set than the run's own: catalogue name or path.")
@click.option("--split", help="Default: the config's data.val_split.")
@click.option("--context", type=click.IntRange(min=2), help="Tokens per sequence; default: the config's data.context.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Sequences at once.")
@click.option("--best", metavar="METRIC", help="Of a run, take the checkpoint that is best in METRIC, not the newest.")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(_MEDIA),
    help="Remove this modality from every sample; may be given twice.",
)
@click.option(
    "--permute",
    type=click.Choice([*_MEDIA, "all"]),
    help="Measure with the media of another sample too, and compare the two pair by pair.",
)
@click.option("--against", metavar="TARGET", help="Another model of the same samples, compared pair by pair.")
@click.option("--answers", is_flag=True, help="Write the answer to every prompt, and count those that are all right.")
@click.option("--bleu", is_flag=True, help="Write a text about every picture (group): BLEU against all its texts.")
@click.option("--beams", type=click.IntRange(min=1), default=1, show_default=True, help="Of --bleu; 1: greedy.")
@click.option("--limit", type=click.IntRange(min=1), help="Answers to the first N samples, texts about N pictures.")
@click.option(
    "--predictions",
    metavar="FILE.jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write there what was written or predicted, one JSON document a line.",
)
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
    against: str | None,
    **asked: Any,
) -> None:
    """Measure TARGET (a run, a checkpoint directory, an exported file) on a whole split.

    Perplexity and bits per byte of text; of a model that reads pictures and recordings the perplexity of the text with
    them, accuracy of a classifier, retrieval of a contrastive model; all with 95 % intervals.
    """
    from glowflow.evaluation.load import load_manifest, load_target
    from glowflow.evaluation.sample_options import SampleOptions, require_possible

    loaded = load_target(target, storage, best_metric=best)
    options = SampleOptions(**asked)
    require_possible(options, loaded.config)
    other = None if against is None else load_target(against, storage, best_metric=best)
    manifest = load_manifest(loaded, dataset=dataset)
    sizes: dict[str, Any] = {"split": split, "context": context, "batch_size": batch_size}
    measured = measure(loaded, manifest, **sizes, options=options, against=other)
    if as_json:
        echo_json({"target": target, "checkpoint": str(loaded.path), "step": loaded.step, **measured})
        return
    title = f"{target} at step {loaded.step:,} on {manifest.name}, {measured['split']}"
    if measured["layout"] == "bucketed":
        from glowflow.cli.sample_report import report_lines

        for line in report_lines(title, measured):
            click.echo(line)
        return
    click.echo(f"{title}: {_extent(measured)}")
    for name, label in (("loss", "nats per token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if measured.get(name) is not None:
            low, high = measured["confidence"][name]
            click.echo(f"  {label:<15} {measured[name]:9.4f}   95 % interval {low:.4f} to {high:.4f}")


def _extent(measured: dict[str, Any]) -> str:
    return f"{measured['tokens']:,} tokens of {measured['documents']:,} documents in {measured['seconds']:.1f} s"


def measure(
    loaded: Any,
    manifest: Any,
    *,
    split: str | None,
    context: int | None,
    batch_size: int,
    options: Any = None,
    against: Any = None,
) -> dict[str, Any]:
    """What ``eval`` reports, on a GPU where there is one."""
    import torch

    from glowflow.evaluation.analyzer import ModelAnalyzer
    from glowflow.evaluation.samples import evaluate_samples

    config = loaded.config
    device = "cuda" if torch.cuda.is_available() and config.resources.accelerator != "cpu" else "cpu"
    common: dict[str, Any] = {"context": context or config.data.context, "batch_size": batch_size, "progress": _Dots()}
    split = split or config.data.val_split
    if config.layout == "bucketed":
        return evaluate_samples(loaded, manifest, split, options, device=device, against=against, **common)
    if against is not None:
        rule = f"compares models that read samples (data.layout bucketed); the layout of this one is {config.layout}"
        raise ConfigError(Problem("--against", rule, hint="`glowflow runs compare` compares other runs"))
    analyzer = ModelAnalyzer(loaded.module, loaded.tokenizer_spec, device=device)
    return analyzer.perplexity(manifest, split, document_mask=config.data.document_mask, layout=config.layout, **common)


class _Dots:
    """A line on stderr every tenth of a long evaluation, of each of its passes."""

    def __init__(self) -> None:
        self._last, self._started = 0, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        self._last = min(self._last, tenth)  # the next pass begins
        if tenth > self._last and time.monotonic() - self._started > _SECONDS:
            self._last = tenth
            note(f"evaluated {tenth * 10} %")
