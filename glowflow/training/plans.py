"""The plans of a run, from its config: what is trained on and what is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glowflow.config.schema import GlowFlowConfig
from glowflow.data.manifest import Manifest
from glowflow.data.plan import Plan, eval_plan, plan
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.view import media_view

__all__ = ["training_plan", "validation_bytes_per_token", "validation_plan"]


def training_plan(config: GlowFlowConfig, sources: Sequence[tuple[Manifest, float]]) -> Plan | SamplePlan:
    """The endless plan of ``data.train_split``.

    Raises:
        DataError: as ``glowflow.data.plan.plan``.
    """
    return plan(sources, seed=config.training.seed, split=config.data.train_split, **_shape(config, training=True))


def validation_plan(config: GlowFlowConfig, manifest: Manifest) -> Plan | SamplePlan | None:
    """One pass over ``data.val_split``; None where it holds nothing to predict."""
    split = manifest.splits.get(config.data.val_split)
    if split is None or split.tokens <= split.rows:
        return None
    return eval_plan(manifest, split=config.data.val_split, **_shape(config, training=False))


def validation_bytes_per_token(config: GlowFlowConfig, manifest: Manifest) -> float | None:
    """UTF-8 bytes of text behind one validation target; None where the targets are not the whole text."""
    data, split = config.data, manifest.split(config.data.val_split)
    cut = config.layout == "bucketed" and data.on_long_sample != "error"
    if manifest.media or cut:
        return None
    # A row of n tokens gives n - 1 targets; together they cover the text of the split.
    return split.text_bytes / (split.tokens - split.rows)


def _shape(config: GlowFlowConfig, *, training: bool) -> dict[str, Any]:
    data = config.data
    shape: dict[str, Any] = {"context": data.context, "global_batch": config.training.batch_size}
    shape |= {"layout": config.layout, "window_tokens": data.window_tokens}
    if config.layout != "bucketed":
        return shape
    return {**shape, "view": media_view(config, training=training)}
