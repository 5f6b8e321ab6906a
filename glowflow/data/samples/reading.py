"""Reading samples: the light columns of a whole window, and the media of single rows.

Light are tokens, sizes of media, labels and names; all that the order and the lengths of sequences depend on. The
media themselves are read one row group at a time when one of their rows is due.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.data.manifest import Manifest
from glowflow.data.order import LRU
from glowflow.data.samples.table import SampleTable

__all__ = ["File", "MediaReader", "Rows", "read_window"]

Ints = NDArray[np.int64]
_FACTS = {"image": ("image_sizes", "height", "width"), "audio": ("audio_lengths", "samples", "rate")}
_FILES = {"image": "images", "audio": "audio"}
_LIGHT = ["document_id", "tokens", "source", "num_prompt", "image_sizes", "audio_lengths", "label", "group", "bad"]
_STRING_BYTES = 57  # of a Python string, beside its characters
_READING = threading.Lock()  # an open Parquet reader serves one thread at a time
_HINT = "check it with `glowflow data verify`, and build the data set again"


@dataclass
class Rows:
    """The light columns of the R rows of a window. Rows of one document in pieces are samples of their own."""

    tokens: NDArray[Any]  # (N,) of all rows, one after the other
    offsets: Ints  # (R + 1,) where each row begins
    num_prompt: Ints  # (R,) leading tokens on which there is no loss
    document_ids: Ints  # (R,)
    labels: Ints  # (R,) index among the data set's labels; -1: none
    facts: dict[str, Ints]  # by modality: (M, 2) of all media, row after row
    first_medium: dict[str, Ints]  # by modality: (R + 1,) where each row's media begin
    names: list[str | None]  # (R,) where each comes from
    groups: list[str | None]  # (R,)
    bad: dict[int, str]  # row -> why it was found bad when the data set was built

    @cached_property
    def nbytes(self) -> int:
        """About how many bytes all of it takes."""
        arrays = [self.tokens, self.offsets, self.num_prompt, self.document_ids, self.labels]
        arrays += [*self.facts.values(), *self.first_medium.values()]
        texts = sum(len(text) + _STRING_BYTES for text in (*self.names, *self.groups) if text is not None)
        return texts + sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return len(self.document_ids)

    def bad_rows(self) -> Ints:
        """Rows that were found bad when the data set was built."""
        return np.fromiter(self.bad, np.int64, len(self.bad))

    def media_of(self, modality: str, row: int) -> Ints:
        """(m, 2) the facts of a row's media of one modality."""
        first = self.first_medium[modality]
        return self.facts[modality][int(first[row]) : int(first[row + 1])]


def read_window(table: SampleTable, window: int, labels: dict[str, int]) -> Rows:
    """The light columns of a window.

    Args:
        table: the windows of a source. window: which.
        labels: label -> index.

    Raises:
        DataError: a shard is missing, damaged, or not what the manifest says.
    """
    groups = table.groups(window)
    pieces = [_text_alone(table, g) if not table.manifest.media else _light(table, g, labels) for g in groups]
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _text_alone(table: SampleTable, group: int) -> Rows:
    from glowflow.data.shards import read_tokens

    where = (table.manifest, table.split, int(table.shard[group]), int(table.row_group[group]))
    tokens, lengths, documents = read_tokens(*where)
    rows = len(lengths)
    return Rows(
        tokens=tokens,
        offsets=_starts(lengths),
        num_prompt=np.ones(rows, np.int64),
        document_ids=documents,
        labels=np.full(rows, -1, np.int64),
        facts={name: np.zeros((0, 2), np.int64) for name in MODALITIES},
        first_medium={name: np.zeros(rows + 1, np.int64) for name in MODALITIES},
        names=[None] * rows,
        groups=[None] * rows,
        bad={},
    )


