"""What of maximal-update parametrisation nobody has checked: said in warnings, since it would fail in silence."""

from __future__ import annotations

from collections.abc import Iterator

from glowflow.config.architectures import DecoderConfig
from glowflow.config.registry import ARCHITECTURES
from glowflow.config.schema import GlowFlowConfig

__all__ = ["mup_warnings"]

# Optimisers whose updates the tests follow over the widths; with AdamW that is done for every sort of layer.
_CHECKED = ("adamw", "adan", "lion", "muon")
_SIGNS_ONLY = ("sophia-g", "sophia-h")


def mup_warnings(config: GlowFlowConfig) -> Iterator[str]:
    """Sentences on what `model.mup` is combined with; none without it."""
    model, optimizer = config.model, config.training.optimizer.name
    if not isinstance(model, DecoderConfig) or not model.mup:
        return
    check = "`glowflow mup check` shows whether its updates depend on the width"
    entry = ARCHITECTURES.get(model.arch)
    if entry is None or not entry.builtin:
        yield f"model.mup with the custom architecture {model.arch}: {check}"
    if optimizer in _SIGNS_ONLY:
        yield (
            f"model.mup with training.optimizer {optimizer}: its learning rate is scaled as for signs, which is what "
            "clipped updates are; how far the others transfer is not known"
        )
    elif optimizer not in _CHECKED:
        yield f"model.mup with training.optimizer {optimizer}: {check}"
    elif optimizer != "adamw":
        kinds = model.attention.layer_kinds()
        rare = ["model.moe"] if model.moe is not None else []
        rare += ["linear attention"] if {"linear", "gated"} & kinds else []
        if rare:
            yield f"model.mup with training.optimizer {optimizer} and {' and '.join(rare)} is not tested: {check}"
    if model.attention_scale is not None:
        yield (
            f"model.base_head_dim ({model.base_head_dim}) differs from the width of a head ({model.head_dim}): "
            "`glowflow mup check` compares heads of one width, so it cannot check the scale of attention"
        )
