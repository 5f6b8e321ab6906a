"""Perplexity of the text of samples with media, and how much of it is due to the right media.

Each sample's loss is kept apart. To see what media contribute, every sample is measured twice, with its own and with
those of another sample, and the losses are compared pair by pair: the interval of that difference holds nothing of how
hard some texts are. A sample that got the same medium by chance (another caption of the same picture) says nothing and
is left out of the comparison.

Legend: N samples, B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glowflow.config.errors import DataError, Problem
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import Batch
from glowflow.data.samples.sample import PreparedItem, PreparedSample
from glowflow.data.samples.view import MediaView
from glowflow.evaluation.analyzer import token_nll
from glowflow.evaluation.sample_reader import SampleReader, group_of, in_batches
from glowflow.metrics.clusters import group_numbers, group_sums, perplexity_ratio
from glowflow.metrics.intervals import Interval, bootstrap_interval
from glowflow.metrics.perplexity import mean_nll, perplexity
from glowflow.training.precision import autocast

__all__ = [
    "SampleLosses",
    "against",
    "row_losses",
    "sample_losses",
    "summary",
    "with_media_of",
]


@dataclass
class SampleLosses:
    """Losses of a split, one entry per sample."""

    nll: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)  # with the media of another sample
    weights: list[float] = field(default_factory=list)
    groups: list[str | int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)  # the media did become others
    documents: list[int] = field(default_factory=list)


def summary(
    losses: SampleLosses, permuted: Sequence[str] = (), *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Loss and perplexity of the text of a split, and what media of other samples make of them.

    Args:
        losses: of the split.
        permuted: modalities whose media were exchanged in a second measurement.
        resamples, seed: of the bootstrap over groups.

    Returns:
        ``loss``, ``perplexity``, ``tokens``, ``samples``, ``groups``, ``confidence``, and with ``permuted`` what
        ``_comparison`` gives.
    """
    groups = group_numbers(losses.groups)
    nll, weights = group_sums(groups, losses.nll, losses.weights)
    loss = bootstrap_interval(nll, weights, resamples=resamples, seed=seed)
    tokens = round(float(np.sum(losses.weights)))
    result = {
        "loss": mean_nll(float(np.sum(losses.nll)), tokens),
        "perplexity": perplexity(float(np.sum(losses.nll)), tokens),
        "tokens": tokens,
        "samples": len(losses.nll),
        "groups": len(nll),
        "confidence": {
            "level": loss.level,
            "method": loss.method,
            "unit": "group" if any(isinstance(name, str) for name in losses.groups) else "sample",
            "units": len(nll),
            "loss": [loss.low, loss.high],
            "perplexity": [perplexity(loss.low, 1), perplexity(loss.high, 1)],
        },
    }
    if permuted:
        result["permuted"] = {"modalities": list(permuted), **_comparison(losses, resamples, seed)}
    return result


def sample_losses(reader: SampleReader, permuted: Sequence[str] = ()) -> SampleLosses:
    """The losses of a split.

    Args:
        reader: what is measured on.
        permuted: modalities whose media are exchanged in a second measurement.

    Raises:
        DataError: as the reader; or there is nothing to predict.
    """
    view, losses = reader.view(), SampleLosses()
    with reader.evaluating():
        for pairs in in_batches(_pairs(reader, view, permuted), reader.batch_size, lambda pair: len(pair[0].tokens)):
            samples = [own for own, _ in pairs]
            nll_b, weights_b = _measured(reader, samples, view)
            losses.nll += nll_b
            losses.weights += weights_b
            losses.groups += map(group_of, samples)
            losses.documents += [sample.document_id for sample in samples]
            if permuted:
                others = [other for _, other in pairs if other is not None]
                losses.other += _measured(reader, others, view)[0]
                losses.changed += [_differ(own, other, permuted) for own, other in zip(samples, others, strict=True)]
    reader.require_some(len(losses.nll), "text to predict")
    return losses


def _pairs(
    reader: SampleReader, view: MediaView, permuted: Sequence[str]
) -> Iterator[tuple[PreparedSample, PreparedSample | None]]:
    """Each sample, and beside it the same one with media of another."""
    if not permuted:
        yield from ((sample, None) for sample in reader.usable(view))
        return
    reader.bad.clear()
    shuffled = reader.samples(reader.view(pairing="shuffled"))
    # Progress is told by one of the two readings, which go in step.
    for own, other in zip(replace(reader, progress=None).samples(view), shuffled, strict=True):
        assert own.document_id == other.document_id
        if own.bad:
            reader.bad[own.bad.partition(":")[0]] += 1
        elif own.weights.any():
            # Where the other medium cannot be read, the sample stays as it is, and out of the comparison.
            yield own, own if other.bad else with_media_of(own, other, permuted)


def _measured(reader: SampleReader, samples: list[PreparedSample], view: MediaView) -> tuple[list[float], list[float]]:
    batch, output = reader.forward(samples, view)
    with autocast(reader.precision, reader.device):
        nll_b, weights_b = row_losses(reader.module, output.hidden, batch)
    return nll_b.tolist(), weights_b.tolist()


