"""Where data sets are found, how they are split, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.catalogue import CATALOGUE, availability, resolve
from glowflow.data.datasets.documents import MAX_PIECE_BYTES, cut_text, read_pieces
from glowflow.data.datasets.hub import location
from glowflow.data.datasets.layout import named_split
from glowflow.data.datasets.source import Extent, Source
from glowflow.data.datasets.wikitext import article_starts

REAL_DATA = os.environ.get("GLOWFLOW_DATA")
needs_real_data = pytest.mark.skipif(
    not REAL_DATA, reason="needs the data sets that GLOWFLOW_DATA points to; it is not set"
)
ARTICLES = [
    f" \n = Title {n} = \n \n The <unk> text {n} . \n \n = = Section = = \n \n More . \n = <unk> ; <unk> = \n"
    for n in range(3)
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A machine without data and without network."""
    for name in ("GLOWFLOW_DATA", "GLOWFLOW_HF_MIRROR", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def texts(source: Source, split: str) -> list[str]:
    """The documents of a split."""
    documents: list[str] = []
    for extent in source.splits.get(split, []):
        for piece in read_pieces(extent):
            if piece.first:
                documents.append("")
            documents[-1] += piece.text
    return documents


def everything(source: Source) -> list[str]:
    return [text for split in source.splits for text in texts(source, split)]


def write_wikitext(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("".join(ARTICLES), encoding="utf-8")


def write_hub_rows(folder: Path) -> None:
    """The Parquet copy of the files above, as Hugging Face keeps it: one row per line, blank lines empty."""
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = "".join(ARTICLES).splitlines(keepends=True)
        rows = ["" if not line.strip() else line for line in lines]
        pq.write_table(pa.table({"text": rows}), folder / f"{split}-00000-of-00001.parquet")


# --- catalogue entries ---------------------------------------------------------------------------------------------


def test_python_stdlib_is_on_every_machine(config: DataConfig) -> None:
    source = resolve("python-stdlib", config)
    names = [extent.name for extents in source.splits.values() for extent in extents]
    assert len(names) == len(set(names)) == source.files > 300
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(n.split("/"))]
    assert source.bytes > 8_000_000
    share = {split: len(extents) / len(names) for split, extents in source.splits.items()}
    assert 0.85 < share["train"] < 0.95 and 0.02 < share["validation"] < 0.09 and 0.02 < share["test"] < 0.09
    assert "Python Software Foundation" in source.licence
    assert resolve("python-stdlib", config).digest == source.digest


def test_wikitext_documents_are_articles(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wikitext(tmp_path / "data" / "wikitext-2")
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    source = resolve("wikitext-2", config)
    for split in ("train", "validation", "test"):
        assert texts(source, split) == ARTICLES
    ids = [extent.document_id for extents in source.splits.values() for extent in extents]
    assert ids == list(range(9))


def test_article_starts_at_the_beginning_without_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" = One = \n \n text \n \n = Two = \n \n text \n")
    assert article_starts(path) == [0, len(" = One = \n \n text \n")]
    path.write_text("no heading at all\n")
    assert article_starts(path) == [0]


@needs_real_data
def test_real_wikitext_2(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(REAL_DATA))
    source = resolve("wikitext-2", config)
    assert {split: len(extents) for split, extents in source.splits.items()} == {
        "train": 600,
        "validation": 60,
        "test": 60,
    }
    for split, file in (("train", "train.txt"), ("validation", "valid.txt"), ("test", "test.txt")):
        whole = (Path(str(REAL_DATA)) / "wikitext-2" / file).read_text(encoding="utf-8")
        assert "".join(texts(source, split)) == whole


@needs_real_data
def test_real_tinyshakespeare_is_cut_as_in_nanogpt(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(REAL_DATA))
    source = resolve("tinyshakespeare", config)
    assert [len(texts(source, split)[0]) for split in ("train", "validation")] == [1_003_854, 111_540]


@needs_real_data
def test_tuning_never_sees_the_validation_part(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(REAL_DATA))
    whole, tune = resolve("tinyshakespeare", config), resolve("tinyshakespeare-tune", config)
    parts = [texts(tune, split)[0] for split in ("train", "validation")]
    assert [len(part) for part in parts] == [903_468, 100_386]
    assert "".join(parts) == texts(whole, "train")[0]
    assert set(parts[0]) == set(texts(whole, "train")[0]), "both have one alphabet, so the same tokenizer"
    assert tune.digest != whole.digest and tune.name != whole.name, "each has a place of its own in the cache"


def test_the_tuning_cut_of_a_text_with_wide_characters(config: DataConfig, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "downloads" / "tinyshakespeare"
    place.mkdir(parents=True)
    text = "0123456789äö→𝄞" * 10
    (place / "input.txt").write_text(text, encoding="utf-8")
    assert everything(resolve("tinyshakespeare-tune", config)) == [text[:113], text[113:126]]
    (place / "input.txt").write_text("ab", encoding="utf-8")
    with pytest.raises(DataError, match="too short"):
        resolve("tinyshakespeare-tune", config)


def test_order_of_places(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "mirror"
    write_hub_rows(hub / CATALOGUE["wikitext-2"].folders[0])
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", f"file://{hub}")
    from_hub = resolve("wikitext-2", config)
    assert texts(from_hub, "train") == ARTICLES  # lines regrouped, blank lines as in the original file
    shutil.rmtree(hub)
    again = resolve("wikitext-2", config)  # the hub is gone: now from the cache
    assert again.digest == from_hub.digest
    assert availability(CATALOGUE["wikitext-2"], config)["available"]

    write_wikitext(tmp_path / "data" / "wikitext-2")
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    nearest = resolve("wikitext-2", config)
    assert nearest.splits["train"][0].path.startswith(str(tmp_path / "data"))
    assert nearest.digest == from_hub.digest and nearest.origin == from_hub.origin


def test_a_mirror_on_any_fsspec_file_system(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    folder = "/hub/" + CATALOGUE["tinyshakespeare"].folders[-1]
    for split, text in (("train", "To be, "), ("validation", "or not "), ("test", "to be.")):
        with memory.open(f"{folder}/{split}/0000.parquet", "wb") as stream:
            pq.write_table(pa.table({"text": [text]}), stream)
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", "memory://hub/")
    source = resolve("tinyshakespeare", config)
    assert "".join(everything(source)) == "To be, or not to be."


def test_a_mirror_without_the_data_set(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", f"file://{tmp_path}")
    with pytest.raises(DataError, match="holds no train Parquet files") as caught:
        resolve("tinyshakespeare", config)
    assert all(folder in str(caught.value) for folder in CATALOGUE["tinyshakespeare"].folders)
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", "nosuch://")
    with pytest.raises(DataError, match="nosuch"):
        resolve("tinyshakespeare", config)


def test_parquet_copy_in_glowflow_data(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub_rows(tmp_path / "data" / "wikitext-103" / "wikitext-103-v1")
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    assert texts(resolve("wikitext-103", config), "test") == ARTICLES
    assert (
        sorted(p.name for p in (tmp_path / "data").rglob("*.txt")) == []
    )  # nothing is written beside the user's files


def test_files_put_into_the_cache_by_hand(config: DataConfig, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "downloads" / "tinyshakespeare"
    place.mkdir(parents=True)
    (place / "input.txt").write_text("0123456789" * 3)
    assert [len(text) for text in everything(resolve("tinyshakespeare", config))] == [27, 3]


def test_offline_message_names_every_place(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError) as caught:
        resolve("wikitext-103", config)
    assert len(caught.value.problems) == 1
    message = str(caught.value)
    for part in (
        str(tmp_path / "data" / "wikitext-103"),
        str(tmp_path / "cache" / "downloads" / "wikitext-103"),
        "hf://datasets/Salesforce/wikitext/wikitext-103-v1",
        "HF_HUB_OFFLINE",
        "train.txt, valid.txt, test.txt",
    ):
        assert part in message


def test_an_unreachable_hub_fails_fast(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    started = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9 cannot be reached"):
        resolve("wikitext-2", config)
    assert time.monotonic() - started < 10


def test_location_without_mirror(config: DataConfig) -> None:
    assert location("datasets/a/b") == "hf://datasets/a/b"


def test_unknown_name(config: DataConfig) -> None:
    with pytest.raises(DataError, match="did you mean 'wikitext-2'"):
        resolve("wikitex-2", config)


# --- local paths ---------------------------------------------------------------------------------------------------


def test_one_text_file_is_cut_by_characters(config: DataConfig, tmp_path: Path) -> None:
    text = "äöü🙂 und\n" * 101
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    source = resolve(str(tmp_path / "a.txt"), config)
    cut = int(len(text) * 0.9)
    assert texts(source, "train") == [text[:cut]] and texts(source, "validation") == [text[cut:]]


def test_files_named_after_splits(config: DataConfig, tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "dev.jsonl",
        "test/part.jsonl",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    source = resolve(str(tmp_path), config)
    assert texts(source, "train") == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert texts(source, "validation") == ["dev.jsonl"] and texts(source, "test") == ["test/part.jsonl"]
    assert [skipped.name for skipped in source.skipped] == ["README.md"]


def test_train_without_validation_gives_some_of_it(config: DataConfig, tmp_path: Path) -> None:
    rows = [f"row {n}" for n in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "test.txt").write_text("for the end")
    source = resolve(str(tmp_path), config)
    assert texts(source, "test") == ["for the end"]
    assert sorted(texts(source, "train") + texts(source, "validation")) == sorted(rows)
    assert len(texts(source, "validation")) == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("wiki.valid.tokens", "validation"),
        ("data/train-00000-of-00004-ab12.parquet", "train"),
        ("dev/a.jsonl", "validation"),
        ("val_1.txt", "validation"),
        ("train.py", None),
        ("trains.txt", None),
        ("notes.txt", None),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert named_split(name) == split


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 60), st.integers(0, 10_000))
def test_every_document_is_in_one_split(config: DataConfig, tmp_path: Path, count: int, salt: int) -> None:
    folder = tmp_path / f"{count}-{salt}"
    folder.mkdir(exist_ok=True)
    for number in range(count // 2):
        (folder / f"{salt}-{number}.txt").write_text(f"file {number}")
    rows = [f"row {number}" for number in range(count - count // 2)]
    pq.write_table(pa.table({"text": rows}), folder / f"{salt}.parquet", row_group_size=3)
    source = resolve(str(folder), config)
    assert sorted(everything(source)) == sorted(rows + [f"file {number}" for number in range(count // 2)])
    assert texts(source, "train") and texts(source, "validation")
    shutil.rmtree(folder)


def test_many_rows_are_split_by_hash(config: DataConfig, tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = resolve(str(tmp_path / "a.jsonl"), config)
    parts = {split: texts(source, split) for split in ("train", "validation", "test")}
    assert sorted(row for rows_of_split in parts.values() for row in rows_of_split) == sorted(rows)
    assert 1700 < len(parts["train"]) < 1900 and len(parts["validation"]) > 50 and len(parts["test"]) > 50


def test_a_single_row_is_cut_in_two(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "0123456789" * 10}) + "\n\n\n")
    source = resolve(str(tmp_path / "one.jsonl"), config)
    assert [len(text) for text in everything(source)] == [90, 10]


def test_digest_depends_on_contents_alone(config: DataConfig, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text(f"text {name}")
    one, two = (resolve(str(tmp_path / folder), config) for folder in ("one", "two"))
    assert one.digest == two.digest
    (tmp_path / "two" / "b.txt").write_text("text c.txt")
    assert resolve(str(tmp_path / "two"), config).digest != one.digest


def test_bad_files_are_named_and_refused_or_skipped(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("€".encode()[:2])
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        resolve(str(tmp_path), config)
    named = {Path(problem.key).name for problem in caught.value.problems}
    assert named == {"picture.txt", "latin.txt", "cut.txt", "nul.txt", "broken.parquet"}
    source = resolve(str(tmp_path), config.model_copy(update={"on_bad_file": "skip"}))
    assert {skipped.name for skipped in source.skipped} == named and source.empty_files == 1
    assert "".join(everything(source)) == "good text"


def test_parquet_without_text(config: DataConfig, tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column `text`"):
        resolve(str(tmp_path), config)


@pytest.mark.parametrize("content", [None, "", "a"])
def test_empty_corpus(config: DataConfig, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_text(content)
    with pytest.raises(DataError, match=r"empty|too short"):
        resolve(str(folder), config)


def test_rows_without_text_are_an_empty_corpus(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps({"text": ""}) + "\n")
    with pytest.raises(DataError, match="empty"):
        resolve(str(tmp_path / "a.jsonl"), config)


def test_hidden_files_and_built_folders_are_left_out(config: DataConfig, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", ".git/config", "out/manifest.json", "out/train-00000.parquet", "half/.building/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}")
    assert sorted(everything(resolve(str(tmp_path), config))) == ["a.txt", "b.txt"]


def test_unfinished_build_is_no_source(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / ".building").mkdir()
    with pytest.raises(DataError, match="has not finished"):
        resolve(str(tmp_path), config)


# --- pieces --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["word ", "line of text\n", "x", "🙂", "é\u00a0", "\n"]),
    st.integers(0, 150_000),
    st.text(max_size=20),
)
def test_pieces_join_to_the_text(unit: str, size: int, tail: str) -> None:
    text = unit * (size // len(unit.encode())) + tail.encode("utf-8", "ignore").decode("utf-8")
    pieces = cut_text(text)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= MAX_PIECE_BYTES for piece in pieces)
    assert all(pieces) or text == ""


def test_a_file_is_cut_as_a_text_in_memory_is(tmp_path: Path) -> None:
    text = "".join(f"line {n} naïve 🙂\n" for n in range(20_000))
    path = tmp_path / "a.txt"
    path.write_text("before" + text + "after", encoding="utf-8")
    extent = Extent(str(path), "a.txt", "text", 6, 6 + len(text.encode()), 0, 0)
    pieces = list(read_pieces(extent))
    assert [piece.text for piece in pieces] == cut_text(text)
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert [piece.part for piece in pieces] == list(range(len(pieces)))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
