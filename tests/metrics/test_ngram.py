"""The byte n-gram baseline: a distribution, right on known sources, and equal to a slow version from the book."""

from __future__ import annotations

import math
import random
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.metrics.ngram import ByteNgramModel

TEXTS = [b"the cat sat on the mat", b"the dog sat on the log", b"a cat and a dog", b"", b"mat"]


def probability(model: ByteNgramModel, context: bytes, byte: int) -> float:
    """P(byte | context at the start of a document), from the difference of two documents."""
    bits = model.document_bits([context, context + bytes([byte])])
    return float(2 ** -(bits[1] - bits[0]))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("context", [b"", b"t", b"the ", b"zzzz", b"the c"])
def test_probabilities_of_all_bytes_sum_to_one(order: int, context: bytes) -> None:
    model = ByteNgramModel(order).fit(TEXTS)
    total = sum(probability(model, context, byte) for byte in range(256))
    assert total == pytest.approx(1.0, abs=1e-9)


class SlowKneserNey:
    """Modified Kneser-Ney over dictionaries, written from the recursion, symbol 256 before each document."""

    def __init__(self, order: int, documents: list[bytes]) -> None:
        self.order = order
        grams: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            symbols = [256] * order + list(document)
            for end in range(order, len(symbols)):
                grams[tuple(symbols[end - order : end + 1])] += 1
        self.counts = {order: grams}
        for length in range(order - 1, -1, -1):
            before: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
            for gram in self.counts[length + 1]:
                before[gram[1:]].add(gram)
            self.counts[length] = Counter({gram: len(longer) for gram, longer in before.items()})

    def discount(self, length: int, count: int) -> float:
        times = Counter(self.counts[length].values())
        n1, n2, n3, n4 = (times[i] for i in (1, 2, 3, 4))
        if not (n1 and n2 and n3):
            return 0.75
        y, i = n1 / (n1 + 2 * n2), min(count, 3)
        raw = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}[i]
        return min(max(raw, 0.1), float(i))

    def probability(self, context: tuple[int, ...], byte: int, length: int) -> float:
        if length < 0:
            return 1 / 256
        history = context[len(context) - length :]
        lower = self.probability(context, byte, length - 1)
        following = {gram: n for gram, n in self.counts[length].items() if gram[:-1] == history}
        total = sum(following.values())
        if not total:
            return lower
        mass = sum(self.discount(length, n) for n in following.values())
        own = following.get((*history, byte), 0)
        kept = own - self.discount(length, own) if own else 0.0
        return (kept + mass * lower) / total

    def bits(self, document: bytes) -> float:
        symbols = [256] * self.order + list(document)
        return -sum(
            math.log2(self.probability(tuple(symbols[end - self.order : end]), symbols[end], self.order))
            for end in range(self.order, len(symbols))
        )


@given(
    st.lists(st.text("ab c", max_size=30).map(str.encode), min_size=1, max_size=6),
    st.text("abcd", max_size=12).map(str.encode),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_slow_version(train: list[bytes], held_out: bytes, order: int) -> None:
    if not any(train):
        with pytest.raises(ValueError, match="at least one byte"):
            ByteNgramModel(order).fit(train)
        return
    fast = ByteNgramModel(order).fit(train).document_bits([held_out, b""])
    assert fast[0] == pytest.approx(SlowKneserNey(order, train).bits(held_out), abs=1e-9)
    assert fast[1] == 0.0


def test_finds_the_entropy_of_a_source_of_its_order() -> None:
    # Each byte is one of two that depend on the one before: one bit of entropy, and no order but 0 needs more.
    generator = random.Random(0)

    def draw(length: int) -> bytes:
        state, out = 0, bytearray()
        for _ in range(length):
            state = (state * 2 + generator.getrandbits(1)) % 64
            out.append(state)
        return bytes(out)

    train, held_out = [draw(100_000)], [draw(20_000)]
    assert ByteNgramModel(1).fit(train).bits_per_byte(held_out) == pytest.approx(1.0, abs=0.02)
    assert ByteNgramModel(0).fit(train).bits_per_byte(held_out) == pytest.approx(6.0, abs=0.02)


def test_a_longer_context_helps_on_source_code_and_is_quick() -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes() for file in files]
    train, held_out = [t for i, t in enumerate(texts) if i % 10], texts[::10]
    bits = [ByteNgramModel(order).fit(train).bits_per_byte(held_out) for order in range(4)]
    assert bits == sorted(bits, reverse=True)
    assert 2.2 < bits[2] < 3.0 and 1.7 < bits[3] < 2.4


def test_bits_of_documents_add_up_and_do_not_see_each_other() -> None:
    model = ByteNgramModel(2).fit(TEXTS)
    alone = [float(model.document_bits([text])[0]) for text in TEXTS]
    np.testing.assert_allclose(model.document_bits(TEXTS), alone, rtol=1e-12)
    assert model.bits_per_byte(TEXTS) == pytest.approx(sum(alone) / sum(map(len, TEXTS)))
    assert math.isnan(model.bits_per_byte([]))


def test_bad_use_is_refused() -> None:
    for order in (-1, 7):
        with pytest.raises(ValueError, match="order"):
            ByteNgramModel(order)
    with pytest.raises(ValueError, match="fitted"):
        ByteNgramModel(1).document_bits([b"x"])
