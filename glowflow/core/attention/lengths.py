"""Up to which length ``by_length`` is dense: read from a recorded benchmark, never timed while a model is built.

The file is what ``glowflow bench attention --json`` writes; all that counts of it is
``"dense_up_to": {"cpu": 1024, "cuda": 4096}``, positions by device. What a model computes must not depend on where
it runs, so that one number holds on every device: the largest. Up to there a window saves no time on some device that
was measured, and dense attention sees more.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from glowflow.config.errors import ConfigError, Problem

__all__ = ["SHIPPED", "dense_up_to"]

SHIPPED = Path(__file__).with_name("lengths.json")
_KEY = "model.attention.adaptive.benchmark"


@lru_cache(maxsize=16)
def dense_up_to(benchmark: str | None = None) -> int:
    """Longest sequence that is dense, in positions.

    Args:
        benchmark: path of another file than the shipped one.

    Raises:
        ConfigError: the file cannot be read, or names no length.
    """
    path = SHIPPED if benchmark is None else Path(benchmark)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem(_KEY, f"cannot be read: {error.strerror}", str(path))) from error
    except ValueError as error:
        raise ConfigError(Problem(_KEY, f"must be JSON: {error}", str(path))) from error
    by_device = content.get("dense_up_to") if isinstance(content, dict) else None
    lengths = list(by_device.values()) if isinstance(by_device, dict) else []
    if not lengths or not all(type(length) is int and length > 0 for length in lengths):
        rule = "must hold `dense_up_to: {device: positions}`, as `glowflow bench attention --json` writes it"
        raise ConfigError(Problem(_KEY, rule, str(path), "or set model.attention.adaptive.dense_up_to"))
    return max(lengths)
