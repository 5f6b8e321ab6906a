"""Which parameters of a search mattered: permutation importance of a random forest, on trials that it has not seen.

L. Breiman, "Random forests", Machine Learning 45 (2001), section 10. A forest learns the rank of a trial's metric from
its parameters on some folds; on the held-out fold one parameter is shuffled, and what the prediction loses is its
importance. Ranks, because one diverged trial would drown all others. The spread over folds and repeats is the
uncertainty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_ROWS", "Explanation", "Importance", "explain", "importance"]

MIN_ROWS = 8
MIN_SCORE = 0.1  # noise reaches a little above zero now and then
REPEATS = 3
FOLDS = 5
SHUFFLES = 8
TREES = 40

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """How much one parameter matters.

    Args:
        mean: drop of the held-out R^2 when the parameter is shuffled: 0 nothing, about 1 and above everything.
        std: standard deviation of that drop over folds and repeats.
    """

    key: str
    mean: float
    std: float


@dataclass(frozen=True)
class Explanation:
    """What a forest makes of a search.

    Args:
        importances: the largest first; empty where there is a reason.
        num_rows: how many points it learned from.
        score: R^2 on held-out points: which share of the differences the parameters explain.
        reason: why there is no answer.
    """

    importances: Sequence[Importance]
    num_rows: int
    score: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self) | {"importances": [asdict(one) for one in self.importances]}


def importance(rows: Sequence[Mapping[str, Any]], values: Sequence[float], *, seed: int = 0) -> list[Importance]:
    """The importance of each parameter that varies; see ``explain``, which also says why the list is empty."""
    return list(explain(rows, values, seed=seed).importances)


def explain(rows: Sequence[Mapping[str, Any]], values: Sequence[float], *, seed: int = 0) -> Explanation:
    """Learn the metric from the parameters, and measure what each parameter contributes.

    Args:
        rows: the parameters of each point; a conditional one may be absent. Texts, lists and mappings are categories.
        values: the metric of each point; points whose value is not finite are left out.
        seed: of the forests, folds and shuffles: equal input gives equal output.

    Returns:
        The importances, or the reason for none: fewer than 8 points, no parameter or no metric that varies, or a
        forest that predicts unseen points hardly better than their mean does, whose importances would be noise.

    Raises:
        ValueError: rows and values differ in number.
    """
    if len(rows) != len(values):
        raise ValueError(f"each point needs one value, not {len(values)} for {len(rows)}")
    kept = [(row, float(value)) for row, value in zip(rows, values, strict=True) if math.isfinite(value)]
    points = [row for row, _ in kept]
    target = _ranks(np.array([value for _, value in kept]))
    keys = [key for key in dict.fromkeys(key for row in points for key in row) if _varies(points, key)]
    reason = _refusal(len(kept), keys, target)
    if reason is not None:
        return Explanation([], len(kept), reason=reason)
    blocks = [_columns(points, key) for key in keys]
    scores, drops = _held_out_drops(blocks, target, seed)
    score = float(scores.mean())
    if score < MIN_SCORE:
        reason = f"the parameters hardly predict the metric of unseen points (R^2 {score:.2f} over {len(kept)} points)"
        return Explanation([], len(kept), score, reason)
    found = [Importance(key, float(drops[:, i].mean()), float(drops[:, i].std(ddof=1))) for i, key in enumerate(keys)]
    return Explanation(sorted(found, key=lambda one: -one.mean), len(kept), score)


def _refusal(num_rows: int, keys: Sequence[str], target: Floats) -> str | None:
    if num_rows < MIN_ROWS:
        return f"importance needs at least {MIN_ROWS} points with a result, there are {num_rows}"
    if not keys:
        return "importance needs a parameter that varies, all points have the same values"
    if np.ptp(target) == 0:
        return "importance needs a metric that varies, all points have the same value"
    return None


def _ranks(values: Floats) -> Floats:
    """Ranks with ties shared, scaled to 0 to 1."""
    order = np.searchsorted(np.sort(values), values, side="left") + np.searchsorted(np.sort(values), values, "right")
    return order / (2.0 * max(len(values), 1))


def _varies(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({_name(row[key]) if key in row else None for row in rows}) > 1


def _name(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _columns(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """(N, C) columns of one parameter: a number and where it is absent, or one column per category."""
    present = [row[key] for row in rows if key in row]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
        fill = float(np.median(present))
        numbers = np.array([[float(row.get(key, fill)), float(key in row)] for row in rows])
        return numbers if len(present) < len(rows) else numbers[:, :1]
    names = [_name(row[key]) if key in row else None for row in rows]
    categories = list(dict.fromkeys(names))
    return np.array([[float(name == category) for category in categories] for name in names])


def _held_out_drops(blocks: Sequence[Floats], target: Floats, seed: int) -> tuple[Floats, Floats]:
    """R^2 of each held-out fold (F,), and what it loses by shuffling each parameter (F, P)."""
    from sklearn.ensemble import RandomForestRegressor  # type: ignore[import-untyped]
    from sklearn.model_selection import KFold  # type: ignore[import-untyped]

    features = np.concatenate(blocks, axis=1)
    generator = np.random.default_rng(seed)
    # One denominator for all folds: a fold of two points has hardly any variance of its own.
    variance = float(target.var())
    scores, drops = [], []
    for repeat in range(REPEATS):
        for train, test in KFold(FOLDS, shuffle=True, random_state=seed + repeat).split(features):
            forest = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=seed + repeat, n_jobs=1)
            forest.fit(features[train], target[train])
            asked = np.concatenate([features[test], *_shuffled(blocks, features, test, generator)])
            errors = np.square(forest.predict(asked).reshape(-1, len(test)) - target[test]).mean(axis=1) / variance
            scores.append(1 - errors[0])
            drops.append(errors[1:].reshape(len(blocks), SHUFFLES).mean(axis=1) - errors[0])
    return np.array(scores), np.array(drops)


def _shuffled(
    blocks: Sequence[Floats], features: Floats, test: NDArray[np.intp], generator: np.random.Generator
) -> list[Floats]:
    """The held-out points, for each parameter several times with its columns taken from other points."""
    asked, start = [], 0
    for block in blocks:
        columns = slice(start, start := start + block.shape[1])
        for _ in range(SHUFFLES):
            mixed = features[test].copy()
            # From all points: within a fold of two there is hardly anything to swap.
            mixed[:, columns] = block[generator.integers(0, len(block), len(test))]
            asked.append(mixed)
    return asked
