"""From ``model.fusion`` to the module."""

from __future__ import annotations

from glowflow.config.multimodal import MultimodalConfig
from glowflow.core.fusion.base import Fusion
from glowflow.core.fusion.bottleneck import Bottleneck
from glowflow.core.fusion.cross_attention import GatedCrossAttention
from glowflow.core.fusion.late import Late
from glowflow.core.fusion.mixture import Mixture
from glowflow.core.fusion.prefix import Prefix

__all__ = ["FUSIONS", "build_fusion"]

FUSIONS: dict[str, type[Fusion]] = {
    "prefix": Prefix,
    "cross_attention": GatedCrossAttention,
    "bottleneck": Bottleneck,
    "late": Late,
    "mixture": Mixture,
}


def build_fusion(config: MultimodalConfig) -> Fusion:
    """The fusion that the config names; a model that reads text alone has nothing to fuse, and is the plain decoder."""
    return FUSIONS[config.fusion](config) if config.modalities else Prefix(config)
