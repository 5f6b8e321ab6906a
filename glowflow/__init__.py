"""GlowFlow: one YAML file becomes a trained, tracked, resumable, evaluated language model.

The names below are loaded when they are first used, so that ``import glowflow`` costs nothing: it loads neither
torch nor Ray nor MLflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glowflow.config.loader import load_config
    from glowflow.core.model import GlowFlowModel
    from glowflow.orchestration.pipeline import TrainingPipeline

__all__ = ["GlowFlowModel", "TrainingPipeline", "__version__", "load_config"]

__version__ = "0.1.0"

_LAZY = {
    "GlowFlowModel": "glowflow.core.model",
    "TrainingPipeline": "glowflow.orchestration.pipeline",
    "load_config": "glowflow.config.loader",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'glowflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
