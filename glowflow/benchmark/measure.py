"""What a measurement is: step times of one variant, and how several variants are compared.

Variants are run in alternation, round by round, and compared by the median of their steady steps, because the speed
of a machine drifts by more than the differences that are looked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Measurement", "alternate", "summarise"]


@dataclass
class Measurement:
    """Steady steps of one variant in one round.

    Args:
        step_ms: milliseconds per optimiser step, warm-up left out.
        tokens_per_step: positions of the global batch.
        data_wait_share: share of the time in which the loop waited for data; None where there is no data path.
        seconds_to_first_step: from the call to the end of the first step.
        peak_memory_bytes: of the device on CUDA, of the process elsewhere; None when unknown.
        details: anything else worth keeping (kernel, MFU denominator, versions).
    """

    step_ms: list[float]
    tokens_per_step: int
    data_wait_share: float | None = None
    seconds_to_first_step: float | None = None
    peak_memory_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def alternate(
    runners: Mapping[str, Callable[[], Measurement]], rounds: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, list[Measurement]]:
    """Run every variant once per round, in turn."""
    results: dict[str, list[Measurement]] = {name: [] for name in runners}
    for number in range(rounds):
        for name, runner in runners.items():
            progress(f"round {number + 1}/{rounds}: {name}")
            results[name].append(runner())
    return results


def summarise(results: Mapping[str, Sequence[Measurement]], baseline: str) -> dict[str, Any]:
    """Medians per variant, and how fast each is relative to ``baseline`` (above 1: faster), paired round by round."""
    medians = {name: [statistics.median(m.step_ms) for m in rounds] for name, rounds in results.items()}
    summary: dict[str, Any] = {}
    for name, rounds in results.items():
        step_ms = statistics.median(medians[name])
        ratios = [base / own for base, own in zip(medians[baseline], medians[name], strict=True)]
        waits = [m.data_wait_share for m in rounds if m.data_wait_share is not None]
        firsts = [m.seconds_to_first_step for m in rounds if m.seconds_to_first_step is not None]
        peaks = [m.peak_memory_bytes for m in rounds if m.peak_memory_bytes is not None]
        summary[name] = {
            "step_ms": step_ms,
            "tokens_per_second": 1000.0 * rounds[0].tokens_per_step / step_ms,
            f"speed_relative_to_{baseline}": statistics.median(ratios),
            "ratios": ratios,
            "data_wait_share": statistics.median(waits) if waits else None,
            "seconds_to_first_step": statistics.median(firsts) if firsts else None,
            "peak_memory_bytes": max(peaks, default=None),
            "steps_measured": sum(len(m.step_ms) for m in rounds),
            "rounds": [asdict(m) for m in rounds],
        }
    return summary