def _light(table: SampleTable, group: int, labels: dict[str, int]) -> Rows:
    from glowflow.data.shards import read_rows

    manifest, shard, row_group = table.manifest, int(table.shard[group]), int(table.row_group[group])
    arrow = read_rows(manifest, table.split, shard, row_group, _LIGHT)
    path = str(manifest.shard_path(manifest.split(table.split).shards[shard]))
    missing = [name for name in _LIGHT if name not in arrow.column_names]
    if missing:
        raise DataError(Problem(path, f"the shard has no column {', '.join(missing)}", hint=_HINT))
    columns = {name: arrow.column(name).combine_chunks() for name in _LIGHT}
    tokens = columns["tokens"].flatten().to_numpy(zero_copy_only=True)
    rows = Rows(
        tokens=tokens,
        offsets=_row_starts(columns["tokens"]),
        num_prompt=columns["num_prompt"].to_numpy().astype(np.int64),
        document_ids=columns["document_id"].to_numpy().astype(np.int64),
        labels=np.array([labels.get(label, -1) for label in columns["label"].to_pylist()], np.int64),
        facts={name: _facts(columns[_FACTS[name][0]], _FACTS[name][1:]) for name in MODALITIES},
        first_medium={name: _row_starts(columns[_FACTS[name][0]]) for name in MODALITIES},
        names=columns["source"].to_pylist(),
        groups=columns["group"].to_pylist(),
        bad={row: reason for row, reason in enumerate(columns["bad"].to_pylist()) if reason is not None},
    )
    info = manifest.split(table.split).shards[shard].row_groups[row_group]
    if (len(rows), len(tokens)) != (info.rows, info.tokens) or str(tokens.dtype) != manifest.token_dtype:
        rule = f"row group {row_group} must have {info.rows} rows, {info.tokens} tokens of {manifest.token_dtype}"
        found = f"{len(rows)} rows, {len(tokens)} tokens of {tokens.dtype}"
        raise DataError(Problem(path, rule, found, "build the data set again"))
    _check_placeholders(rows, manifest, path)
    return rows


def _check_placeholders(rows: Rows, manifest: Manifest, path: str) -> None:
    """Every good row has as many placeholders as media: all positions are counted on that."""
    good = np.ones(len(rows), np.bool_)
    good[rows.bad_rows()] = False
    for index, name in enumerate(MODALITIES):
        where = np.flatnonzero(rows.tokens == media_token(manifest, name))
        row_of = np.searchsorted(rows.offsets, where, side="right") - 1
        placeholders = np.bincount(row_of, minlength=len(rows))
        wrong = good & (placeholders != np.diff(rows.first_medium[name]))
        if wrong.any():
            first = int(np.argmax(wrong))
            rule = f"every row must have as many placeholders as media ({MODALITIES[index]})"
            found = f"document {int(rows.document_ids[first])}"
            raise DataError(Problem(path, rule, found, "build the data set again"))


def media_token(manifest: Manifest, modality: str) -> int:
    """The id of a modality's placeholder; -1 with a tokenizer that has none."""
    spec = manifest.tokenizer_spec
    if spec.get("kind") != "media":
        return -1
    return int(spec["vocab_size"]) - len(MODALITIES) + MODALITIES.index(modality)


