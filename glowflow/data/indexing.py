"""``data build --index-only``: Parquet files stay as they are; beside them come a manifest and length indexes.

An index has one row per piece that a build would have written (row group, row, document id, part, number of tokens),
so plans work alike; the tokens themselves are made when a row group is read. A Parquet file that has a column
``tokens`` and no ``text`` is taken as tokenised: each list is a whole document, cut after every 65,535 targets.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.documents import Piece, read_pieces
from glowflow.data.datasets.scan import INDEX_MARK
from glowflow.data.datasets.source import Extent, Source, row_hash
from glowflow.data.manifest import Manifest, file_sha256
from glowflow.data.processors.text import Tokenizer, tokenizer_from_spec
from glowflow.data.shards import MAX_ROW_TOKENS, PieceEncoder, TokenBlock
from glowflow.data.units import STATE_DIR, Unit

__all__ = ["index_unit", "plan_index_units", "read_indexed_tokens"]

_ENCODE_PIECES = 64
_COLUMNS = ("row_group", "row", "document_id", "part", "num_tokens")
Entry = tuple[int, int, int, npt.NDArray[Any]]  # row in its row group, document id, part, tokens


def plan_index_units(source: Source) -> list[Unit]:
    """One unit per split and Parquet file.

    Raises:
        DataError: the source has files of another kind; all are named.
    """
    grouped: dict[tuple[str, str], list[Extent]] = defaultdict(list)
    problems = {}
    for split, extents in source.splits.items():
        for extent in extents:
            grouped[split, extent.path].append(extent)
            if extent.kind != "parquet" or extent.clip is not None:
                rule = "must be a Parquet file for --index-only" if extent.kind != "parquet" else "has one row only"
                problems[extent.path] = Problem(extent.path, rule, hint="build shards instead")
    if problems:
        raise DataError(list(problems.values()), title="an index needs Parquet files of several rows")
    units: list[Unit] = []
    numbers: dict[str, int] = defaultdict(int)
    for (split, _), extents in grouped.items():
        units.append(Unit(len(units), split, f"index-{split}-{numbers[split]:05d}.parquet", tuple(extents)))
        numbers[split] += 1
    return units


def index_unit(out: Path, unit: Unit, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure the rows of one Parquet file and write its index."""
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    row_groups, text_bytes = [], 0
    for extent in unit.extents:
        lengths = []
        for row, document_id, part, tokens, size in _entries(extent, tokenizer):
            values = (extent.start, row, document_id, part, len(tokens))
            for name, value in zip(_COLUMNS, values, strict=True):
                columns[name].append(value)
            lengths.append(len(tokens))
            text_bytes += size
        if lengths:
            row_groups.append([len(lengths), sum(lengths)])
    result = {"index": unit.index, "split": unit.split, "documents": len(set(columns["document_id"]))}
    result |= {"text_bytes": text_bytes, "skipped_rows": [], "shard": None}
    if not row_groups:
        return result
    path = Path(unit.extents[0].path)
    relative = Path(os.path.relpath(path, out)).as_posix()
    shard = {"path": relative, "bytes": path.stat().st_size, "sha256": file_sha256(path), "row_groups": row_groups}
    return {**result, "shard": shard, **_write_index(out, unit, columns, relative)}


def _write_index(out: Path, unit: Unit, columns: dict[str, list[int]], shard: str) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict(zip(_COLUMNS, (pa.int32(), pa.int64(), pa.int64(), pa.int32(), pa.int32()), strict=True))
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({INDEX_MARK: b"1"})
    partial = out / STATE_DIR / f"{unit.shard}.{os.getpid()}.partial"
    pq.write_table(table, partial, compression="zstd")
    facts = {"path": unit.shard, "bytes": partial.stat().st_size, "sha256": file_sha256(partial)}
    os.replace(partial, out / unit.shard)
    return {"index_key": f"{unit.split}:{shard}", "index_file": facts}


def _entries(extent: Extent, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int, npt.NDArray[Any], int]]:
    """(row in the row group, document id, part, tokens, bytes of text) of every piece with a target."""
    if _is_tokenised(extent.path):
        for row, tokens in _token_lists(extent, tokenizer):
            document_id = extent.document_id + row
            for part, piece in enumerate(_cut_tokens(tokens)):
                fresh = piece if part == 0 else piece[1:]
                yield row, document_id, part, piece, len(tokenizer.decode(fresh).encode("utf-8"))
        return
    problems: list[Problem] = []
    for text_piece, tokens in _text_rows(read_pieces(extent, problems), tokenizer):
        row = text_piece.document_id - extent.document_id
        yield row, text_piece.document_id, text_piece.part, tokens, len(text_piece.text.encode("utf-8"))
    if problems:
        raise DataError(problems)


