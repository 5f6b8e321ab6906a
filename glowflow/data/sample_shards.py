"""Parquet shards of samples with media: one row is one sample, its media as encoded as they came.

Columns beside those of text (``shards.py``): num_prompt (leading tokens without loss), images and audio as
``list<struct<bytes, path>>``, their raw sizes, label, group, and ``bad``: why a row is but the place of a sample. A
picture that several rows of a row group have is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.data.datasets.media.samples import Medium, plain
from glowflow.data.datasets.scan import SHARD_MARK
from glowflow.data.manifest import RowGroupInfo

__all__ = ["MEDIA_BYTES", "MEDIA_ROWS", "REPEATED_BYTES", "SampleRow", "SampleWriter"]

MEDIA_BYTES = 8 << 20  # of different media in a row group
REPEATED_BYTES = 64 << 20  # of all media in a row group, each counted as often as it is there
MEDIA_ROWS = 4096
_DICTIONARY_BYTES = 1 << 30  # never written twice, however large the pictures are
_BYTES = ("images.list.element.bytes", "audio.list.element.bytes")
_REPEATED = ("tokens.list.element", "images.list.element.path", "audio.list.element.path", "label", "group", "bad")


@dataclass(frozen=True)
class SampleRow:
    """One row.

    Args:
        tokens: (N,), one per placeholder; ``num_prompt`` of them have no loss.
        image_sizes: height and width of each picture, orientation applied.
        audio_lengths: samples and rate of each recording.
    """

    document_id: int
    source: str
    text: str
    tokens: npt.NDArray[Any]
    num_prompt: int
    images: tuple[Medium, ...] = ()
    audio: tuple[Medium, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    audio_lengths: tuple[tuple[int, int], ...] = ()
    label: str | None = None
    group: str | None = None
    bad: str | None = None


class SampleWriter:
    """Writes one shard; what it writes depends on the rows alone."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row_group_tokens: int) -> None:
        self._path = path
        self._dtype = dtype
        self._limit = row_group_tokens
        self._writer: Any = None
        self._clear()
        self.row_groups: list[RowGroupInfo] = []

    def _clear(self) -> None:
        self._pending: list[SampleRow] = []
        self._tokens = self._all_bytes = self._different_bytes = 0
        self._different: dict[bytes, bytes] = {}

    def add(self, row: SampleRow) -> None:
        """Append a row."""
        contents = [medium.data for medium in (*row.images, *row.audio)]
        total = sum(map(len, contents))
        fresh = sum(len(data) for data in dict.fromkeys(contents) if data not in self._different)
        full = (
            self._tokens + len(row.tokens) > self._limit
            or self._different_bytes + fresh > MEDIA_BYTES
            or self._all_bytes + total > REPEATED_BYTES
            or len(self._pending) == MEDIA_ROWS
        )
        if full and self._pending:
            self._flush()
            fresh = sum(len(data) for data in dict.fromkeys(contents))
        # Equal bytes of several rows become one object, however often a source has read them.
        kept = {data: self._different.setdefault(data, data) for data in contents}
        images, audio = (tuple(Medium(kept[m.data], m.path) for m in media) for media in (row.images, row.audio))
        self._pending.append(replace(row, images=images, audio=audio))
        self._tokens += len(row.tokens)
        self._all_bytes += total
        self._different_bytes += fresh

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

        rows, total = self._pending, self._all_bytes
        table = pa.Table.from_arrays(_columns(rows), schema=_schema(self._dtype))
        if self._writer is None:
            self._writer = _open_writer(self._path, table.schema)
        self._writer.write_table(table, row_group_size=len(rows))
        self.row_groups.append(RowGroupInfo(len(rows), self._tokens, total))
        self._clear()


def _open_writer(path: Path, schema: Any) -> Any:
    import pyarrow.parquet as pq

    leaves = [_leaf(schema, index) for index in range(len(schema.names))]
    paths = [path for paths in leaves for path in paths]
    return pq.ParquetWriter(
        path,
        schema,
        # JPEG and PNG do not become smaller; WAV does.
        compression={path: "none" if path == _BYTES[0] else "zstd" for path in paths},
        use_dictionary=[*_BYTES, *_REPEATED],
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
        write_statistics=["document_id", "num_tokens"],
    )


def _leaf(schema: Any, index: int) -> list[str]:
    """The paths of a column's leaves, as Parquet calls them."""
    import pyarrow as pa

    field = schema.field(index)
    if not pa.types.is_list(field.type):
        return [field.name]
    element = field.type.value_type
    if pa.types.is_struct(element):
        return [f"{field.name}.list.element.{part.name}" for part in element]
    return [f"{field.name}.list.element"]


def _schema(dtype: np.dtype[Any]) -> Any:
    import pyarrow as pa

    media = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    fields = [
        ("document_id", pa.int64()),
        ("part", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.from_numpy_dtype(dtype))),
        ("num_tokens", pa.int32()),
        ("source", pa.string()),
        ("num_prompt", pa.int32()),
        ("images", media),
        ("audio", media),
        ("image_sizes", pa.list_(pa.struct([("height", pa.int32()), ("width", pa.int32())]))),
        ("audio_lengths", pa.list_(pa.struct([("samples", pa.int64()), ("rate", pa.int32())]))),
        ("label", pa.string()),
        ("group", pa.string()),
        ("bad", pa.string()),
    ]
    return pa.schema(fields, metadata={SHARD_MARK: b"1"})


def _columns(rows: Sequence[SampleRow]) -> list[Any]:
    import pyarrow as pa

    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]))
    return [
        pa.array([row.document_id for row in rows], pa.int64()),
        pa.array(np.zeros(len(rows), np.int32)),
        pa.array([row.text for row in rows], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.tokens for row in rows]))),
        pa.array(lengths),
        pa.array([row.source for row in rows], pa.string()),
        pa.array([row.num_prompt for row in rows], pa.int32()),
        _media_column([row.images for row in rows]),
        _media_column([row.audio for row in rows]),
        _pairs_column([row.image_sizes for row in rows], (("height", pa.int32()), ("width", pa.int32()))),
        _pairs_column([row.audio_lengths for row in rows], (("samples", pa.int64()), ("rate", pa.int32()))),
        pa.array([row.label for row in rows], pa.string()),
        pa.array([row.group for row in rows], pa.string()),
        pa.array([row.bad for row in rows], pa.string()),
    ]


def _offsets(lists: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa

    return pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum([len(one) for one in lists], dtype=np.int32)]))


def _media_column(lists: Sequence[Sequence[Medium]]) -> Any:
    import pyarrow as pa

    flat = [medium for media in lists for medium in media]
    contents = pa.array([medium.data for medium in flat], pa.binary())
    paths = pa.array([plain(medium.path) for medium in flat], pa.string())
    struct = pa.StructArray.from_arrays([contents, paths], names=["bytes", "path"])
    return pa.ListArray.from_arrays(_offsets(lists), struct)


def _pairs_column(lists: Sequence[Sequence[tuple[int, int]]], fields: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as pa

    flat = np.array([pair for pairs in lists for pair in pairs], np.int64).reshape(-1, 2)
    columns = [pa.array(flat[:, index], kind) for index, (_, kind) in enumerate(fields)]
    struct = pa.StructArray.from_arrays(columns, names=[name for name, _ in fields])
    return pa.ListArray.from_arrays(_offsets(lists), struct)
