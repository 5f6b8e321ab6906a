"""Retrieval with a contrastive model: which picture belongs to a text, which text to a picture, over the whole split.

Samples of one group are texts of one picture (the protocol of Flickr8k and Flickr30k: five texts each), which counts
once. Without groups every sample is a pair of its own.

Legend: T texts, G groups, E width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glowflow.evaluation.sample_reader import SampleReader, group_of, in_batches
from glowflow.metrics.clusters import group_numbers, group_sums
from glowflow.metrics.intervals import bootstrap_interval
from glowflow.metrics.retrieval import recall_at

__all__ = ["AT", "measure_retrieval"]

AT = (1, 5, 10)


def measure_retrieval(reader: SampleReader, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """R@1, R@5 and R@10 in both directions, in percent.

    Returns:
        ``text_to_media`` and ``media_to_text``: ``R@k`` by name; ``chance``: what a model that knows nothing gets from
        a text; ``confidence``: their intervals over groups; ``samples``, ``groups``.

    Raises:
        DataError: as the reader; or there are no pairs.
    """
    texts, media, names = _embedded(reader)
    reader.require_some(len(names), "a text and a medium")
    owner_t = group_numbers(names)
    _, first_g = np.unique(owner_t, return_index=True)
    groups_g = np.arange(len(first_g))
    media_ge, texts_te = np.stack(media)[first_g], np.stack(texts)
    hits = {
        "text_to_media": group_sums(owner_t, recall_at(texts_te, media_ge, owner_t, groups_g, AT))[0],
        "media_to_text": recall_at(media_ge, texts_te, groups_g, owner_t, AT),
    }
    asked = {"text_to_media": np.bincount(owner_t), "media_to_text": np.ones(len(groups_g))}
    result: dict[str, Any] = {"samples": len(texts), "groups": len(groups_g)}
    bounds: dict[str, Any] = {}
    for direction, hits_gr in hits.items():
        result[direction], bounds[direction] = {}, {}
        for index, k in enumerate(AT):
            found = bootstrap_interval(hits_gr[:, index], asked[direction], resamples=resamples, seed=seed)
            result[direction][f"R@{k}"] = 100 * found.estimate
            bounds[direction][f"R@{k}"] = [100 * found.low, 100 * found.high]
    result["chance"] = {f"R@{k}": 100 * min(1.0, k / len(groups_g)) for k in AT}
    grouped = any(isinstance(name, str) for name in names)
    unit = {"level": 0.95, "method": "bootstrap", "unit": "group" if grouped else "sample", "units": len(groups_g)}
    return {**result, "confidence": {**unit, **bounds}}


def _embedded(reader: SampleReader) -> tuple[list[Any], list[Any], list[str | int]]:
    """Unit vectors (E,) of every sample's text and medium, and its group."""
    texts: list[Any] = []
    media: list[Any] = []
    names: list[str | int] = []
    view = reader.view()
    with reader.evaluating():
        for samples in in_batches(reader.usable(view), reader.batch_size, lambda sample: len(sample.tokens)):
            _, output = reader.forward(samples, view)
            assert output.pairs is not None
            texts_be, media_be = (side.float().cpu().numpy() for side in output.pairs)
            texts += list(texts_be)
            media += list(media_be)
            names += map(group_of, samples)
    return texts, media, names
