"""A classifier on a split: accuracy with an interval over groups, and what scikit-learn says about each class.

Legend: N samples, B rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glowflow.config.errors import DataError, Problem
from glowflow.data.samples.sample import PreparedSample
from glowflow.evaluation.sample_reader import SampleReader, in_batches
from glowflow.metrics.clusters import accuracy_interval, group_numbers
from glowflow.training.precision import autocast

__all__ = ["Predicted", "class_report", "measure_classes"]


@dataclass(frozen=True)
class Predicted:
    """The class of one sample.

    Args:
        document: number of the sample in the data set.
        group: what it belongs to; None: to nothing but itself.
        wanted, predicted: labels.
        probability: of the predicted one.
        nll: negative log-likelihood of the wanted one, in nats.
    """

    document: int
    group: str | None
    wanted: str
    predicted: str
    probability: float
    nll: float


def measure_classes(
    reader: SampleReader, *, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, Any], list[Predicted]]:
    """Accuracy of a classifier on all samples of a split that have a label.

    Returns:
        ``accuracy`` with ``confidence``, ``loss``, ``macro_f1``, ``labels``, ``confusion`` (rows: the wanted classes)
        and ``classes``, see ``class_report``; and what was predicted.

    Raises:
        DataError: as the reader; no sample has a label, or the data set has other classes than the model.
    """
    labels = _labels(reader)
    found: list[Predicted] = []
    view = reader.view()
    with reader.evaluating():
        for samples in in_batches(reader.usable(view), reader.batch_size, lambda sample: len(sample.tokens)):
            _, output = reader.forward(samples, view)
            assert output.pooled is not None
            with torch.no_grad(), autocast(reader.precision, reader.device):
                scores_bk = reader.module.logits(output.pooled).double().log_softmax(-1).cpu()
            found += [_predicted(*pair, labels) for pair in zip(samples, scores_bk, strict=True)]
    reader.require_some(len(found), "a label")
    groups = group_numbers([one.group or one.document for one in found])
    right = [one.predicted == one.wanted for one in found]
    accuracy = accuracy_interval(right, groups, resamples=resamples, seed=seed)
    return {
        "accuracy": accuracy.estimate,
        "loss": float(np.mean([one.nll for one in found])),
        "samples": len(found),
        "groups": int(groups.max()) + 1,
        "confidence": {
            "level": accuracy.level,
            "method": accuracy.method,
            "unit": "group" if any(one.group for one in found) else "sample",
            "units": int(groups.max()) + 1,
            "accuracy": [accuracy.low, accuracy.high],
        },
        **class_report([one.wanted for one in found], [one.predicted for one in found], labels),
    }, found


def class_report(wanted: list[str], predicted: list[str], labels: list[str]) -> dict[str, Any]:
    """What scikit-learn makes of predictions.

    Args:
        wanted, predicted: labels of each sample.
        labels: all of them, in the order of the tables.

    Returns:
        ``macro_f1``: the mean over the classes that occur; ``confusion`` (K, K) counts, rows are the wanted classes;
        ``classes``: precision, recall, f1 and samples of each class.
    """
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    table = precision_recall_fscore_support(wanted, predicted, labels=labels, zero_division=0.0)
    return {
        "labels": labels,
        "macro_f1": float(f1_score(wanted, predicted, average="macro", zero_division=0.0)),
        "confusion": confusion_matrix(wanted, predicted, labels=labels).tolist(),
        "classes": [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "samples": int(n)}
            for label, p, r, f, n in zip(labels, *table, strict=True)
        ],
    }


def _predicted(sample: PreparedSample, log_probs_k: torch.Tensor, labels: list[str]) -> Predicted:
    best = int(log_probs_k.argmax())
    return Predicted(
        document=sample.document_id,
        group=sample.group or None,
        wanted=labels[sample.label],
        predicted=labels[best],
        probability=float(log_probs_k[best].exp()),
        nll=-float(log_probs_k[sample.label]),
    )


def _labels(reader: SampleReader) -> list[str]:
    labels = [str(label) for label in reader.manifest.media.get("labels", [])]
    classes = getattr(reader.config.model, "num_classes", None)
    if classes is not None and len(labels) != classes:
        rule = f"has {len(labels)} labels, and the model tells {classes} classes apart"
        hint = "evaluate on a data set with the labels that it was trained with"
        raise DataError(Problem(str(reader.manifest.path), rule, hint=hint))
    return labels
