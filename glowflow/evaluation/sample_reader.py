"""A split of samples on its way through a model: read in the order of the shards, passed through in batches.

Every sample is read exactly once. Those of a few batches at a time are sorted by length, so that little is padded;
what is measured of a sample does not depend on its company.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import ModalityWeights
from glowflow.config.multimodal import MultimodalConfig
from glowflow.config.schema import GlowFlowConfig
from glowflow.core.architectures.base import BaseArchitecture
from glowflow.core.batch import Batch, ModelOutput
from glowflow.data.manifest import Manifest
from glowflow.data.plan import eval_plan
from glowflow.data.samples.collate import collate
from glowflow.data.samples.sample import PreparedSample
from glowflow.data.samples.view import MediaView, media_view
from glowflow.training.precision import autocast

__all__ = ["Progress", "SampleReader", "group_of", "in_batches"]

Progress = Callable[[int, int], None]
_POOL = 8  # batches whose samples are sorted by length together


@dataclass
class SampleReader:
    """One split and one model.

    Args:
        module: with its weights, on ``device``.
        config: the whole config that it was trained with.
        manifest, split: what is read.
        device, precision: how it is computed.
        context: longest sample; default: the config's.
        batch_size: samples at once; changes nothing but the speed.
        without: modalities that are removed from every sample, beside those of the config.
        progress: called with (steps read, steps in all).

    ``bad`` counts the samples that could not be used, by kind.
    """

    module: BaseArchitecture
    config: GlowFlowConfig
    manifest: Manifest
    split: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    context: int | None = None
    batch_size: int = 32
    without: tuple[str, ...] = ()
    progress: Progress | None = None
    bad: Counter[str] = field(default_factory=Counter)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads."""
        model = self.config.model
        return model.modalities if isinstance(model, MultimodalConfig) else ()

    def view(
        self, *, pairing: Literal["matched", "shuffled"] = "matched", prompt_loss: bool | None = None
    ) -> MediaView:
        """What the model sees of a sample: its own media whatever it was trained with, and text is what counts.

        Args:
            pairing: ``shuffled``: the media of another sample.
            prompt_loss: whether the prompt counts; default: as in the config.
        """
        view = media_view(self.config, training=False, without=self.without, pairing=pairing)
        counted = view.prompt_loss if prompt_loss is None else prompt_loss
        return replace(view, loss_weights=ModalityWeights(), prompt_loss=counted)

    def samples(self, view: MediaView) -> Iterator[PreparedSample]:
        """Every sample of the split, in the order of the shards; one that is bad has no weight.

        Raises:
            DataError: no such split, a sample that cannot be read where the config says so, or one that is too long.
        """
        plan: Any = eval_plan(
            self.manifest,
            split=self.split,
            context=self.context or self.config.data.context,
            global_batch=self.batch_size,
            layout="bucketed",
            window_tokens=self.config.data.window_tokens,
            view=view,
        )
        steps = plan.num_steps or 0
        for done, samples in enumerate(plan.samples(range(steps), 0, self.batch_size), start=1):
            yield from (sample for sample in samples if sample.sample_id >= 0)
            if self.progress is not None:
                self.progress(done, steps)

    def usable(self, view: MediaView) -> Iterator[PreparedSample]:
        """``samples`` that have something to measure; the bad ones are counted in ``bad``."""
        self.bad.clear()
        for sample in self.samples(view):
            if sample.bad:
                self.bad[sample.bad.partition(":")[0]] += 1
            elif sample.weights.any():
                yield sample

    @torch.no_grad()
    def forward(self, samples: list[PreparedSample], view: MediaView) -> tuple[Batch, ModelOutput]:
        """Pass some samples through the model at once, without a loss."""
        batch = collate(samples, view).to(self.device)
        with autocast(self.precision, self.device):
            output, _ = self.module(batch, None, compute_loss=False)
        return batch, output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode; as before afterwards."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    def require_some(self, count: int, what: str) -> None:
        """Refuse a split in which nothing can be measured.

        Raises:
            DataError: ``count`` is 0.
        """
        if count == 0:
            found = ", ".join(f"{number} {kind}" for kind, number in sorted(self.bad.items()))
            rule = f"has no sample with {what} in {self.split!r}" + (f" (bad samples: {found})" if found else "")
            raise DataError(Problem(str(self.manifest.path), rule))

    def about(self) -> Mapping[str, Any]:
        """What was measured on, for a report."""
        return {
            "dataset": self.manifest.name,
            "data_fingerprint": self.manifest.fingerprint,
            "split": self.split,
            "without": [name for name in self.modalities if name in {*self.without, *self.config.data.without}],
            "bad_samples": dict(sorted(self.bad.items())),
            "context": self.context or self.config.data.context,
            "batch_size": self.batch_size,
            "layout": "bucketed",
            "precision": self.precision,
            "device": str(self.device),
        }


def in_batches(samples: Iterable[Any], size: int, length: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Samples in batches of this size, those of similar length together.

    Args:
        samples: read a few batches ahead.
        length: of a sample.
    """
    remaining = iter(samples)
    while pool := list(itertools.islice(remaining, _POOL * size)):
        pool.sort(key=length)
        yield from (pool[start : start + size] for start in range(0, len(pool), size))


def group_of(sample: PreparedSample) -> str | int:
    """What a sample is counted with in intervals: its group, or nothing but itself."""
    return sample.group or sample.document_id
