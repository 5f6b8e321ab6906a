"""The targets of a split in the order in which an evaluation plan gives them, with the document of each; and the texts.

An evaluation plan is not shuffled, so target number i of the plan is target number i of the rows: all tokens of a row
but its first. That gives each loss its document without carrying ids through the batches. Packed batches come in that
order; with lanes the number of each target is known and its document is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.data.manifest import Manifest
from glowflow.data.shards import read_rows, read_tokens

__all__ = ["TargetLookup", "TargetStream", "document_texts"]

Ids = NDArray[np.int64]


class TargetStream:
    """Hands out the targets of a split, in order, as many at a time as asked for."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._blocks = _target_blocks(manifest, split)
        self._targets, self._documents = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def take(self, count: int) -> tuple[Ids, Ids]:
        """The next targets and their document ids, (count,) each; fewer at the end of the split."""
        targets, documents = [self._targets], [self._documents]
        have = len(self._targets)
        while have < count:
            block = next(self._blocks, None)
            if block is None:
                break
            targets.append(block[0])
            documents.append(block[1])
            have += len(block[0])
        all_targets, all_documents = np.concatenate(targets), np.concatenate(documents)
        self._targets, self._documents = all_targets[count:], all_documents[count:]
        return all_targets[:count], all_documents[:count]


class TargetLookup:
    """The document of any target of a split; holds two numbers per row."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        counts, documents = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for shard, group in _row_groups(manifest, split):
            _, lengths, row_documents = read_tokens(manifest, split, shard, group)
            counts.append(lengths - 1)
            documents.append(row_documents)
        self._ends, self._documents = np.cumsum(np.concatenate(counts)), np.concatenate(documents)

    def documents(self, numbers_n: Ids) -> Ids:
        """(N,) document ids of the targets with these numbers."""
        found: Ids = self._documents[np.searchsorted(self._ends, numbers_n, side="right")]
        return found


def _row_groups(manifest: Manifest, split: str) -> Iterator[tuple[int, int]]:
    for index, shard in enumerate(manifest.split(split).shards):
        for group in range(len(shard.row_groups)):
            yield index, group


def _target_blocks(manifest: Manifest, split: str) -> Iterator[tuple[Ids, Ids]]:
    """Targets and document ids of one row group after the other."""
    for shard, group in _row_groups(manifest, split):
        tokens, lengths, documents = read_tokens(manifest, split, shard, group)
        is_target = np.ones(len(tokens), np.bool_)
        is_target[np.cumsum(lengths) - lengths] = False
        yield tokens[is_target].astype(np.int64), np.repeat(documents, lengths - 1)


def document_texts(manifest: Manifest, split: str) -> Iterator[bytes]:
    """The documents of a split as UTF-8, whole and in order.

    Raises:
        DataError: a shard is missing or damaged.
    """
    current: int | None = None
    pieces: list[bytes] = []
    for document, piece in _text_pieces(manifest, split):
        if document != current and pieces:
            yield b"".join(pieces)
            pieces = []
        current = document
        pieces.append(piece)
    if pieces:
        yield b"".join(pieces)


def _text_pieces(manifest: Manifest, split: str) -> Iterator[tuple[int, bytes]]:
    tokenizer: Any = manifest.tokenizer() if manifest.index_only else None
    for shard, group in _row_groups(manifest, split):
        if tokenizer is None:
            table = read_rows(manifest, split, shard, group, ["document_id", "text"])
            rows = zip(table["document_id"].to_pylist(), table["text"].to_pylist(), strict=True)
            yield from ((document, text.encode("utf-8")) for document, text in rows)
            continue
        # Beside foreign Parquet the text column has any name: the tokens say the same.
        tokens, lengths, documents = read_tokens(manifest, split, shard, group)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        for document, start, end in zip(documents.tolist(), starts.tolist(), ends.tolist(), strict=True):
            yield document, tokenizer.decode(tokens[start + 1 : end]).encode("utf-8")
