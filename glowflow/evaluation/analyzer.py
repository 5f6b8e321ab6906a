"""``ModelAnalyzer``: what a model knows about a text it was not trained on.

The whole split goes through the same plan and batches as training, each target exactly once; the loss of every target
is kept apart until it is added to its document, so that intervals can resample documents. A model with memory reads
the split in lanes, each a contiguous part of it, and carries what it remembers along them.

Legend: B sequences, T positions, N targets, D width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from glowflow.config.errors import DataError, Problem
from glowflow.core.architectures.base import BaseArchitecture, Carry
from glowflow.data.manifest import Manifest
from glowflow.data.plan import Plan, PlanBatch, eval_plan
from glowflow.data.processors.text import tokenizer_from_spec
from glowflow.data.stream import to_batch
from glowflow.evaluation.documents import TargetLookup, TargetStream
from glowflow.metrics.intervals import Interval, bootstrap_interval
from glowflow.metrics.perplexity import bits_per_byte, mean_nll, perplexity
from glowflow.training.precision import autocast

__all__ = ["ModelAnalyzer", "check_tokenizer", "token_nll"]

logger = logging.getLogger(__name__)

_CHUNK_SCORES = 1 << 22  # scores held at once: 16 MiB in fp32
_MIN_DOCUMENTS = 30  # fewer say too little about how documents vary: then blocks of text are the unit
_BLOCKS = 200


@dataclass
class _Unit:
    """Sums over one document or block."""

    nll: float = 0.0
    tokens: int = 0
    bytes: float = 0.0


@dataclass
class _Sums:
    """Everything that is added up over a split."""

    documents: dict[int, _Unit] = field(default_factory=dict)
    blocks: dict[int, _Unit] = field(default_factory=dict)
    tokens: int = 0
    unknown: int = 0


class ModelAnalyzer:
    """Measures one model.

    Args:
        module: the model, with its weights; it is moved to ``device`` and left in the mode it was in.
        tokenizer_spec: of the tokenizer it was trained with.
        device: where to compute.
        precision: fp32, bf16 or fp16.
    """

    def __init__(
        self,
        module: BaseArchitecture,
        tokenizer_spec: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.module = module.to(self.device)
        self.tokenizer_spec = dict(tokenizer_spec)
        self.precision = precision

    def perplexity(
        self,
        manifest: Manifest,
        split: str = "validation",
        *,
        context: int = 256,
        batch_size: int = 32,
        document_mask: bool = True,
        layout: Literal["packed", "lanes"] = "packed",
        resamples: int = 2000,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Loss, perplexity and bits per byte over a whole split, each with a 95 % confidence interval.

        Args:
            context: sequence length T; a longer one gives the model more to go by.
            batch_size: sequences per forward pass. Packed, the result does not depend on it but for rounding; it is
                the number of lanes, at whose starts nothing is remembered: with 1 the split is read in one go.
            document_mask: attention stays inside a document, as in training.
            layout: ``packed`` sequences, or ``lanes`` for a model with memory.
            resamples: of the bootstrap, seeded by ``seed``.
            progress: called with (steps done, steps in all).

        Returns:
            ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``confidence`` (level, method, unit, units and
            a [low, high] for each of the three), ``tokens``, ``documents``, ``text_bytes``, ``unknown_tokens``,
            ``seconds`` and what was measured on.

        Raises:
            DataError: no such split, no target in it, or data of another tokenizer.
        """
        check_tokenizer(self.tokenizer_spec, manifest)
        plan = eval_plan(manifest, split=split, context=context, global_batch=batch_size, layout=layout)
        started = time.perf_counter()
        sums = self._measure(plan, manifest, split, document_mask, progress)
        text_bytes = manifest.split(split).text_bytes
        result = _report(sums, text_bytes, resamples, seed)
        return result | {
            "dataset": manifest.name,
            "data_fingerprint": manifest.fingerprint,
            "split": split,
            "context": context,
            "batch_size": batch_size,
            "layout": layout,
            "precision": self.precision,
            "device": str(self.device),
            "seconds": time.perf_counter() - started,
        }

    def _measure(
        self,
        plan: Plan,
        manifest: Manifest,
        split: str,
        document_mask: bool,
        progress: Callable[[int, int], None] | None,
    ) -> _Sums:
        tokenizer = tokenizer_from_spec(self.tokenizer_spec)
        widths, unknown = tokenizer.token_bytes(), getattr(tokenizer, "unk_id", None)
        places = (_LanePlaces if plan.layout == "lanes" else _PackedPlaces)(plan, manifest, split)
        sums, carry = _Sums(), None
        block_tokens = max(plan.context, plan.targets_per_epoch // _BLOCKS)
        steps = plan.num_steps or 0
        was_training = self.module.training
        self.module.eval()
        try:
            for done, rows in enumerate(plan.batches(range(steps)), start=1):
                nll_n, carry = self._nll(rows, document_mask, carry)
                targets_n = rows.targets[rows.loss_weights > 0].astype(np.int64)
                numbers_n, documents_n = places.of(done - 1, rows, targets_n)
                sizes_n = np.ones(len(nll_n)) if widths is None else widths[targets_n].astype(np.float64)
                _add(sums.documents, documents_n, nll_n, sizes_n)
                _add(sums.blocks, numbers_n // block_tokens, nll_n, sizes_n)
                sums.tokens += len(nll_n)
                sums.unknown += 0 if unknown is None else int((targets_n == unknown).sum())
                if progress is not None:
                    progress(done, steps)
        finally:
            self.module.train(was_training)
        return sums

    @torch.no_grad()
    def _nll(self, rows: PlanBatch, document_mask: bool, carry: Carry) -> tuple[NDArray[np.float64], Carry]:
        """Loss in nats of each target of a batch that counts, (N,), in order; and the carry for the next batch."""
        batch = to_batch(rows, document_mask).to(self.device)
        with autocast(self.precision, self.device):
            output, carry = self.module(batch, carry, compute_loss=False)
            nll_bt = token_nll(self.module, output.hidden, batch.targets)
        counted: Tensor = nll_bt[batch.loss_weights > 0]
        return counted.double().cpu().numpy(), carry


class _PackedPlaces:
    """Which targets of the split packed batches hold: they come in order."""

    def __init__(self, plan: Plan, manifest: Manifest, split: str) -> None:
        self._path, self._stream, self._done = str(manifest.path), TargetStream(manifest, split), 0

    def of(self, step: int, rows: PlanBatch, targets_n: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Number in the split and document of each target that counts, (N,) both."""
        wanted_n, documents_n = self._stream.take(len(targets_n))
        if not np.array_equal(targets_n, wanted_n):
            raise DataError(Problem(self._path, "its shards changed while they were read"))
        numbers_n = self._done + np.arange(len(targets_n))
        self._done += len(targets_n)
        return numbers_n, documents_n


class _LanePlaces:
    """The same for lanes: lane j of n begins at target j P / n of P and goes on by the context at each step."""

    def __init__(self, plan: Plan, manifest: Manifest, split: str) -> None:
        self._starts = np.arange(plan.num_lanes) * plan.targets_per_epoch // plan.num_lanes
        self._lookup, self._context = TargetLookup(manifest, split), plan.context

    def of(self, step: int, rows: PlanBatch, targets_n: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Number in the split and document of each target that counts, (N,) both."""
        numbers_bt = (self._starts + step * self._context)[:, None] + np.arange(self._context)
        numbers_n = numbers_bt[rows.loss_weights > 0]
        return numbers_n, self._lookup.documents(numbers_n)


def token_nll(module: BaseArchitecture, hidden_btd: Tensor, targets_bt: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, (B, T) fp32; never more than some MiB of scores at once."""
    hidden_nd, targets_n = hidden_btd.flatten(0, 1), targets_bt.flatten()
    rows = max(1, _CHUNK_SCORES // module.vocab_size)
    parts = [
        F.cross_entropy(module.logits(hidden_nd[i : i + rows]).float(), targets_n[i : i + rows], reduction="none")
        for i in range(0, len(targets_n), rows)
    ]
    return torch.cat(parts).view(targets_bt.shape)


def check_tokenizer(tokenizer_spec: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse data whose tokens mean something else to the model.

    Raises:
        DataError: the fingerprints of model's and data's tokenizer differ.
    """
    own = tokenizer_from_spec(tokenizer_spec)
    if own.fingerprint != manifest.tokenizer_fingerprint:
        theirs = manifest.tokenizer_spec.get("kind", "another one")
        rule = f"was built with another tokenizer ({theirs}) than the model's ({own.name}); their fingerprints differ"
        hint = "build the data set with the model's tokenizer, or evaluate on the run's own data set"
        raise DataError(Problem(str(manifest.path), rule, manifest.tokenizer_fingerprint, hint))


def _add(units: dict[int, _Unit], keys_n: NDArray[Any], nll_n: NDArray[Any], sizes_n: NDArray[Any]) -> None:
    """Add each target to its unit."""
    keys, owner = np.unique(keys_n, return_inverse=True)
    counts, nll, sizes = np.bincount(owner), np.bincount(owner, nll_n), np.bincount(owner, sizes_n)
    for index, key in enumerate(keys.tolist()):
        unit = units.setdefault(key, _Unit())
        unit.nll += float(nll[index])
        unit.tokens += int(counts[index])
        unit.bytes += float(sizes[index])


def _report(sums: _Sums, text_bytes: int, resamples: int, seed: int) -> dict[str, Any]:
    by_document = len(sums.documents) >= _MIN_DOCUMENTS
    units = list((sums.documents if by_document else sums.blocks).values())
    nll = np.array([unit.nll for unit in units])
    tokens = np.array([unit.tokens for unit in units], np.float64)
    sizes = np.array([unit.bytes for unit in units])
    if sizes.sum() > 0:
        sizes *= text_bytes / sizes.sum()  # what the ids cannot tell (unknown words, blanks) is spread evenly
    total = math.fsum(nll)
    loss = bootstrap_interval(nll, tokens, resamples=resamples, seed=seed)
    bits = _bits_interval(nll, sizes, resamples, seed)
    confidence = {
        "level": loss.level,
        "method": loss.method,
        "unit": "document" if by_document else "block",
        "units": len(units),
        "loss": [loss.low, loss.high],
        "perplexity": [perplexity(loss.low, 1), perplexity(loss.high, 1)],
        "bits_per_byte": None if bits is None else [bits.low, bits.high],
    }
    return {
        "loss": mean_nll(total, sums.tokens),
        "perplexity": perplexity(total, sums.tokens),
        "bits_per_byte": bits_per_byte(total, text_bytes) if text_bytes else None,
        "confidence": confidence,
        "tokens": sums.tokens,
        "documents": len(sums.documents),
        "text_bytes": text_bytes,
        "unknown_tokens": sums.unknown,
    }


def _bits_interval(nll: NDArray[Any], sizes: NDArray[Any], resamples: int, seed: int) -> Interval | None:
    if not sizes.sum() > 0:
        return None
    return bootstrap_interval(nll / math.log(2), sizes, resamples=resamples, seed=seed)
