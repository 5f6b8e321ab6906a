"""The shard writer and reader alone: row groups, types, damage, and files that are replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from glowflow.config.errors import DataError
from glowflow.data.datasets.documents import Piece
from glowflow.data.manifest import Manifest, ShardInfo, SplitInfo, file_sha256
from glowflow.data.processors.text import ByteTokenizer, Tokenizer, WordTokenizer
from glowflow.data.shards import PieceEncoder, ShardWriter, read_tokens


def write_manifest(root: Path, lengths: list[int], limit: int, dtype: str = "uint16") -> Manifest:
    """One shard of rows of the given lengths, counting upwards."""
    writer = ShardWriter(root / "train-00000.parquet", np.dtype(dtype), limit)
    for number, length in enumerate(lengths):
        writer.add(Piece(number, 0, "text", "a.txt", True, True), np.arange(length).astype(dtype))
    writer.close()
    path, groups = root / "train-00000.parquet", writer.row_groups
    rows, tokens = len(lengths), sum(lengths)
    shard = ShardInfo(path.name, path.stat().st_size, file_sha256(path), rows, tokens, groups)
    splits = {"train": SplitInfo([shard], rows, rows, tokens, 4 * rows)}
    return Manifest("counting", root, ByteTokenizer().spec(), "x", dtype, splits)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_row_groups_are_filled_greedily(tmp_path: Path, dtype: str) -> None:
    manifest = write_manifest(tmp_path, [4, 4, 3, 20, 1, 9, 2], 10, dtype)
    groups = manifest.splits["train"].shards[0].row_groups
    assert [(group.rows, group.tokens) for group in groups] == [(2, 8), (1, 3), (1, 20), (2, 10), (1, 2)]
    flat, lengths, ids = read_tokens(manifest, "train", 0, 3)
    assert flat.tolist() == [0, *range(9)] and lengths.tolist() == [1, 9] and ids.tolist() == [4, 5]
    assert str(flat.dtype) == dtype


def test_columns_follow_the_convention(tmp_path: Path) -> None:
    write_manifest(tmp_path, [3], 10)
    schema = pq.read_schema(tmp_path / "train-00000.parquet")
    assert schema.names == ["document_id", "part", "text", "tokens", "num_tokens", "source"]
    assert [str(schema.field(name).type) for name in ("document_id", "part", "num_tokens")] == [
        "int64",
        "int32",
        "int32",
    ]


def test_a_shard_without_rows_is_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.parquet", np.dtype("uint8"), 10)
    writer.close()
    assert not (tmp_path / "a.parquet").exists() and writer.row_groups == []


def test_truncated_and_missing_shards_are_named(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [5, 5], 10)
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000\.parquet: the shard cannot be read"):
        read_tokens(manifest, "train", 0, 0)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet: the shard cannot be read"):
        read_tokens(manifest, "train", 0, 0)


def test_a_replaced_shard_is_read_anew_and_its_counts_are_checked(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [5, 5], 10)
    assert len(read_tokens(manifest, "train", 0, 0)[0]) == 10
    write_manifest(tmp_path, [5, 6], 11)
    with pytest.raises(DataError, match="must have 2 rows, 10 tokens"):
        read_tokens(manifest, "train", 0, 0)


def test_row_groups_that_do_not_exist(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [5], 10)
    with pytest.raises(DataError):
        read_tokens(manifest, "train", 0, 7)


def pieces(*texts: str) -> list[Piece]:
    last = len(texts) - 1
    return [Piece(0, part, text, "a.txt", part == 0, part == last) for part, text in enumerate(texts)]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer(["<eos>", "<unk>", "a", "b"])])
def test_later_pieces_repeat_one_token(tokenizer: Tokenizer) -> None:
    rows = PieceEncoder(tokenizer).rows(pieces("a b\n", "b a\n", "a"))
    joined = np.concatenate([rows[0], rows[1][1:], rows[2][1:]])
    assert np.array_equal(joined, tokenizer.encode_document("a b\nb a\na"))
    assert rows[1][0] == rows[0][-1] and rows[2][0] == rows[1][-1]


def test_a_piece_without_tokens_passes_the_last_token_on() -> None:
    tokenizer = WordTokenizer(["<eos>", "<unk>", "a", "b"])
    rows = PieceEncoder(tokenizer).rows(pieces("   ", "a ", "  ", " b"))
    assert [row.tolist() for row in rows] == [[0], [0, 2], [2], [2, 3]]
