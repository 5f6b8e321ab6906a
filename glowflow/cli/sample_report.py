"""What ``glowflow eval`` prints about a model of samples with media: one screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["report_lines"]

_MOST_CLASSES = 12  # of a confusion matrix on one screen
_WORST = 5
_WIDTH = 20  # of the names of numbers


def report_lines(title: str, measured: dict[str, Any]) -> Iterator[str]:
    """The lines of a report of ``evaluate_samples``."""
    yield f"{title}: {_extent(measured)}"
    yield from _conditions(measured)
    task = measured["task"]
    if task == "classification":
        yield from _classes(measured)
    elif task == "contrastive":
        yield from _retrieval(measured)
    else:
        yield from _language(measured)


def _extent(measured: dict[str, Any]) -> str:
    parts = [f"{measured['samples']:,} samples"]
    if measured["groups"] != measured["samples"]:
        parts.append(f"of {measured['groups']:,} groups")
    if "tokens" in measured:
        parts.append(f"with {measured['tokens']:,} tokens of text")
    return f"{' '.join(parts)} in {measured['seconds']:.1f} s"


def _conditions(measured: dict[str, Any]) -> Iterator[str]:
    if measured["without"]:
        yield f"  without {' and '.join(measured['without'])}"
    if measured["bad_samples"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in measured["bad_samples"].items())
        yield f"  left out as bad samples: {kinds}"


def _number(label: str, value: float, bounds: list[float], digits: int = 4, unit: str = "", more: str = "") -> str:
    low, high = (f"{bound:.{digits}f}{unit}" for bound in bounds)
    shown = f"{value:.{digits}f}{unit}"
    return f"  {label:<{_WIDTH}} {shown:>10}   95 % interval {low} to {high}{more}"


def _language(measured: dict[str, Any]) -> Iterator[str]:
    for name, label in (("loss", "nats per token"), ("perplexity", "perplexity")):
        yield _number(label, measured[name], measured["confidence"][name])
    if "permuted" in measured:
        yield from _permuted(measured["permuted"])
    if "against" in measured:
        other = measured["against"]
        yield f"  {'perplexity, other':<{_WIDTH}} {other['perplexity']:>10.4f}   of the model that it is compared with"
        bounds = other["confidence"]["lower_percent"]
        yield _number("this one is lower by", other["lower_percent"], bounds, digits=2, unit=" %", more=", paired")
    if "answers" in measured:
        yield from _answers(measured["answers"])
    if "bleu" in measured:
        yield from _bleu(measured["bleu"])


def _permuted(permuted: dict[str, Any]) -> Iterator[str]:
    what = " and ".join(permuted["modalities"])
    if permuted["right"] is None:
        yield f"  with another {what}: no sample got another one"
        return
    same = f" ({permuted['same']:,} kept theirs and are not compared)" if permuted["same"] else ""
    yield f"  {permuted['samples']:,} samples with the {what} of another one{same}:"
    yield f"  {'perplexity, right':<{_WIDTH}} {permuted['right']:10.4f}"
    yield f"  {'perplexity, permuted':<{_WIDTH}} {permuted['permuted']:10.4f}"
    bounds = permuted["confidence"]["lower_percent"]
    yield _number("right is lower by", permuted["lower_percent"], bounds, 2, " %", ", paired")


def _answers(answers: dict[str, Any]) -> Iterator[str]:
    more = f", {answers['samples']:,} answers"
    bounds = [100 * bound for bound in answers["confidence"]["exact"]]
    yield _number("answers all right", 100 * answers["exact"], bounds, 2, " %", more)
    if answers["unfinished"]:
        yield f"  {'too long answers':<{_WIDTH}} {answers['unfinished']:>10,}"
    shown = answers["positions"][:_MOST_CLASSES]
    if shown:
        words = " ".join(f"{100 * one['accuracy']:.1f}" for one in shown)
        yield f"  {'words right in %':<{_WIDTH}} {words}   by position, from the first"


def _bleu(bleu: dict[str, Any]) -> Iterator[str]:
    how = "greedy" if bleu["beams"] == 1 else f"{bleu['beams']} beams"
    yield f"  {bleu['groups']:,} texts ({how}) against {bleu['references']:.1f} each:"
    for order, (score, bounds) in enumerate(zip(bleu["bleu"], bleu["confidence"]["bleu"], strict=True), start=1):
        yield _number(f"BLEU-{order}", score, bounds, 2)
    lengths = f"{bleu['length']:,} words for {bleu['reference_length']:,}"
    yield f"  {'brevity penalty':<{_WIDTH}} {bleu['brevity_penalty']:10.4f}   {lengths}"


def _classes(measured: dict[str, Any]) -> Iterator[str]:
    bounds = [100 * bound for bound in measured["confidence"]["accuracy"]]
    yield _number("accuracy", 100 * measured["accuracy"], bounds, 2, " %")
    yield f"  {'macro F1':<{_WIDTH}} {100 * measured['macro_f1']:8.2f} %"
    yield f"  {'nats per sample':<{_WIDTH}} {measured['loss']:10.4f}"
    if len(measured["labels"]) <= _MOST_CLASSES:
        yield from _tables(measured)
        return
    asked = [one for one in measured["classes"] if one["samples"]]
    yield f"  lowest F1 of {len(asked):,} classes (all of them: --json):"
    for one in sorted(asked, key=lambda one: one["f1"])[:_WORST]:
        yield f"    {one['label'][:30]:<30} F1 {100 * one['f1']:5.1f}   {one['samples']:,} samples"


def _tables(measured: dict[str, Any]) -> Iterator[str]:
    """Precision, recall and F1 of each class, and beside them what its samples were taken for."""
    labels = [label[:12] for label in measured["labels"]]
    width = max(5, *map(len, labels))
    cell = max(4, *(len(str(count)) for row in measured["confusion"] for count in row))
    heads = " ".join(f"{label[:cell]:>{cell}}" for label in labels)
    yield f"  {'class':<{width}}  precision  recall      F1   taken for {heads}"
    for label, one, row in zip(labels, measured["classes"], measured["confusion"], strict=True):
        scores = f"{100 * one['precision']:9.1f} {100 * one['recall']:7.1f} {100 * one['f1']:7.1f}"
        yield f"  {label:<{width}}  {scores}   {'':9} {' '.join(f'{count:>{cell}}' for count in row)}"


def _retrieval(measured: dict[str, Any]) -> Iterator[str]:
    for direction, label in (("text_to_media", "text to media"), ("media_to_text", "media to text")):
        for name, value in measured[direction].items():
            bounds = measured["confidence"][direction][name]
            yield _number(f"{label} {name}", value, bounds, 2, " %")
    chance = "   ".join(f"{name} {value:.2f} %" for name, value in measured["chance"].items())
    yield f"  {'chance, from a text':<{_WIDTH}} {chance}"
