"""Seeded permutations that stay the same across numpy versions, generators, and the small cache that the plan keeps.

Only numpy's *raw* bit streams are promised to be stable (NEP 19), so a permutation is the stable argsort of raw
64-bit keys of Philox (Salmon et al., SC'11), seeded by the tuple of everything it depends on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["LRU", "generator", "permutation"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1, a pure function of the non-negative integers ``key``."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable")


def generator(*key: int) -> np.random.Generator:
    """A generator of random numbers, a pure function of the non-negative integers ``key``.

    Its *distributions* may change with numpy's version, so it serves augmentation, and never the order of the data.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class LRU(Generic[K, V]):
    """Keeps the most recently used values up to a total weight. Not thread-safe.

    Args:
        limit: largest total weight.
        weigh: weight of a value; by default every value weighs 1.
        keep: so many of the newest values stay, whatever they weigh.
    """

    def __init__(self, limit: int, weigh: Callable[[V], int] = lambda value: 1, keep: int = 1) -> None:
        self.limit, self.keep = limit, max(1, keep)
        self.total = 0
        self._weigh = weigh
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        if key in self._values:
            self.total -= self._weigh(self._values.pop(key))
        self._values[key] = value
        self.total += self._weigh(value)
        while self.total > self.limit and len(self._values) > self.keep:
            _, oldest = self._values.popitem(last=False)
            self.total -= self._weigh(oldest)

    def __len__(self) -> int:
        return len(self._values)
