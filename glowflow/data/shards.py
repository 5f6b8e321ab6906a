"""Parquet shards: rows of pieces of documents in, flat token arrays out.

A row is one piece: document_id, part, text, tokens, num_tokens, source. A row group holds about ``row_group_tokens``
tokens, so that a window of the plan opens little more than it needs. What a writer writes depends on the rows alone.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.documents import Piece
from glowflow.data.datasets.scan import SHARD_MARK
from glowflow.data.manifest import Manifest, RowGroupInfo
from glowflow.data.processors.text import Tokenizer

__all__ = ["MAX_ROW_TOKENS", "ROW_GROUP_TOKENS", "PieceEncoder", "ShardWriter", "read_rows", "read_tokens"]

MAX_ROW_TOKENS = 65_536
ROW_GROUP_TOKENS = 262_144
_READING = threading.Lock()  # an open Parquet reader serves one thread at a time
TokenBlock = tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]


class PieceEncoder:
    """Turns the pieces of documents, in order, into the token rows of the contract.

    The first piece of a document begins with bos, every other one repeats the last token before it (as input only);
    the last piece ends with eos where the tokenizer has one.
    """

    def __init__(self, tokenizer: Tokenizer, previous: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._previous = tokenizer.bos_id if previous is None else previous

    def rows(self, pieces: list[Piece]) -> list[npt.NDArray[Any]]:
        """One array per piece; of length 1 where a piece has no token (it then holds no target)."""
        tokenizer, rows = self._tokenizer, []
        encoded = tokenizer.encode_pieces([piece.text for piece in pieces], [piece.first for piece in pieces])
        for piece, ids in zip(pieces, encoded, strict=True):
            before = tokenizer.bos_id if piece.first else self._previous
            after = [tokenizer.eos_id] if piece.last and tokenizer.eos_id is not None else []
            row = np.concatenate([np.array([before], tokenizer.dtype), ids, np.array(after, tokenizer.dtype)])
            if len(row) > MAX_ROW_TOKENS:
                given = f"{len(row)} tokens for {len(piece.text)} characters"
                rule = f"the tokenizer gives {given}; a row holds {MAX_ROW_TOKENS}"
                raise DataError(
                    Problem("data.tokenizer", rule, hint="choose a tokenizer with at most one token per byte")
                )
            self._previous = int(row[-1])
            rows.append(row)
        return rows


@dataclass(frozen=True)
class _Row:
    piece: Piece
    tokens: npt.NDArray[Any]


class ShardWriter:
    """Writes one shard; row groups are filled greedily up to ``row_group_tokens``."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row_group_tokens: int) -> None:
        self._path = path
        self._dtype = dtype
        self._limit = row_group_tokens
        self._pending: list[_Row] = []
        self._pending_tokens = 0
        self._writer: Any = None
        self.row_groups: list[RowGroupInfo] = []

    def add(self, piece: Piece, tokens: npt.NDArray[Any]) -> None:
        """Append a row."""
        if self._pending and self._pending_tokens + len(tokens) > self._limit:
            self._flush()
        self._pending.append(_Row(piece, tokens))
        self._pending_tokens += len(tokens)

    def close(self) -> None:
        """Write what is pending. A shard without rows writes no file."""
        try:
            if self._pending:
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self._pending = self._pending, []
        lengths = np.array([len(row.tokens) for row in rows], np.int32)
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        values = pa.array(np.concatenate([row.tokens for row in rows]))
        columns = [
            pa.array([row.piece.document_id for row in rows], pa.int64()),
            pa.array([row.piece.part for row in rows], pa.int32()),
            pa.array([row.piece.text for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), values),
            pa.array(lengths),
            pa.array([row.piece.source for row in rows], pa.string()),
        ]
        table = pa.Table.from_arrays(columns, schema=self._schema())
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", use_dictionary=["tokens.list.element", "source"]
            )
        self._writer.write_table(table, row_group_size=len(rows))
        self.row_groups.append(RowGroupInfo(len(rows), int(lengths.sum())))
        self._pending_tokens = 0

    def _schema(self) -> Any:
        import pyarrow as pa

        fields = [
            ("document_id", pa.int64()),
            ("part", pa.int32()),
            ("text", pa.string()),
            ("tokens", pa.list_(pa.from_numpy_dtype(self._dtype))),
            ("num_tokens", pa.int32()),
            ("source", pa.string()),
        ]
        return pa.schema(fields, metadata={SHARD_MARK: b"1"})


@lru_cache(maxsize=16)
def _open(path: str, _size: int, _mtime_ns: int) -> Any:
    """An open Parquet file; size and time are in the key so that a file that was replaced is opened anew."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=False)


def read_rows(manifest: Manifest, split: str, shard_index: int, row_group: int, columns: list[str]) -> Any:
    """Some columns of one row group as a pyarrow table.

    Raises:
        DataError: the shard is missing or damaged.
    """
    import pyarrow as pa

    path = manifest.shard_path(manifest.split(split).shards[shard_index])
    try:
        status = os.stat(path)
        file = _open(str(path), status.st_size, status.st_mtime_ns)
        with _READING:
            return file.read_row_group(row_group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException, IndexError) as error:
        hint = "check it with `glowflow data verify`, and build the data set again"
        raise DataError(Problem(str(path), f"the shard cannot be read: {error}", hint=hint)) from error


def read_tokens(manifest: Manifest, split: str, shard_index: int, row_group: int) -> TokenBlock:
    """The tokens of one row group.

    Args:
        manifest: of a built data set, or of an index beside foreign Parquet (then texts are tokenised here).
        split, shard_index, row_group: which row group, as counted in the manifest.

    Returns:
        flat tokens (N,) of the manifest's dtype, read-only; row lengths (R,) int64; document ids (R,) int64.

    Raises:
        DataError: the shard is missing, damaged, or has other counts than the manifest says.
    """
    if manifest.index_only:
        from glowflow.data.indexing import read_indexed_tokens

        return read_indexed_tokens(manifest, split, shard_index, row_group)
    table = read_rows(manifest, split, shard_index, row_group, ["tokens", "document_id"])
    lists = table.column("tokens").combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=True)
    offsets = lists.offsets.to_numpy(zero_copy_only=True)
    lengths = np.diff(offsets).astype(np.int64)
    documents = table.column("document_id").to_numpy().astype(np.int64, copy=False)
    shard = manifest.split(split).shards[shard_index]
    expected = shard.row_groups[row_group]
    if (len(lengths), len(flat)) != (expected.rows, expected.tokens) or str(flat.dtype) != manifest.token_dtype:
        counts = f"{expected.rows} rows, {expected.tokens} tokens of {manifest.token_dtype}"
        rule = f"row group {row_group} must have {counts}"
        found = f"{len(lengths)} rows, {len(flat)} tokens of {flat.dtype}"
        raise DataError(Problem(str(manifest.shard_path(shard)), rule, found, "build the data set again"))
    return flat, lengths, documents
