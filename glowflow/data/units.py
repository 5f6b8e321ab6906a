"""Units of work of a build: each is a fixed group of documents that becomes exactly one shard.

The grouping depends on the source and the options alone, so that shards are the same bytes whether one process or a
cluster makes them. A unit leaves its result beside its shard; a build that was killed goes on from those.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.documents import STRIDE, Piece, num_parts, previous_texts, read_pieces
from glowflow.data.datasets.source import Extent, Source
from glowflow.data.manifest import RowGroupInfo, file_sha256
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import Tokenizer, tokenizer_from_spec
from glowflow.data.shards import PieceEncoder, ShardWriter

__all__ = [
    "STATE_DIR",
    "STATE_FILE",
    "Unit",
    "load_state",
    "plan_units",
    "publish",
    "run_unit",
    "training_texts",
    "write_json",
]

logger = logging.getLogger(__name__)

STATE_DIR = ".building"
STATE_FILE = "build.json"
_SMALLEST_UNIT, _LARGEST_UNIT, _UNITS_AIMED = 4 << 20, 256 << 20, 256
_ENCODE_BYTES = 256 << 10  # texts handed to the tokenizer at once
_SAMPLE_PARTS = 64


@dataclass(frozen=True)
class Unit:
    """A group of extents of one split, and the name of the shard that they become."""

    index: int
    split: str
    shard: str
    extents: tuple[Extent, ...]

    def to_json(self) -> str:
        return json.dumps([self.index, self.split, self.shard, [extent.to_dict() for extent in self.extents]])

    @classmethod
    def from_json(cls, text: str) -> Unit:
        index, split, shard, extents = json.loads(text)
        return cls(index, split, shard, tuple(Extent.from_dict(extent) for extent in extents))


def plan_units(source: Source, unit_bytes: int | None = None) -> list[Unit]:
    """Group a source's documents into units of about ``unit_bytes`` of text (default: 4 to 256 MiB)."""
    total = sum(extent.size for extents in source.splits.values() for extent in extents)
    limit = unit_bytes or min(max(total // _UNITS_AIMED, _SMALLEST_UNIT), _LARGEST_UNIT)
    units: list[Unit] = []
    for split, extents in source.splits.items():
        for number, group in enumerate(_groups(extents, limit)):
            units.append(Unit(len(units), split, f"{split}-{number:05d}.parquet", tuple(group)))
    return units


def _groups(extents: Iterable[Extent], limit: int) -> Iterator[list[Extent]]:
    group: list[Extent] = []
    size = 0
    for extent in _bounded(extents, limit):
        group.append(extent)
        size += extent.size
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bounded(extents: Iterable[Extent], limit: int) -> Iterator[Extent]:
    """The extents, long documents cut into runs of pieces no larger than about ``limit``."""
    step = max(1, limit // STRIDE)
    for extent in extents:
        count = num_parts(extent.end - extent.start)
        if extent.kind != "text" or count <= step:
            yield extent
            continue
        for first in range(0, count, step):
            last = min(first + step, count)
            yield replace(extent, parts=(first, last), size=(last - first) * STRIDE)


def training_texts(source: Source, limit: int | None) -> Iterator[str]:
    """Texts of the training split to train a tokenizer on.

    Args:
        source: where they lie.
        limit: UTF-8 bytes to read at most, from places spread over the split by hash; None: everything.
    """
    extents = list(_bounded(source.splits.get("train", []), _SAMPLE_PARTS * STRIDE))
    if limit is not None and sum(extent.size for extent in extents) > limit:
        extents.sort(key=lambda e: hashlib.sha256(f"{e.name}:{e.start}:{e.parts}:{e.row}".encode()).digest())
    count = 0
    for extent in extents:
        for piece in read_pieces(extent, []):
            yield piece.text
            count += len(piece.text.encode("utf-8"))
            if limit is not None and count >= limit:
                return


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
    os.replace(partial, path)


@lru_cache(maxsize=2)
def _state(path: str, _mtime_ns: int) -> tuple[Tokenizer, dict[str, Any]]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return tokenizer_from_spec(content["tokenizer"]), content


def load_state(out: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and options of the build that goes on in a directory (kept per process)."""
    path = out / STATE_DIR / STATE_FILE
    return _state(str(path), path.stat().st_mtime_ns)


def run_unit(out: str, unit_json: str) -> dict[str, Any]:
    """Make one shard; what a worker does.

    Returns:
        The unit's result, also kept in the state directory; with ``problems`` when it could not be made.
    """
    unit, directory = Unit.from_json(unit_json), Path(out)
    try:
        tokenizer, state = load_state(directory)
        if state["index_only"]:
            from glowflow.data.indexing import index_unit

            result = index_unit(directory, unit, tokenizer)
        elif state.get("samples") is not None:
            from glowflow.data.sample_build import make_sample_shard

            assert isinstance(tokenizer, MediaTokenizer), "a build of samples always has one"
            result = make_sample_shard(directory, unit, tokenizer, state)
        else:
            result = _make_shard(directory, unit, tokenizer, state)
    except DataError as error:
        problems = error.problems or (Problem(unit.shard, str(error)),)
        return {"index": unit.index, "problems": [[p.key, p.rule, p.hint] for p in problems]}
    except OSError as error:
        where = str(error.filename or directory)
        rule = f"cannot be read or written: {error.strerror or error}"
        return {"index": unit.index, "retry": True, "problems": [[where, rule, ""]]}
    write_json(directory / STATE_DIR / f"unit-{unit.index:06d}.json", result)
    return result


def _make_shard(out: Path, unit: Unit, tokenizer: Tokenizer, state: dict[str, Any]) -> dict[str, Any]:
    partial = out / STATE_DIR / f"{unit.shard}.{os.getpid()}.partial"
    writer = ShardWriter(partial, tokenizer.dtype, state["row_group_tokens"])
    bad: list[Problem] = []
    documents = text_bytes = 0
    try:
        for extent in unit.extents:
            counted = extent.parts is not None and extent.parts[0] > 0
            for piece, tokens in _token_rows(extent, tokenizer, bad):
                counted = counted and not piece.first
                if len(tokens) > 1:  # a piece without tokens (white space under `words`) has nothing to learn
                    writer.add(piece, tokens)
                    documents += not counted
                    text_bytes += len(piece.text.encode("utf-8"))
                    counted = True
        writer.close()
        if bad and state["on_bad_file"] == "refuse":
            raise DataError(bad)
        result = {"index": unit.index, "split": unit.split, "documents": documents, "text_bytes": text_bytes}
        result["skipped_rows"] = [[problem.key, problem.rule] for problem in bad]
        return {**result, **publish(out, unit, partial, writer)}
    finally:
        partial.unlink(missing_ok=True)


def _token_rows(extent: Extent, tokenizer: Tokenizer, bad: list[Problem]) -> Iterator[tuple[Piece, Any]]:
    """Pieces with their tokens; texts go to the tokenizer in batches, which changes nothing but the speed."""
    encoder = PieceEncoder(tokenizer, _token_before(extent, tokenizer))
    batch: list[Piece] = []
    size = 0
    for piece in read_pieces(extent, bad):
        batch.append(piece)
        size += len(piece.text)
        if size >= _ENCODE_BYTES:
            yield from zip(batch, encoder.rows(batch), strict=True)
            batch, size = [], 0
    yield from zip(batch, encoder.rows(batch), strict=True)


def _token_before(extent: Extent, tokenizer: Tokenizer) -> int | None:
    """The last token before an extent that begins inside a document."""
    for text in previous_texts(extent):
        if len(ids := tokenizer.encode_pieces([text], [False])[0]):
            return int(ids[-1])
    return None


class _Written(Protocol):
    row_groups: list[RowGroupInfo]


def publish(out: Path, unit: Unit, partial: Path, writer: _Written) -> dict[str, Any]:
    """Move a finished shard to its place, and describe it as the manifest will."""
    if not writer.row_groups:
        return {"shard": None}
    groups = [[group.rows, group.tokens, group.media_bytes] for group in writer.row_groups]
    shard = {
        "path": unit.shard,
        "bytes": partial.stat().st_size,
        "sha256": file_sha256(partial),
        "row_groups": groups,
    }
    os.replace(partial, out / unit.shard)
    return {"shard": shard}
