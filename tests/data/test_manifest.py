"""The manifest: written whole or not at all, read back equal, refused when it cannot be right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from glowflow.config.errors import DataError
from glowflow.data.manifest import MANIFEST_NAME, Manifest, narrowest_dtype
from tests.data.synthetic import numbered_documents, write_dataset


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_dataset(
        tmp_path / "set", {"train": numbered_documents([5, 1, 9, 30]), "test": numbered_documents([4])}
    )


def rewrite(manifest: Manifest, change) -> None:
    content = json.loads(manifest.path.read_text())
    change(content)
    manifest.path.write_text(json.dumps(content))


def test_loads_what_was_saved_by_file_and_by_directory(manifest: Manifest) -> None:
    assert Manifest.load(manifest.root) == manifest
    assert Manifest.load(manifest.path).fingerprint == manifest.fingerprint


def test_splits_add_up(manifest: Manifest) -> None:
    train = manifest.split("train")
    assert (train.documents, train.rows, train.tokens) == (4, 4, 45)
    assert sum(group.tokens for shard in train.shards for group in shard.row_groups) == 45


def test_unknown_split_names_the_others(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="test, train"):
        manifest.split("validation")


def test_fingerprint_does_not_depend_on_the_place_but_on_the_content(manifest: Manifest, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    manifest.root.rename(moved)
    there = Manifest.load(moved)
    assert there.fingerprint == manifest.fingerprint
    assert dataclasses.replace(there, tokenizer_fingerprint="other").fingerprint != manifest.fingerprint


def test_save_leaves_no_partial_file_and_keeps_the_old_one_when_it_fails(manifest: Manifest) -> None:
    before = manifest.path.read_bytes()
    with pytest.raises(TypeError):
        dataclasses.replace(manifest, source={"origin": object()}).save()
    assert manifest.path.read_bytes() == before
    assert [path.name for path in manifest.root.iterdir() if "manifest" in path.name] == [MANIFEST_NAME]


def test_check_finds_a_flipped_byte_a_wrong_size_and_a_missing_shard(tmp_path: Path) -> None:
    whole = write_dataset(tmp_path, {"train": numbered_documents([9] * 30)}, rows_per_group=2, groups_per_shard=5)
    assert whole.check("size") == whole.check("hash") == []
    flipped, grown, lost = (whole.shard_path(shard) for shard in whole.split("train").shards)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    grown.write_bytes(grown.read_bytes() + b"x")
    lost.unlink()
    assert [problem.key for problem in whole.check("size")] == [str(grown), str(lost)]
    seen: list[int] = []
    problems = whole.check("hash", progress=seen.append)
    assert [problem.key for problem in problems] == [str(flipped), str(grown), str(lost)]
    assert "sha256" in problems[0].rule
    assert sum(seen) == sum(shard.bytes for shard in whole.split("train").shards)


def test_missing_manifest_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="glowflow data build"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_garbage_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_wrong_field_types_are_refused(manifest: Manifest) -> None:
    for change in (
        lambda c: c["splits"]["train"].update(tokens="45"),
        lambda c: c["splits"]["train"].update(tokens=-1),
        lambda c: c["splits"]["train"]["shards"][0].update(rows=True),
        lambda c: c.update(splits=[]),
        lambda c: c.update(tokenizer=3),
        lambda c: c.pop("name"),
    ):
        manifest.save()
        rewrite(manifest, change)
        with pytest.raises(DataError):
            Manifest.load(manifest.root)


def test_counts_that_do_not_add_up_are_reported_together(manifest: Manifest) -> None:
    def change(content) -> None:
        content["token_dtype"] = "int8"
        content["splits"]["train"]["tokens"] += 1
        content["splits"]["test"]["shards"][0]["sha256"] = "abc"

    rewrite(manifest, change)
    with pytest.raises(DataError) as caught:
        Manifest.load(manifest.root)
    assert len(caught.value.problems) == 3
    for word in ("token_dtype", "splits.train.tokens", "sha256"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_narrowest_dtype(size: int, dtype: str) -> None:
    assert narrowest_dtype(size) == dtype
