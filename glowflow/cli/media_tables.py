"""How ``glowflow data inspect`` prints a data set with media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["media_lines"]

_MOST_LABELS = 30


def media_lines(media: Mapping[str, Any]) -> Iterator[str]:
    """Schema, counts, histograms, labels and bad samples, as ``media_facts`` tells them."""
    from glowflow.tracking.tables import table

    everything = media["all"]
    yield ""
    yield table(["column", "type"], [[row["column"], row["type"]] for row in media["schema"]])
    yield ""
    names = list(everything["samples"])
    counts = [
        [name, *(split["samples"][kind] for kind in names), split["images"], split["audio"], sum(split["bad"].values())]
        for name, split in media["splits"].items()
    ]
    yield table(["samples with", *(_kind(name) for name in names), "pictures", "recordings", "blanks"], counts)
    yield ""
    ids = ", ".join(f"{name} is token {token}" for name, token in media["placeholders"].items())
    yield f"placeholders: {ids or 'none'}"
    yield from _histogram("tokens of a sample, one for each medium", everything["tokens"])
    yield from _sizes(everything)
    rates = ", ".join(f"{int(rate) / 1000:g} kHz" for rate in everything["audio_rates"])
    yield from _histogram(f"seconds of a recording ({rates})", everything["audio_seconds"])
    yield from _labels(everything["labels"])
    yield from _bad(media["bad"])


def _kind(name: str) -> str:
    return {"text": "text alone", "image": "image", "audio": "audio"}.get(name, name.replace("+", " and "))


def _histogram(title: str, shown: Mapping[str, Any] | None) -> Iterator[str]:
    from glowflow.data.histograms import bars

    if shown is None:
        return
    yield f"\n{title}: {shown['summary']}"
    yield from _indented(bars(shown["labels"], shown["counts"]))


def _sizes(facts: Mapping[str, Any]) -> Iterator[str]:
    """Few sizes are listed; of many, both sides are counted too."""
    from glowflow.data.histograms import bars

    sizes = facts["image_sizes"]
    if not sizes["distinct"]:
        return
    most, distinct = sizes["most"], sizes["distinct"]
    yield f"\npictures, height × width: {distinct:,} size{'s' if distinct != 1 else ''}" + (
        f", the {len(most)} most frequent" if distinct > len(most) else ""
    )
    yield from _indented(bars([f"{height} × {width}" for height, width, _ in most], [count for *_, count in most]))
    if distinct > len(most):
        yield from _histogram("heights of pictures", facts["image_heights"])
        yield from _histogram("widths of pictures", facts["image_widths"])


def _labels(labels: Mapping[str, int]) -> Iterator[str]:
    from glowflow.data.histograms import bars

    if not labels:
        return
    shown = list(labels.items())
    if len(shown) > _MOST_LABELS:
        shown = sorted(shown, key=lambda item: -item[1])[:_MOST_LABELS]
    more = f", the {len(shown)} most frequent" if len(shown) < len(labels) else ""
    yield f"\nlabels: {len(labels):,}{more}"
    yield from _indented(bars([label for label, _ in shown], [count for _, count in shown]))


def _bad(bad: Mapping[str, Any]) -> Iterator[str]:
    counts = bad.get("counts", {})
    if not counts:
        yield "\nbad samples: none"
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    yield f"\nbad samples: {bad.get('skipped', 0):,} left out, {bad.get('blank', 0):,} kept as blanks; {kinds}"
    first: Sequence[Sequence[str]] = bad.get("first", [])
    yield from _indented([f"{name}: {kind}: {reason}" for name, kind, reason in first])
    if sum(counts.values()) > len(first):
        yield f"  and {sum(counts.values()) - len(first):,} more"


def _indented(lines: Sequence[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
