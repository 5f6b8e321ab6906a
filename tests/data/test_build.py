"""Builds: the contract of the rows, the same bytes however they are made, kills, and directories that are not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig
from glowflow.data.build import BuildOptions, build
from glowflow.data.datasets.catalogue import resolve
from glowflow.data.manifest import Manifest
from glowflow.data.processors.text import Tokenizer, train_tokenizer
from glowflow.data.shards import MAX_ROW_TOKENS, read_rows, read_tokens

REAL_DATA = os.environ.get("GLOWFLOW_DATA")
needs_real_data = pytest.mark.skipif(
    not REAL_DATA, reason="needs the data sets that GLOWFLOW_DATA points to; it is not set"
)
LINE = "def area(width, height): return width * height  # naïve – 戦場 🙂\n"
LONG = "".join(f"{n} {LINE}" for n in range(2500))  # about 180 kB: several pieces

Rows = list[tuple[int, int, str, list[int]]]  # document id, part, text, tokens


def small_build(source: Path, out: Path, tokenizer: str | Tokenizer = "bytes", **options: Any) -> Manifest:
    return build(str(source), out, tokenizer, options=BuildOptions(**options), use_ray=False)


def stored_rows(manifest: Manifest, split: str) -> Rows:
    rows: Rows = []
    for index, shard in enumerate(manifest.splits[split].shards):
        for group in range(len(shard.row_groups)):
            table = read_rows(manifest, split, index, group, ["document_id", "part", "text", "tokens", "num_tokens"])
            for row in table.to_pylist():
                assert row["num_tokens"] == len(row["tokens"]) <= MAX_ROW_TOKENS
                rows.append((row["document_id"], row["part"], row["text"], row["tokens"]))
    return rows


def stored_documents(manifest: Manifest, split: str) -> dict[int, tuple[str, list[int]]]:
    """document id -> (text, tokens), joined by the contract: each later piece repeats one token."""
    documents: dict[int, tuple[str, list[int]]] = {}
    for document_id, _part, text, tokens in stored_rows(manifest, split):
        if document_id not in documents:
            documents[document_id] = (text, tokens)
            continue
        old_text, old_tokens = documents[document_id]
        assert tokens[0] == old_tokens[-1]
        documents[document_id] = (old_text + text, old_tokens + tokens[1:])
    return documents


def write_corpus(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text(f"file {number}\n" + LINE * (number % 5 + 1), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "bpe:300"])
def test_rows_keep_the_contract(tmp_path: Path, kind: str) -> None:
    folder = write_corpus(tmp_path / "in", 12)
    (folder / "long.txt").write_text(LONG, encoding="utf-8")
    manifest = small_build(folder, tmp_path / "out", kind, unit_bytes=100_000, row_group_tokens=50_000)
    tokenizer = manifest.tokenizer()
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    found = []
    for split, info in manifest.splits.items():
        documents = stored_documents(manifest, split)
        assert info.documents == len(documents)
        assert info.text_bytes == sum(len(text.encode()) for text, _ in documents.values())
        for text, tokens in documents.values():
            found.append(text)
            if kind != "bpe:300" or len(text) < 50_000:  # for BPE a cut is a token boundary
                assert tokens == tokenizer.encode_document(text).tolist()
            else:
                assert tokenizer.decode(tokens) == text
    assert sorted(found) == sorted(texts.values())
    assert any(info.rows > info.documents for info in manifest.splits.values())
    assert manifest.token_dtype == str(tokenizer.dtype)


def test_bpe_of_a_long_document_is_the_same_however_work_is_cut(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(name + LONG, encoding="utf-8")
    tokenizer = train_tokenizer("bpe", [LINE * 20], 300)
    whole, cut = (small_build(tmp_path / "in", tmp_path / f"{n}", tokenizer, unit_bytes=n) for n in (1 << 30, 1))
    for split in whole.splits:
        assert stored_rows(whole, split) == stored_rows(cut, split)
    assert sum(len(s.shards) for s in cut.splits.values()) > sum(len(s.shards) for s in whole.splits.values())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=2, max_size=12),
    unit_bytes=st.integers(1, 200),
    row_group_tokens=st.integers(1, 100),
    kind=st.sampled_from(["bytes", "chars", "words"]),
)
def test_any_grouping_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, row_group_tokens: int, kind: str
) -> None:
    root = tmp_path_factory.mktemp("grouping")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"unit_bytes": unit_bytes, "row_group_tokens": row_group_tokens}
    try:
        manifest = small_build(root / "a.jsonl", root / "out", kind, **options)
    except DataError as error:
        assert kind == "words" and "empty" in str(error)  # nothing but white space in the training split
        return
    tokenizer = manifest.tokenizer()
    rows = [row for split in manifest.splits for row in stored_rows(manifest, split)]
    expected = {n: tokenizer.encode_document(text).tolist() for n, text in enumerate(texts)}
    assert {row[0]: row[3] for row in rows} == {n: tokens for n, tokens in expected.items() if len(tokens) > 1}
    for info in manifest.splits.values():
        for shard in info.shards:
            assert all(group.rows == 1 or group.tokens <= row_group_tokens for group in shard.row_groups)


def test_read_tokens_matches_the_rows(tmp_path: Path) -> None:
    manifest = small_build(write_corpus(tmp_path / "in"), tmp_path / "out", unit_bytes=400, row_group_tokens=500)
    rows = stored_rows(manifest, "train")
    tokens, lengths, documents = [], [], []
    for index, shard in enumerate(manifest.splits["train"].shards):
        for group, counts in enumerate(shard.row_groups):
            flat, row_lengths, ids = read_tokens(manifest, "train", index, group)
            assert flat.dtype == np.uint16 and row_lengths.dtype == ids.dtype == np.int64
            assert (len(row_lengths), len(flat)) == (counts.rows, counts.tokens) and row_lengths.sum() == len(flat)
            tokens += flat.tolist()
            lengths += row_lengths.tolist()
            documents += ids.tolist()
    assert tokens == [token for row in rows for token in row[3]]
    assert lengths == [len(row[3]) for row in rows] and documents == [row[0] for row in rows]


def test_the_same_build_elsewhere_has_the_same_bytes(tmp_path: Path) -> None:
    first = small_build(write_corpus(tmp_path / "x" / "in"), tmp_path / "one", "bpe:300", unit_bytes=500)
    second = small_build(write_corpus(tmp_path / "y" / "in"), tmp_path / "two", "bpe:300", unit_bytes=500)
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()
    assert first.check("hash") == second.check("hash") == []


def test_tokenizers_see_the_training_split_alone(tmp_path: Path) -> None:
    text = "a" * 900 + "b" * 100
    (tmp_path / "a.txt").write_text(text)
    manifest = small_build(tmp_path / "a.txt", tmp_path / "out", "chars")
    assert manifest.tokenizer_spec["chars"] == "a"
    flat, _, _ = read_tokens(manifest, "validation", 0, 0)
    assert flat.tolist() == [1] + [2] * 100  # bos, then <unk>


def test_document_ids_are_unique_over_files(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(5)))
    (tmp_path / "valid.txt").write_text("held out")
    manifest = small_build(tmp_path, tmp_path.parent / "ids-out")
    ids = [row[0] for row in stored_rows(manifest, "train")]
    assert len(set(ids)) == 10


# --- interruptions -------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(units: int) -> Any:
    def progress(done: int, total: int, tokens: int) -> None:
        if done >= units:
            raise Stop

    return progress


def test_interrupted_build_is_no_data_set_and_goes_on(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    options = BuildOptions(unit_bytes=200)
    with pytest.raises(Stop):
        build(str(folder), out, "bpe:300", options=options, use_ray=False, progress=stop_after(3))
    with pytest.raises(DataError, match="does not exist"):
        Manifest.load(out)
    with pytest.raises(DataError, match="has not finished"):
        resolve(str(out), DataConfig())
    shard = out / "train-00001.parquet"
    before = shard.stat().st_mtime_ns
    seen: list[int] = []
    again = build(str(folder), out, "bpe:300", options=options, use_ray=False, progress=lambda d, n, k: seen.append(d))
    assert seen[0] == 3 and shard.stat().st_mtime_ns == before  # the three finished units are not made again
    assert again.fingerprint == small_build(folder, tmp_path / "fresh", "bpe:300", unit_bytes=200).fingerprint
    assert not (out / ".building").exists()


def test_killed_build_goes_on(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from glowflow.data.build import BuildOptions, build\n"
        "def progress(done, total, tokens):\n"
        "    if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = BuildOptions(unit_bytes=200)\n"
        "build(sys.argv[1], sys.argv[2], 'chars', options=options, use_ray=False, progress=progress)\n"
    )
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(out)], env={**os.environ, "PYTHONPATH": path}
    )
    assert process.returncode == -signal.SIGKILL
    assert (out / ".building").is_dir() and not (out / "manifest.json").exists()
    manifest = small_build(folder, out, "chars", unit_bytes=200)
    assert manifest.fingerprint == small_build(folder, tmp_path / "fresh", "chars", unit_bytes=200).fingerprint
    assert manifest.check("hash") == []


def test_another_key_starts_clean(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(Stop):
        options = BuildOptions(unit_bytes=100)
        build(str(folder), out, "bytes", options=options, use_ray=False, progress=stop_after(5))
    manifest = small_build(folder, out, "chars")
    shards = {shard.path for info in manifest.splits.values() for shard in info.shards}
    assert {path.name for path in out.iterdir()} == shards | {"manifest.json"}
    assert manifest.tokenizer_spec["kind"] == "chars"


def test_a_finished_build_is_not_made_again_unless_something_changed(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    first = small_build(folder, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert small_build(folder, out).fingerprint == first.fingerprint
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    (out / "notes.md").write_text("mine")
    (folder / "000.txt").write_text("changed")
    changed = small_build(folder, out)
    assert changed.fingerprint != first.fingerprint
    assert (out / "notes.md").read_text() == "mine"  # a file that no build wrote stays
    (out / changed.splits["train"].shards[0].path).unlink()
    assert small_build(folder, out).check("hash") == []  # a lost shard is made again


# --- what is refused -----------------------------------------------------------------------------------------------


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds files that no build wrote"):
        small_build(folder, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="must be a directory"):
        small_build(folder, out / "thesis.txt")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError):
        small_build(folder, out)
    assert (out / "thesis.txt").exists() and (out / "manifest.json").read_text() == "{}"


def test_foreign_shard_names_are_not_overwritten(tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "in"), tmp_path / "out"
    small_build(folder, out)
    foreign = out / "train-00001.parquet"
    foreign.write_text("not of this build: it had one shard")
    with pytest.raises(DataError, match="names of shards that no build wrote"):
        small_build(folder, out, unit_bytes=200)
    assert foreign.read_text().startswith("not of this")


def test_malformed_rows_are_all_named_and_nothing_is_left(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {n}"}) for n in range(30)]
    lines[3], lines[7], lines[9], lines[11] = (
        "{no json",
        json.dumps({"body": "x"}),
        json.dumps(["x"]),
        '{"text": "\\ud800"}',
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        small_build(tmp_path / "a.jsonl", tmp_path / "out")
    assert len({problem.key for problem in caught.value.problems}) == 4
    assert not (tmp_path / "out").exists()
    manifest = small_build(tmp_path / "a.jsonl", tmp_path / "out", on_bad_file="skip")
    assert sum(info.documents for info in manifest.splits.values()) == 26


def test_a_bad_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        small_build(write_corpus(tmp_path / "in"), tmp_path / "out", "morse")
    assert not (tmp_path / "out").exists()


def test_bad_options() -> None:
    with pytest.raises(DataError) as caught:
        BuildOptions(unit_bytes=0, row_group_tokens=0)
    assert len(caught.value.problems) == 2


# --- index only ----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, texts: list[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=7)
    return path


def all_tokens(manifest: Manifest, split: str) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for index, shard in enumerate(manifest.splits[split].shards):
        for group in range(len(shard.row_groups)):
            flat, lengths, ids = read_tokens(manifest, split, index, group)
            assert (len(lengths), len(flat)) == (shard.row_groups[group].rows, shard.row_groups[group].tokens)
            for number, row in zip(ids.tolist(), np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
                found.setdefault(number, []).append(row.tolist())
    return found


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
@pytest.mark.parametrize("beside", [True, False])
def test_index_gives_the_rows_that_a_build_writes(tmp_path: Path, kind: str, beside: bool) -> None:
    texts: list[str | None] = [f"row {n} {LINE * (n % 4)}" for n in range(40)]
    texts[5], texts[6], texts[20] = None, "", LONG
    path = write_parquet(tmp_path / "in" / "a.parquet", texts)
    before = path.read_bytes()
    out = path.parent if beside else tmp_path / "index"
    built = small_build(path.parent, tmp_path / "out", kind)
    index = small_build(path.parent, out, kind, index_only=True)
    assert path.read_bytes() == before
    loaded = Manifest.load(out)
    assert loaded.index_only and loaded.check("hash") == [] and loaded.fingerprint == index.fingerprint
    assert {split: info.tokens for split, info in loaded.splits.items()} == {
        split: info.tokens for split, info in built.splits.items()
    }
    for split, info in built.splits.items():
        assert all_tokens(loaded, split) == all_tokens(built, split)
        assert (loaded.splits[split].documents, loaded.splits[split].text_bytes) == (info.documents, info.text_bytes)
    again = small_build(path.parent, out, kind, index_only=True)
    assert again.fingerprint == index.fingerprint
    other = small_build(path.parent, out, "bytes", index_only=True, unit_bytes=7)  # starts clean, the data stay
    assert other.check("hash") == [] and path.read_bytes() == before


def test_index_of_token_lists(tmp_path: Path) -> None:
    documents = [list(range(n % 250, n % 250 + 4)) for n in range(20)] + [[7] * 150_000]
    pq.write_table(pa.table({"tokens": pa.array(documents, pa.list_(pa.uint16()))}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"tokens": pa.array([[1, 2, 3]], pa.list_(pa.uint16()))}), tmp_path / "validation.parquet")
    manifest = small_build(tmp_path, tmp_path / "index", "bytes", index_only=True)
    rows = all_tokens(manifest, "train")
    assert [rows[n] for n in range(20)] == [[document] for document in documents[:20]]
    assert [len(row) for row in rows[20]] == [65_536, 65_536, 150_000 - 2 * 65_535]
    with pytest.raises(DataError, match="--index-only"):
        small_build(tmp_path, tmp_path / "out", "bytes")
    pq.write_table(pa.table({"tokens": [[300]]}), tmp_path / "validation.parquet")
    with pytest.raises(DataError, match="outside the vocabulary"):
        small_build(tmp_path, tmp_path / "other", "bytes", index_only=True)


def test_index_notices_changed_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in" / "train.parquet", ["first row", "second row", "third"])
    write_parquet(tmp_path / "in" / "validation.parquet", ["other", "rows"])
    manifest = small_build(path.parent, tmp_path / "index", "bytes", index_only=True)
    write_parquet(path, ["first row", "another row", "third"])
    assert [problem.key for problem in manifest.check("hash")] == [str(manifest.root / "../in/train.parquet")]
    with pytest.raises(DataError, match="does not have the lengths of its index"):
        read_tokens(manifest, "train", 0, 0)


def test_index_needs_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"empty|Parquet"):
        small_build(tmp_path, tmp_path / "out", "bytes", index_only=True)


# --- real data -----------------------------------------------------------------------------------------------------


@needs_real_data
def test_wikitext_2_has_the_published_counts(tmp_path: Path) -> None:
    manifest = build("wikitext-2", tmp_path, config=DataConfig(cache_dir=str(tmp_path / "cache")), use_ray=False)
    assert manifest.tokenizer_spec["kind"] == "words" and manifest.tokenizer().vocab_size == 33_278
    published = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
    for split, count in published.items():
        info = manifest.splits[split]
        # one bos per article, and one repeated token for each cut inside one
        assert info.tokens - info.documents - (info.rows - info.documents) == count
    files = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
    for split, name in files.items():
        assert manifest.splits[split].text_bytes == (Path(str(REAL_DATA)) / "wikitext-2" / name).stat().st_size


@needs_real_data
def test_tinyshakespeare_has_its_65_characters(tmp_path: Path) -> None:
    manifest = build("tinyshakespeare", tmp_path, config=DataConfig(cache_dir=str(tmp_path / "cache")), use_ray=False)
    assert len(manifest.tokenizer_spec["chars"]) == 65 and manifest.token_dtype == "uint8"
    assert sum(info.text_bytes for info in manifest.splits.values()) == 1_115_394
