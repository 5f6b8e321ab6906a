"""Recall at k: how often what belongs to a query is among the k most similar ones.

With several texts of a picture a query from the picture counts as answered when any of its texts is among the first k,
and a query from a text when its picture is (M. Hodosh et al., "Framing image description as a ranking task", JAIR 47,
2013). Equally similar ones come in random order, of which the expectation is given: a model to which everything is
alike gets what chance gets, and not 100 %.

Legend: Q queries, K keys, E width, R values of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["recall_at"]

_CHUNK_ELEMENTS = 1 << 22
_TIE = 1e-12  # rounding of a product of unit vectors in fp64


def recall_at(
    queries_qe: ArrayLike, keys_ke: ArrayLike, query_groups_q: ArrayLike, key_groups_k: ArrayLike, at: Sequence[int]
) -> NDArray[np.float64]:
    """Whether a key of the query's group is among the k most similar ones.

    Args:
        queries_qe: unit vectors, as are the keys.
        query_groups_q, key_groups_k: what belongs together; each query's group has a key.
        at: the values of k.

    Returns:
        (Q, R) between 0 and 1; a fraction only where keys are equally similar.

    Raises:
        ValueError: a query whose group has no key, or a k below 1.
    """
    queries, keys = np.asarray(queries_qe, np.float64), np.asarray(keys_ke, np.float64)
    query_groups, key_groups = np.asarray(query_groups_q), np.asarray(key_groups_k)
    if any(k < 1 for k in at):
        raise ValueError(f"recall is at 1 or more, not at {min(at)}")
    if not np.isin(query_groups, key_groups).all():
        raise ValueError("a query needs at least one key of its group")
    found = np.empty((len(queries), len(at)))
    step = max(1, _CHUNK_ELEMENTS // max(1, len(keys)))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        similar_qk = queries[rows] @ keys.T
        right_qk = query_groups[rows, None] == key_groups[None]
        best_q1 = np.where(right_qk, similar_qk, -np.inf).max(1, keepdims=True)
        tied_qk = np.abs(similar_qk - best_q1) <= _TIE
        before_q = ((similar_qk > best_q1 + _TIE) & ~right_qk).sum(1)
        wrong_q, right_q = (tied_qk & ~right_qk).sum(1), (tied_qk & right_qk).sum(1)
        found[rows] = np.stack([_chance(k - before_q, wrong_q, right_q) for k in at], axis=1)
    return found


def _chance(places_q: NDArray[Any], wrong_q: NDArray[Any], right_q: NDArray[Any]) -> NDArray[np.float64]:
    """Probability that one of the right ones comes into so many places, in random order with the wrong ones."""
    none = np.ones(len(places_q))
    for place in range(int(places_q.max(initial=0))):
        left = np.maximum(wrong_q - place, 0)
        none *= np.where(place < places_q, left / np.maximum(left + right_q, 1), 1.0)
    return 1 - none