def _text_rows(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, npt.NDArray[Any]]]:
    encoder = PieceEncoder(tokenizer)
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _ENCODE_PIECES:
            yield from _with_targets(batch, encoder.rows(batch))
            batch = []
    yield from _with_targets(batch, encoder.rows(batch))


def _with_targets(pieces: Sequence[Piece], rows: list[npt.NDArray[Any]]) -> Iterator[tuple[Piece, npt.NDArray[Any]]]:
    return ((piece, row) for piece, row in zip(pieces, rows, strict=True) if len(row) > 1)


@lru_cache(maxsize=64)
def _is_tokenised(path: str) -> bool:
    import pyarrow.parquet as pq

    return "text" not in pq.read_schema(path).names


def _token_lists(extent: Extent, tokenizer: Tokenizer) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(row, tokens) of a row group of token lists, selected rows only."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(extent.path, memory_map=False) as file:
        column = file.read_row_group(extent.start, columns=["tokens"], use_threads=False).column(0)
    for row, value in enumerate(column):
        key = f"{extent.name}:{extent.row + row}"
        if extent.select is not None and not extent.select[0] <= row_hash(key) < extent.select[1]:
            continue
        tokens = np.asarray(value.values.to_numpy(zero_copy_only=False)) if value.is_valid else np.empty(0, np.int64)
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < tokenizer.vocab_size):
            rule = (
                f"row {row} of row group {extent.start} has token ids outside the vocabulary of {tokenizer.vocab_size}"
            )
            raise DataError(Problem(extent.path, rule, hint="name the tokenizer that made them with --tokenizer"))
        yield row, tokens.astype(tokenizer.dtype)


def _cut_tokens(tokens: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Pieces of at most 65,536 tokens, each beginning with the last token of the one before."""
    step = MAX_ROW_TOKENS - 1
    return [tokens[start : start + MAX_ROW_TOKENS] for start in range(0, len(tokens) - 1, step)]


@lru_cache(maxsize=32)
def _load_index(path: str, _size: int, _mtime_ns: int) -> dict[str, npt.NDArray[np.int64]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, use_threads=False)
    return {name: table.column(name).to_numpy().astype(np.int64) for name in _COLUMNS}


@lru_cache(maxsize=4)
def _tokenizer(_fingerprint: str, manifest_path: str) -> Tokenizer:
    return tokenizer_from_spec(Manifest.load(manifest_path).tokenizer_spec)


def read_indexed_tokens(manifest: Manifest, split: str, shard_index: int, row_group: int) -> TokenBlock:
    """As ``shards.read_tokens``, for an index-only data set: the rows of the split are tokenised now.

    Raises:
        DataError: the index or the Parquet file is missing or has changed.
    """
    shard = manifest.split(split).shards[shard_index]
    index = _index_of(manifest, f"{split}:{shard.path}")
    groups = np.unique(index["row_group"])
    group = int(groups[row_group])
    inside = index["row_group"] == group
    wanted = index["row"][inside]
    documents = index["document_id"][inside]
    extent = Extent(str(manifest.shard_path(shard)), shard.path, "parquet", group, group + 1, 0, 0)
    tokenizer = _tokenizer(manifest.tokenizer_fingerprint, str(manifest.path))
    rows = list(_wanted_rows(extent, tokenizer, set(wanted.tolist())))
    lengths = np.array([len(row) for row in rows], np.int64)
    if not np.array_equal(lengths, index["num_tokens"][inside]):
        hint = "the Parquet file has changed since it was indexed: build the index again"
        raise DataError(Problem(extent.path, f"row group {group} does not have the lengths of its index", hint=hint))
    return np.concatenate(rows), lengths, documents


def _wanted_rows(extent: Extent, tokenizer: Tokenizer, wanted: set[int]) -> Iterator[npt.NDArray[Any]]:
    if _is_tokenised(extent.path):
        for row, tokens in _token_lists(extent, tokenizer):
            if row in wanted:
                yield from _cut_tokens(tokens)
        return
    pieces = (piece for piece in read_pieces(extent) if piece.document_id in wanted)
    for _, tokens in _text_rows(pieces, tokenizer):
        yield tokens


def _index_of(manifest: Manifest, key: str) -> dict[str, npt.NDArray[np.int64]]:
    import pyarrow as pa

    facts = manifest.source.get("index", {}).get(key)
    if facts is None:
        raise DataError(Problem(str(manifest.path), "names no index for a shard", key, "build the index again"))
    path = manifest.root / facts["path"]
    try:
        status = path.stat()
        return _load_index(str(path), status.st_size, status.st_mtime_ns)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            Problem(str(path), f"the index cannot be read: {error}", hint="build the index again")
        ) from error