def _facts(lists: Any, names: tuple[str, ...]) -> Ints:
    structs = lists.flatten()
    fields = [structs.field(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in names]
    return np.stack(fields, axis=1)


def _row_starts(lists: Any) -> Ints:
    offsets = lists.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    return offsets - offsets[0]


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _joined(pieces: list[Rows]) -> Rows:
    def starts(arrays: list[Ints]) -> Ints:
        return _starts(np.concatenate([np.diff(array) for array in arrays]))

    before = _starts(np.array([len(piece) for piece in pieces])).tolist()

    def arrays(name: str) -> Any:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    return Rows(
        tokens=arrays("tokens"),
        offsets=starts([piece.offsets for piece in pieces]),
        num_prompt=arrays("num_prompt"),
        document_ids=arrays("document_ids"),
        labels=arrays("labels"),
        facts={name: np.concatenate([piece.facts[name] for piece in pieces]) for name in MODALITIES},
        first_medium={name: starts([piece.first_medium[name] for piece in pieces]) for name in MODALITIES},
        names=[name for piece in pieces for name in piece.names],
        groups=[group for piece in pieces for group in piece.groups],
        bad={at + row: why for at, piece in zip(before, pieces, strict=False) for row, why in piece.bad.items()},
    )


class File(NamedTuple):
    """A medium as it lies in a shard."""

    key: tuple[int, int, str, int]  # equal for equal files of a row group
    content: bytes | None  # None: the shard has none


class _Files:
    """The files of the rows of one row group; equal ones are held once.

    Args:
        lists: pyarrow list of structs with dictionary-encoded ``bytes``.
    """

    def __init__(self, lists: Any) -> None:
        self.nbytes = int(lists.get_total_buffer_size())
        self._first = _row_starts(lists).tolist()
        contents = lists.flatten().field("bytes")
        self._index = contents.indices.to_pylist()
        self._different = contents.dictionary

    def of_row(self, row: int) -> list[tuple[int, bytes | None]]:
        """The number among the different ones, and the content, of each of a row's files."""
        indices = self._index[self._first[row] : self._first[row + 1]]
        return [(-1, None) if index is None else (index, self._different[index].as_py()) for index in indices]


class MediaReader:
    """The encoded media of rows; row groups are kept within a memory limit. The caller holds a lock.

    Args:
        tables: the windows of each source.
        cache_bytes: largest size of all row groups kept.
    """

    def __init__(self, tables: list[SampleTable], cache_bytes: int) -> None:
        self._tables = tables
        # Samples are drawn from all over a window, so less than a window of each source would be read again and again.
        in_use = sum(int(table.held_bytes.max()) if len(table) else 0 for table in tables)
        self._columns: LRU[tuple[int, int, str], _Files] = LRU(max(cache_bytes, in_use), lambda files: files.nbytes)
        self.groups_read = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._columns.total

    def files(self, source: int, window: int, row: int, modality: str) -> list[File]:
        """A row's files, in order.

        Args:
            row: index in the window.

        Raises:
            DataError: the shard is missing or damaged.
        """
        table = self._tables[source]
        groups = table.groups(window)
        ends = np.cumsum(table.group_rows[groups.start : groups.stop])
        index = int(np.searchsorted(ends, row, side="right"))
        inside = row - int(ends[index] - table.group_rows[groups[index]])
        found = self._column(source, groups[index], modality).of_row(inside)
        return [File((source, groups[index], modality, number), content) for number, content in found]

    def _column(self, source: int, group: int, modality: str) -> _Files:
        column = self._columns.get((source, group, modality))
        if column is None:
            table = self._tables[source]
            where = (table.split, int(table.shard[group]), int(table.row_group[group]))
            column = _Files(_media_column(table.manifest, *where, modality))
            self.groups_read += 1
            self._columns.put((source, group, modality), column)
        return column


def _media_column(manifest: Manifest, split: str, shard_index: int, row_group: int, modality: str) -> Any:
    """The files of one row group: a pyarrow list of structs with ``bytes``, equal files stored once."""
    import pyarrow as pa

    path = manifest.shard_path(manifest.split(split).shards[shard_index])
    try:
        status = os.stat(path)
        file = _open(str(path), status.st_size, status.st_mtime_ns)
        with _READING:
            name = f"{_FILES[modality]}.list.element.bytes"
            table = file.read_row_group(row_group, columns=[name], use_threads=False)
        return table.column(_FILES[modality]).combine_chunks()
    except (OSError, KeyError, IndexError, pa.ArrowException) as error:
        raise DataError(Problem(str(path), f"the shard cannot be read: {error}", hint=_HINT)) from error


@lru_cache(maxsize=16)
def _open(path: str, _size: int, _mtime_ns: int) -> Any:
    """An open Parquet file; size and time are in the key so that a file that was replaced is opened anew."""
    import pyarrow.parquet as pq

    dictionaries = [f"{name}.list.element.bytes" for name in _FILES.values()]
    return pq.ParquetFile(path, memory_map=False, read_dictionary=dictionaries)
