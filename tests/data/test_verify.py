"""What `data list`, `inspect` and `verify` are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig
from glowflow.data.build import BuildOptions, build
from glowflow.data.inspect import inspect_dataset, list_datasets, verify_dataset
from glowflow.data.manifest import Manifest


@pytest.fixture
def built(tmp_path: Path) -> Manifest:
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"document {number}\n" * 10)
    options = BuildOptions(unit_bytes=800)
    return build(str(tmp_path / "in"), tmp_path / "out", "chars", options=options, use_ray=False)


def test_verify_reads_every_shard(built: Manifest) -> None:
    seen: list[int] = []
    report = verify_dataset(built.root, progress=seen.append)
    assert report["ok"] and report["problems"] == [] and sum(seen) == report["bytes"] > 0
    assert json.loads(json.dumps(report)) == report


def test_verify_finds_a_flipped_byte_anywhere(built: Manifest) -> None:
    for split in built.splits.values():
        for shard in split.shards:
            path = built.shard_path(shard)
            content = path.read_bytes()
            for position in (0, len(content) // 3, len(content) - 1):
                flipped = bytearray(content)
                flipped[position] ^= 0x10
                path.write_bytes(flipped)
                report = verify_dataset(built.root)
                assert not report["ok"] and len(report["problems"]) == 1 and shard.path in report["problems"][0]
            path.write_bytes(content)
    assert verify_dataset(built.root)["ok"]


def test_verify_checks_the_tokenizer(built: Manifest) -> None:
    content = json.loads(built.path.read_text())
    content["tokenizer"]["chars"] += "#"
    built.path.write_text(json.dumps(content))
    report = verify_dataset(built.root)
    assert not report["ok"] and "fingerprint" in report["problems"][0]


def test_verify_checks_the_index(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": [f"{split} {n}" for n in range(5)]}), tmp_path / f"{split}.parquet")
    manifest = build(str(tmp_path), tmp_path, "bytes", options=BuildOptions(index_only=True), use_ray=False)
    assert verify_dataset(tmp_path)["ok"]
    index = manifest.root / next(iter(manifest.source["index"].values()))["path"]
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    report = verify_dataset(tmp_path)
    assert not report["ok"] and index.name in report["problems"][0]
    index.unlink()
    assert "cannot be read" in verify_dataset(tmp_path)["problems"][0]


def test_verify_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the manifest does not exist"):
        verify_dataset(tmp_path)


def test_inspect_shows_counts_and_samples(built: Manifest) -> None:
    facts = inspect_dataset(built.root, samples=2)
    assert facts["tokenizer"]["name"] == "chars" and facts["tokenizer"]["vocab_size"] == built.tokenizer().vocab_size
    assert sum(split["documents"] for split in facts["splits"].values()) == 20
    for name, rows in facts["samples"].items():
        assert len(rows) == min(2, facts["splits"][name]["rows"])
        assert all(row["text"] == f"document {row['document_id']}\n" * 10 for row in rows)
    assert inspect_dataset(built.root, samples=0)["samples"] == {}
    assert json.loads(json.dumps(facts)) == facts


def test_list_names_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be")
    rows = {row["name"]: row for row in list_datasets(DataConfig(cache_dir=str(tmp_path / "cache")))}
    text = {"python-stdlib", "tinyshakespeare", "tinyshakespeare-tune", "wikitext-2", "wikitext-103"}
    media = {"digits", "mnist", "fsdd", "av-digits", "flickr8k", "multi30k"}
    assert set(rows) == text | media
    available = {name for name, row in rows.items() if row["available"]}
    assert available == {"python-stdlib", "tinyshakespeare", "tinyshakespeare-tune", "digits"}
    assert "mnist, fsdd" in rows["av-digits"]["where"]
    assert not rows["wikitext-103"]["available"] and "Salesforce/wikitext" in rows["wikitext-103"]["where"]
    assert all(row["licence"] and row["description"] and row["tokenizer"] for row in rows.values())
