"""Parquet in the Hugging Face layout: media as ``{bytes, path}``, lists of these, or plain binary columns.

Names of classes come from the features that the library ``datasets`` writes into the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.media.columns import MEDIA_NAMES, Roles, compose
from glowflow.data.datasets.media.files import SampleFile
from glowflow.data.datasets.media.samples import RawSample, is_selected
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts

__all__ = ["has_media", "read", "scan"]

_BATCH_ROWS = 16


def has_media(path: Path) -> bool:
    """Whether a Parquet file has a column of pictures or recordings under one of the usual names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    return any(_is_media(schema, name) for names in MEDIA_NAMES.values() for name in names)


def _is_media(schema: Any, name: str) -> bool:
    """Whether a column holds encoded media by its type."""
    import pyarrow as pa

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def scan(facts: FileFacts) -> SampleFile:
    """A scanned Parquet file: one extent per row group."""
    import pyarrow.parquet as pq

    extents, row = [], 0
    with pq.ParquetFile(facts.path, memory_map=False) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            size = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
            if group.num_rows:
                place = (number, number + 1, row, max(1, size), row)
                extents.append(Extent(facts.path, facts.name, "samples", *place, reader="parquet"))
            row += group.num_rows
    return SampleFile(facts, tuple(extents), facts.columns)


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of some row groups.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(extent.path).parent
    try:
        with pq.ParquetFile(extent.path, memory_map=False) as file:
            schema = file.schema_arrow
            roles = Roles.of(schema.names, settings, usable=lambda name: _is_media(schema, name))
            names = _class_names(schema, roles.label)
            wanted = roles.columns(settings, media=media)
            groups = list(range(extent.start, extent.end))
            row = extent.row
            for record in _records(file, groups, wanted, schema.names):
                identity = _identity(extent, row, record, roles)
                row += 1
                if is_selected(extent, identity.key):
                    yield compose(record, roles, settings, identity, folder, media=media, names=names)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, not of the file
        raise DataError(Problem(extent.path, f"the Parquet file cannot be read: {error}")) from error


def _records(file: Any, groups: list[int], wanted: list[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not wanted:  # rows without anything that is read are counted all the same
        for group in groups:
            yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=wanted, use_threads=False):
        columns = {name: batch.column(name).to_pylist() for name in wanted if name in names}
        for index in range(batch.num_rows):
            yield {name: values[index] for name, values in columns.items()}


def _identity(extent: Extent, row: int, record: dict[str, Any], roles: Roles) -> RawSample:
    name = f"{extent.name}:{row}"
    group = record.get(roles.group) if roles.group is not None else None
    key = name if group is None else f"group:{group}"
    return RawSample(extent.document_id + row - extent.row, name, key)


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names of the classes of a label column, where the file carries them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        return list(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []
