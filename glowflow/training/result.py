"""How a training run ended, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LoopResult"]


@dataclass
class LoopResult:
    """How a run ended; ``status`` is FINISHED or KILLED (stopped cleanly, can be resumed)."""

    status: str
    step: int
    tokens: int
    final: dict[str, float]
    checkpoints: list[str]
    seconds: float
    best: dict[str, float] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)
    tokens_per_second: float | None = None
    step_time_ms: float | None = None
    goodput: float | None = None
