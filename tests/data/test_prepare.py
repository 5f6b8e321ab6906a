"""From the config to checked manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig, SourceConfig
from glowflow.data.build import build
from glowflow.data.manifest import Manifest
from glowflow.data.prepare import ensure_built, expected_vocabulary, find_built


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for name, word in (("first", "alpha"), ("second", "beta")):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.txt").write_text(f"{word} {number}\n" * 20)
    return tmp_path


def configure(root: Path, dataset: str = "first", **keys: object) -> DataConfig:
    return DataConfig(dataset=str(root / dataset), cache_dir=str(root / "cache"), **keys)  # type: ignore[arg-type]


def test_builds_once_and_reuses(corpora: Path) -> None:
    config = configure(corpora)
    calls: list[int] = []
    (first, weight), *rest = ensure_built(
        config, use_ray=False, progress=lambda done, total, tokens: calls.append(done)
    )
    assert calls and not rest and weight == 1.0
    assert first.tokenizer_spec["kind"] == "bytes" and first.root.is_relative_to(corpora / "cache")
    calls.clear()
    (again, _), *_ = ensure_built(config, use_ray=False, progress=lambda done, total, tokens: calls.append(done))
    assert again.fingerprint == first.fingerprint and not calls
    (chars, _), *_ = ensure_built(configure(corpora, tokenizer="chars"), use_ray=False)
    assert chars.root != first.root


def test_changed_contents_are_built_again(corpora: Path) -> None:
    (first, _), *_ = ensure_built(configure(corpora), use_ray=False)
    (corpora / "first" / "0.txt").write_text("changed")
    (second, _), *_ = ensure_built(configure(corpora), use_ray=False)
    assert first.root != second.root and first.check("hash") == []


def test_several_sources_share_the_first_tokenizer(corpora: Path) -> None:
    sources = [
        SourceConfig(dataset=str(corpora / name), weight=weight) for name, weight in (("first", 2), ("second", 1))
    ]
    built = ensure_built(configure(corpora, sources=sources, tokenizer="chars"), use_ray=False)
    assert [weight for _, weight in built] == [2.0, 1.0]
    one, two = (manifest for manifest, _ in built)
    assert one.tokenizer_fingerprint == two.tokenizer_fingerprint
    assert set("alph") <= set(one.tokenizer_spec["chars"]) and "b" not in one.tokenizer_spec["chars"]


def test_built_sources_of_different_tokenizers(corpora: Path) -> None:
    build(str(corpora / "first"), corpora / "a", "bytes", use_ray=False)
    build(str(corpora / "second"), corpora / "b", "chars", use_ray=False)
    sources = [SourceConfig(dataset=str(corpora / name)) for name in ("a", "b")]
    with pytest.raises(DataError, match="must have the tokenizer of the first source"):
        ensure_built(configure(corpora, sources=sources), use_ray=False)


def test_built_directory_and_its_tokenizer(corpora: Path) -> None:
    manifest = build(str(corpora / "first"), corpora / "built", "bpe:300", use_ray=False)
    (loaded, _), *_ = ensure_built(configure(corpora, "built"), use_ray=False)
    assert loaded.fingerprint == manifest.fingerprint
    path = corpora / "tokenizer.json"
    path.write_text(manifest.tokenizer_spec["tokenizer_json"])
    for good in ("bpe", "bpe:300"):
        ensure_built(configure(corpora, "built", tokenizer=good), use_ray=False)
    for bad in ("bytes", "bpe:301"):
        with pytest.raises(DataError, match=r"data\.tokenizer: must be the tokenizer of .*bpe:300"):
            ensure_built(configure(corpora, "built", tokenizer=bad), use_ray=False)


def test_tokenizer_from_a_path(corpora: Path) -> None:
    trained = build(str(corpora / "first"), corpora / "built", "bpe:300", use_ray=False)
    path = corpora / "tokenizer.json"
    path.write_text(trained.tokenizer_spec["tokenizer_json"])
    (manifest, _), *_ = ensure_built(configure(corpora, "second", tokenizer=str(path)), use_ray=False)
    assert manifest.tokenizer_spec["tokenizer_json"] == trained.tokenizer_spec["tokenizer_json"]
    build(str(corpora / "second"), corpora / "other", str(path), use_ray=False)
    ensure_built(configure(corpora, "other", tokenizer=str(path)), use_ray=False)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_changed_shard_is_named(corpora: Path, damage: str) -> None:
    manifest = build(str(corpora / "first"), corpora / "built", use_ray=False)
    shard = manifest.shard_path(manifest.splits["validation"].shards[0])
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: shard.write_bytes(content),
        "cut": lambda: shard.write_bytes(content[:-1]),
        "remove": shard.unlink,
    }[damage]()
    with pytest.raises(DataError, match=shard.name):
        ensure_built(configure(corpora, "built", verify="hash"), use_ray=False)
    if damage == "flip":  # sizes alone do not show it
        assert ensure_built(configure(corpora, "built", verify="size"), use_ray=False)


def test_shards_without_manifest(corpora: Path) -> None:
    build(str(corpora / "first"), corpora / "built", use_ray=False)
    (corpora / "built" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        ensure_built(configure(corpora, "built"), use_ray=False)


def test_damage_in_the_cache_is_an_error_too(corpora: Path) -> None:
    (manifest, _), *_ = ensure_built(configure(corpora), use_ray=False)
    manifest.shard_path(manifest.splits["train"].shards[0]).write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000\.parquet"):
        ensure_built(configure(corpora), use_ray=False)


def test_an_unknown_split(corpora: Path) -> None:
    with pytest.raises(DataError, match="no such split"):
        ensure_built(configure(corpora, train_split="training"), use_ray=False)


def test_nothing_is_written_for_a_corpus_with_garbage(corpora: Path) -> None:
    (corpora / "first" / "x.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"x\.txt"):
        ensure_built(configure(corpora), use_ray=False)
    assert not (corpora / "cache").exists()
    (manifest, _), *_ = ensure_built(configure(corpora, on_bad_file="skip"), use_ray=False)
    assert [skipped["name"] for skipped in Manifest.load(manifest.root).source["skipped"]] == ["x.txt"]


def test_find_built_builds_nothing(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOWFLOW_DATA", raising=False)
    sources = [
        SourceConfig(dataset=str(corpora / name), weight=weight) for name, weight in (("first", 2), ("second", 1))
    ]
    config = configure(corpora, sources=sources, tokenizer="chars")
    assert find_built(config) is None and not (corpora / "cache").exists()
    built = ensure_built(config, use_ray=False)
    found = find_built(config)
    assert found is not None
    assert [(one.fingerprint, weight) for one, weight in found] == [(one.fingerprint, weight) for one, weight in built]
    assert find_built(DataConfig(dataset="wikitext-103", cache_dir=str(corpora / "cache"))) is None
    with pytest.raises(DataError, match="neither in the catalogue nor a path"):
        find_built(configure(corpora, "nowhere"))


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "size"),
    [
        ("python-stdlib", "auto", 4096),
        ("python-stdlib", "bpe:512", 512),
        ("python-stdlib", "bytes", 257),
        ("python-stdlib", "chars", None),
        ("tinyshakespeare", "auto", 67),
        ("tinyshakespeare-tune", "auto", 67),
        ("wikitext-2", "auto", 33_278),
        ("anything", "auto", 257),
    ],
)
def test_expected_vocabulary(dataset: str, tokenizer: str, size: int | None) -> None:
    assert expected_vocabulary(DataConfig(dataset=dataset, tokenizer=tokenizer)) == size


def test_expected_vocabulary_is_that_of_the_build(corpora: Path) -> None:
    manifest = build(str(corpora / "first"), corpora / "built", "chars", use_ray=False)
    assert expected_vocabulary(configure(corpora, "built")) == manifest.tokenizer().vocab_size