@torch.no_grad()
def row_losses(module: BaseArchitecture, hidden_btd: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood of each row in nats, and the sum of its weights, (B,) fp64 on the host each."""
    counted_bt = batch.loss_weights > 0
    rows_n, weights_n = counted_bt.nonzero()[:, 0].cpu(), batch.loss_weights[counted_bt].double().cpu()
    nll_n = token_nll(module, hidden_btd[counted_bt][None], batch.targets[counted_bt][None])[0].double().cpu()
    zeros_b = torch.zeros(len(batch.tokens), dtype=torch.float64)
    return zeros_b.index_add(0, rows_n, nll_n * weights_n), zeros_b.index_add(0, rows_n, weights_n)


def _comparison(losses: SampleLosses, resamples: int, seed: int) -> dict[str, Any]:
    """Perplexity with the right media and with others, over the samples whose media changed.

    Returns:
        ``samples`` compared, ``same``: those left out because they kept their media, ``right`` and ``permuted``
        perplexity, and ``lower_percent``, by how much the right ones make it lower, with its paired interval.
    """
    changed = np.array(losses.changed, np.bool_)
    counts: dict[str, Any] = {"samples": int(changed.sum()), "same": int((~changed).sum())}
    if not changed.any():
        return {**counts, "right": None, "permuted": None, "lower_percent": None, "confidence": None}
    right, other, weights = (_of(values, changed) for values in (losses.nll, losses.other, losses.weights))
    groups = group_numbers([name for name, one in zip(losses.groups, losses.changed, strict=True) if one])
    ratio = perplexity_ratio(right, other, weights, groups, resamples=resamples, seed=seed)
    tokens = round(float(weights.sum()))
    return {
        **counts,
        "right": perplexity(float(right.sum()), tokens),
        "permuted": perplexity(float(other.sum()), tokens),
        "lower_percent": 100 * (1 - ratio.estimate),
        "confidence": _lower(ratio, groups),
    }


def against(own: SampleLosses, other: SampleLosses, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Perplexity of one model against that of another on the same samples, paired.

    Returns:
        ``samples`` compared, ``perplexity`` of the other model, and ``lower_percent``, by how much the first one's is
        lower, with its paired interval.

    Raises:
        DataError: they were not measured on the same text.
    """
    mine, theirs = (np.argsort(losses.documents, kind="stable") for losses in (own, other))
    weights = np.array(own.weights)[mine]
    same = np.array_equal(np.array(own.documents)[mine], np.array(other.documents)[theirs])
    if not same or not np.allclose(weights, np.array(other.weights)[theirs]):
        rule = "was measured on other text: samples differ, or how much of them is cut or counted"
        raise DataError(Problem("--against", rule, hint="give both the same data.context and data.loss_weights"))
    groups = group_numbers([own.groups[index] for index in mine.tolist()])
    nll, others = np.array(own.nll)[mine], np.array(other.nll)[theirs]
    ratio = perplexity_ratio(nll, others, weights, groups, resamples=resamples, seed=seed)
    return {
        "samples": len(nll),
        "perplexity": perplexity(float(others.sum()), round(float(weights.sum()))),
        "lower_percent": 100 * (1 - ratio.estimate),
        "confidence": _lower(ratio, groups),
    }


def _lower(ratio: Interval, groups: NDArray[Any]) -> dict[str, Any]:
    """The paired interval of by how much, in percent, one perplexity is lower than another."""
    return {
        "level": ratio.level,
        "method": f"paired {ratio.method}",
        "units": int(groups.max()) + 1,
        "lower_percent": [100 * (1 - ratio.high), 100 * (1 - ratio.low)],
    }


def _of(values: Sequence[float], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.array(values, np.float64)[chosen]


def with_media_of(sample: PreparedSample, other: PreparedSample, modalities: Sequence[str]) -> PreparedSample:
    """A sample with the media of another one, in as many places as they take.

    Args:
        sample: keeps its text and the media of all other modalities.
        other: has as many media of these modalities.
        modalities: what is exchanged.
    """
    queues = {name: iter([item for item in other.items if item.modality == name]) for name in modalities}
    items = sorted(sample.items, key=lambda item: item.position)
    given = [next(queues[item.modality], item) if item.modality in queues else item for item in items]
    ids = np.append(sample.tokens, sample.targets[-1])  # the last target is no input
    weights = np.append(np.float32(0), sample.weights)  # of each id as a target
    pieces: list[tuple[NDArray[Any], NDArray[Any]]] = []
    placed: list[PreparedItem] = []
    done = length = 0
    for old, new in zip(items, given, strict=True):
        before = slice(done, old.position)
        length += old.position - done
        placed.append(replace(new, position=length))
        first = slice(old.position, old.position + 1)
        slots = new.slots if old.slots else 0
        if slots:
            pieces += [(ids[before], weights[before]), (np.repeat(ids[first], slots), _first(weights[first], slots))]
            length += slots
            done = old.position + old.slots
        else:  # the placeholder stays, and is no place of the medium
            pieces.append((ids[before], weights[before]))
            done = old.position
    pieces.append((ids[done:], weights[done:]))
    all_ids = np.concatenate([part for part, _ in pieces])
    all_weights = np.concatenate([part for _, part in pieces])[1:]
    return replace(
        sample,
        tokens=all_ids[:-1].astype(np.int32),
        targets=np.where(all_weights > 0, all_ids[1:], 0).astype(np.int32),
        weights=all_weights.astype(np.float32),
        items=placed,
    )


def _first(weight_1: NDArray[Any], slots: int) -> NDArray[Any]:
    """The weight of the first place of a medium; the others have none."""
    return np.append(weight_1, np.zeros(slots - 1, weight_1.dtype))


def _differ(sample: PreparedSample, other: PreparedSample, modalities: Sequence[str]) -> bool:
    """Whether a medium that is there became another one."""
    own, others = (_features(one, modalities) for one in (sample, other))
    return own != others


def _features(sample: PreparedSample, modalities: Sequence[str]) -> list[Mapping[str, Any]]:
    return [
        {"modality": item.modality, "shape": item.features.shape, "bytes": item.features.tobytes()}
        for item in sorted(sample.items, key=lambda item: item.position)
        if item.modality in modalities and item.present
    ]
