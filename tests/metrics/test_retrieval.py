"""Recall at k: against sorting, with ties as in random order, several texts of one picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from glowflow.metrics.retrieval import recall_at


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_equals_sorting() -> None:
    pictures, texts = unit(40, 6, 0), unit(200, 6, 1)
    owners = np.random.default_rng(2).permutation(np.repeat(np.arange(40), 5))
    texts = texts + 0.8 * pictures[owners]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    from_texts = recall_at(texts, pictures, owners, np.arange(40), (1, 5, 10))
    from_pictures = recall_at(pictures, texts, np.arange(40), owners, (1, 5, 10))
    for row, text in enumerate(texts):
        order = np.argsort(-(pictures @ text))
        rank = int(np.nonzero(order == owners[row])[0][0]) + 1
        assert from_texts[row].tolist() == [rank <= 1, rank <= 5, rank <= 10]
    for row, picture in enumerate(pictures):
        order = np.argsort(-(texts @ picture))
        rank = int(np.nonzero(owners[order] == row)[0][0]) + 1
        assert from_pictures[row].tolist() == [rank <= 1, rank <= 5, rank <= 10]
    assert 0.1 < from_texts[:, 0].mean() < 0.9 and (np.diff(from_texts.mean(0)) > 0).all()


def test_a_model_to_which_all_is_alike_gets_what_chance_gets() -> None:
    same = np.tile(unit(1, 4, 0), (20, 1))
    found = recall_at(same, same, np.arange(20), np.arange(20), (1, 5, 10, 20))
    assert found == pytest.approx(np.tile([1 / 20, 5 / 20, 10 / 20, 1], (20, 1)))
    # Five texts of each of four pictures: one right among the first k of 20.
    texts = recall_at(same[:4], same, np.arange(4), np.repeat(np.arange(4), 5), (1, 2, 5))
    assert texts[0] == pytest.approx(
        [5 / 20, 1 - (15 * 14) / (20 * 19), 1 - 11 * 12 * 13 * 14 * 15 / (16 * 17 * 18 * 19 * 20)]
    )


def test_ties_are_the_mean_over_all_orders() -> None:
    keys = np.array([[1.0, 0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0, 1]])
    groups = np.array([9, 1, 2, 1, 3])
    (found,) = recall_at([[1.0, 0]], keys, [1], groups, (1, 2, 3, 4))
    orders = [(0, *middle, 4) for middle in itertools.permutations((1, 2, 3))]
    for k, value in enumerate(found, 1):
        assert value == pytest.approx(np.mean([any(groups[key] == 1 for key in order[:k]) for order in orders]))


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, groups = unit(30, 5, 3), unit(30, 5, 4), np.arange(30)
    whole = recall_at(queries, keys, groups, groups, (1, 5))
    monkeypatch.setattr("glowflow.metrics.retrieval._CHUNK_ELEMENTS", 70)
    np.testing.assert_array_equal(recall_at(queries, keys, groups, groups, (1, 5)), whole)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="key of its group"):
        recall_at(unit(2, 3, 0), unit(2, 3, 1), [0, 5], [0, 1], (1,))
    with pytest.raises(ValueError, match="at 1 or more"):
        recall_at(unit(2, 3, 0), unit(2, 3, 1), [0, 1], [0, 1], (0,))
