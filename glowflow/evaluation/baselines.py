"""What the model is compared with: byte n-gram models of the same training split, on the same held-out text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.data.manifest import Manifest
from glowflow.evaluation.documents import document_texts
from glowflow.metrics.intervals import bootstrap_interval
from glowflow.metrics.ngram import ByteNgramModel

__all__ = ["ngram_baselines"]


def ngram_baselines(
    manifest: Manifest, *, train_split: str = "train", split: str = "validation", orders: Sequence[int] = (2, 3)
) -> list[dict[str, Any]]:
    """Bits per byte of order-N byte models (N bytes of context), fitted on one split and measured on another.

    The models pay for every byte of a document, its first one included, but not for its end.

    Returns:
        One dict an order: ``order``, ``bits_per_byte``, ``confidence`` ([low, high], 95 %), ``seconds``.

    Raises:
        DataError: a split is missing or has no text.
    """
    train, held_out = (list(document_texts(manifest, name)) for name in (train_split, split))
    for name, documents in ((train_split, train), (split, held_out)):
        if not any(documents):
            raise DataError(Problem(str(manifest.path), "the split holds no text", name))
    results = []
    for order in orders:
        started = time.perf_counter()
        bits = ByteNgramModel(order).fit(train).document_bits(held_out)
        interval = bootstrap_interval(bits, [len(document) for document in held_out])
        results.append(
            {
                "order": order,
                "bits_per_byte": interval.estimate,
                "confidence": [interval.low, interval.high],
                "seconds": time.perf_counter() - started,
            }
        )
    return results
