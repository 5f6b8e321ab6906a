"""The baseline beside the model: an order-N byte model, interpolated down to the uniform distribution.

Order N means a context of N bytes. Documents begin with boundary symbols, so each of their bytes is predicted. The
grams of the highest order are counted as sorted integer codes, in numpy alone; all lower orders follow from them, and a
look-up is a binary search.

Smoothing: modified Kneser-Ney (Chen & Goodman 1998, TR-10-98, section 3), h' is h without its oldest byte:

    P_k(b | h) = (c_k(h b) - D(c_k(h b)) + (sum of D over h) * P_{k-1}(b | h')) / c_k(h .),   P_{-1} = 1 / 256

c_N are counts; c_k below counts the different bytes in front of a gram, not its occurrences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByteNgramModel"]

_BOUNDARY = 256
_BASE = 257  # the bytes and the boundary
_MAX_ORDER = 6  # 257 ** 7 still fits a signed 64-bit code
_FLAT_DISCOUNT = 0.75  # where there are too few grams to estimate one

Codes = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """What one order knows. Codes are sorted, so that they can be searched; h is a context, b a byte."""

    grams: Codes  # (G,) codes of (h, b)
    kept: Reals  # (G,) c(h b) - D(c(h b))
    contexts: Codes  # (C,) codes of h
    totals: Reals  # (C,) c(h .)
    discounted: Reals  # (C,) sum of D over h


class ByteNgramModel:
    """Byte model with contexts of ``order`` bytes.

    Args:
        order: 0 to 6.

    Raises:
        ValueError: the order is out of range.
    """

    def __init__(self, order: int) -> None:
        if not 0 <= order <= _MAX_ORDER:
            raise ValueError(f"order must be 0 to {_MAX_ORDER}, it is {order}")
        self.order = order
        self._orders: list[_Order] = []

    def fit(self, documents: Iterable[bytes]) -> ByteNgramModel:
        """Count the bytes of the documents; an earlier fit is forgotten.

        Raises:
            ValueError: there is no byte to count.
        """
        symbols, is_byte = _symbols(documents, self.order)
        if not is_byte.any():
            raise ValueError("an n-gram model needs at least one byte of text")
        grams, counts = np.unique(_codes(symbols, is_byte, self.order), return_counts=True)
        orders = [_order(grams, counts)]
        for length in range(self.order - 1, -1, -1):
            # Every byte has a full context, so the suffixes of all grams are all grams of the order below.
            grams, counts = np.unique(grams % _BASE ** (length + 1), return_counts=True)
            orders.append(_order(grams, counts))
        self._orders = orders[::-1]
        return self

    def document_bits(self, documents: Sequence[bytes]) -> Reals:
        """Bits that the model needs for each document, (number of documents,)."""
        if not self._orders:
            raise ValueError("the model must be fitted first")
        symbols, is_byte = _symbols(documents, self.order)
        probability = np.full(int(is_byte.sum()), 1 / 256)
        for length, order in enumerate(self._orders):
            probability = _interpolate(order, _codes(symbols, is_byte, length), probability)
        owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        bits = np.bincount(owner, weights=-np.log2(probability), minlength=len(documents))
        return bits.astype(np.float64)

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Bits per byte over all documents; NaN where they hold none."""
        size = sum(len(document) for document in documents)
        return float(self.document_bits(documents).sum()) / size if size else math.nan


def _symbols(documents: Iterable[bytes], order: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Documents with ``order`` boundary symbols before each, and which symbols are bytes."""
    boundary = np.full(order, _BOUNDARY, np.int16)
    pieces: list[NDArray[Any]] = [boundary]
    for document in documents:
        pieces += [np.frombuffer(document, np.uint8).astype(np.int16), boundary]
    symbols = np.concatenate(pieces)
    return symbols, symbols != _BOUNDARY


def _codes(symbols: NDArray[np.int16], is_byte: NDArray[np.bool_], length: int) -> Codes:
    """For each byte the code of its last ``length`` predecessors and itself, the oldest in front."""
    positions = np.flatnonzero(is_byte)
    codes = np.zeros(len(positions), np.int64)
    for back in range(length, -1, -1):
        codes *= _BASE
        codes += symbols[positions - back]
    return codes


def _order(grams: Codes, counts: NDArray[Any]) -> _Order:
    counts = counts.astype(np.float64)
    discount = _discounts(counts)[np.minimum(counts, 3).astype(np.int64)]
    contexts, first = np.unique(grams // _BASE, return_index=True)
    totals, discounted = np.add.reduceat(counts, first), np.add.reduceat(discount, first)
    return _Order(grams, counts - discount, contexts, totals, discounted)


def _discounts(counts: Reals) -> Reals:
    """D for counts 0, 1, 2, and 3 or more, from how many grams occur 1 to 4 times (Chen & Goodman, equation 26)."""
    n1, n2, n3, n4 = (float((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, _FLAT_DISCOUNT, _FLAT_DISCOUNT, _FLAT_DISCOUNT])
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(estimated, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0])


def _interpolate(order: _Order, codes: Codes, lower: Reals) -> Reals:
    """P_k of each coded byte, given P_{k-1}; an unseen context leaves P_{k-1} as it is."""
    kept = _look_up(order.grams, codes, order.kept)
    contexts = codes // _BASE
    total = _look_up(order.contexts, contexts, order.totals)
    discounted = _look_up(order.contexts, contexts, order.discounted)
    probability = lower.copy()
    np.divide(kept + discounted * lower, total, out=probability, where=total > 0)
    return probability


def _look_up(keys: Codes, wanted: Codes, values: Reals) -> Reals:
    """The values at the wanted keys, 0 where a key is absent."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0.0)
