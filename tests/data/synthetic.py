"""Small data sets with known tokens, in the layout that `glowflow data build` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glowflow.data.manifest import Manifest, RowGroupInfo, ShardInfo, SplitInfo, file_sha256

BYTES_SPEC: dict[str, Any] = {"kind": "bytes"}

Documents = Sequence[Sequence[int] | np.ndarray]


def numbered_documents(lengths: Sequence[int], first: int = 1) -> list[np.ndarray]:
    """Documents of the given lengths in which every token of the corpus is a number of its own."""
    edges = first + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return [np.arange(a, b) for a, b in pairwise(edges)]


def expected_targets(documents: Documents) -> list[int]:
    """Every token but the first of each document."""
    return [int(token) for document in documents for token in document[1:]]


def write_dataset(
    root: Path,
    splits: Mapping[str, Documents],
    *,
    name: str = "synthetic",
    rows_per_group: int = 4,
    groups_per_shard: int = 3,
    max_row_tokens: int = 1 << 16,
    token_dtype: str = "uint32",
    tokenizer_fingerprint: str = "numbers",
) -> Manifest:
    """Write documents as Parquet shards with a manifest; documents are cut into rows that share one token."""
    root.mkdir(parents=True, exist_ok=True)
    built = {}
    for split, documents in splits.items():
        rows = [
            piece for number, document in enumerate(documents) for piece in _pieces(number, document, max_row_tokens)
        ]
        groups = [rows[i : i + rows_per_group] for i in range(0, len(rows), rows_per_group)]
        shards = [
            _write_shard(root, f"{split}-{i:05d}.parquet", groups[first : first + groups_per_shard], token_dtype)
            for i, first in enumerate(range(0, len(groups), groups_per_shard))
        ]
        built[split] = SplitInfo(
            shards=shards,
            rows=len(rows),
            documents=len(documents),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(len(document) for document in documents),
        )
    manifest = Manifest(name, root, BYTES_SPEC, tokenizer_fingerprint, token_dtype, built)
    manifest.save()
    return manifest


def _pieces(number: int, document: Any, limit: int) -> list[tuple[int, int, np.ndarray]]:
    tokens = np.asarray(document)
    starts = range(0, max(1, len(tokens) - 1), limit - 1)
    return [(number, part, tokens[start : start + limit]) for part, start in enumerate(starts)]


def _write_shard(root: Path, name: str, groups: list[list[tuple[int, int, np.ndarray]]], dtype: str) -> ShardInfo:
    schema = pa.schema(
        [
            ("document_id", pa.int64()),
            ("part", pa.int32()),
            ("text", pa.string()),
            ("tokens", pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))),
            ("num_tokens", pa.int32()),
            ("source", pa.string()),
        ]
    )
    infos = []
    with pq.ParquetWriter(root / name, schema) as writer:
        for rows in groups:
            tokens = [row[2].astype(dtype) for row in rows]
            columns = {
                "document_id": [row[0] for row in rows],
                "part": [row[1] for row in rows],
                "text": [""] * len(rows),
                "tokens": tokens,
                "num_tokens": [len(row) for row in tokens],
                "source": [name] * len(rows),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
            infos.append(RowGroupInfo(len(rows), sum(len(row) for row in tokens)))
    path = root / name
    return ShardInfo(
        path=name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        rows=sum(info.rows for info in infos),
        tokens=sum(info.tokens for info in infos),
        row_groups=infos,
    )
