"""Builds of samples with media: the columns of the shards, what becomes of bad samples, the same bytes every time."""

from __future__ import annotations

import io
import json
import os
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from glowflow.config.errors import ConfigError, DataError
from glowflow.config.schema import SourceConfig
from glowflow.data import sample_shards
from glowflow.data.build import BuildOptions, build, build_key
from glowflow.data.datasets.catalogue import resolve
from glowflow.data.datasets.media.samples import Medium, RawSample
from glowflow.data.manifest import Manifest
from glowflow.data.prepare import check_tokenizer, ensure_built, expected_vocabulary, find_built
from glowflow.data.processors.bad import BadSample
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import ByteTokenizer
from glowflow.data.sample_build import with_placeholders
from glowflow.data.sample_shards import SampleRow, SampleWriter
from glowflow.data.shards import read_tokens
from tests.data.media_sets import png, tone
from tests.data.media_sources import config_of, local_build, stored, write_files

BOS, IMAGE, AUDIO = 256, 257, 258


def write_documents(folder: Path, documents: list[dict[str, Any]], files: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files or {})
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


def mixed_folder(folder: Path, count: int = 24) -> Path:
    """Every mixture of modalities, and files of several sizes."""
    files = {f"{n}.png": png(4 + n % 3, 5 + n % 4, seed=n) for n in range(count)}
    files |= {f"{n}.wav": tone(0.05 + n / 500) for n in range(count)}
    documents = []
    for n in range(count):
        document: dict[str, Any] = {"text": f"document {n}", "label": n % 3}
        if n % 4 in (1, 3):
            document["images"] = [f"{n}.png"]
        if n % 4 in (2, 3):
            document["audio"] = [f"{n}.wav"]
        documents.append(document)
    return write_documents(folder, documents, files)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_have_the_columns_of_the_contract(tmp_path: Path) -> None:
    documents = [
        {"q": "what", "a": "<image> a cat", "images": ["1.png"]},
        {"q": "sound", "a": "<audio> then <image><image>", "audio": ["1.wav"], "images": ["1.png", "2.png"]},
        {"q": "none", "a": "text"},
        *({"q": "more", "a": f"{n}"} for n in range(3)),
    ]
    files = {"1.png": png(4, 6), "2.png": png(7, 3), "1.wav": tone(0.1)}
    folder = write_documents(tmp_path / "in", documents, files)
    manifest = local_build(folder, tmp_path / "out", prompt="{q}? ", template="{a}", columns={"text": "a"})
    rows = stored(manifest)
    assert [row["text"] for row in rows[:3]] == [
        "what? <image> a cat",
        "sound? <audio> then <image><image>",
        "none? text",
    ]
    assert rows[0]["tokens"] == [BOS, *b"what? ", IMAGE, *b" a cat", BOS]
    assert [row["num_prompt"] for row in rows[:3]] == [7, 8, 7]
    assert rows[1]["images"] == [{"bytes": png(4, 6), "path": "1.png"}, {"bytes": png(7, 3), "path": "2.png"}]
    assert rows[1]["image_sizes"] == [{"height": 4, "width": 6}, {"height": 7, "width": 3}]
    assert rows[1]["audio_lengths"] == [{"samples": 800, "rate": 8000}] and rows[1]["audio"][0]["path"] == "1.wav"
    assert rows[2]["images"] == rows[2]["audio"] == [] and rows[2]["bad"] is None and rows[2]["group"] is None
    assert all(row["num_tokens"] == len(row["tokens"]) and row["part"] == 0 for row in rows)
    assert manifest.media["samples"] == {"text": 4, "image": 1, "audio": 0, "image+audio": 1}
    assert (manifest.media["images"], manifest.media["audio"]) == (3, 1)
    for split, info in manifest.splits.items():
        for index, shard in enumerate(info.shards):
            for group, facts in enumerate(shard.row_groups):
                read_tokens(manifest, split, index, group)  # the reader of text finds its columns
                assert facts.rows == info.documents == info.rows
    sizes = sum(len(m["bytes"]) for row in rows for m in (*row["images"], *row["audio"]))
    assert sum(g.media_bytes for i in manifest.splits.values() for s in i.shards for g in s.row_groups) == sizes
    assert Manifest.load(manifest.root) == manifest


@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans())
def test_placeholders_stand_for_all_media_or_the_sample_is_bad(
    images: int, audio: int, in_prompt: bool, in_text: bool
) -> None:
    def sample(prompt: str | None, text: str) -> RawSample:
        media = Medium(b"x", "")
        return RawSample(0, "a", "a", text=text, prompt=prompt, images=(media,) * images, audio=(media,) * audio)

    assert with_placeholders(sample(None, "t")) == ("<image>" * images + "<audio>" * audio, "t")
    assert with_placeholders(sample("p ", "t")) == ("<image>" * images + "<audio>" * audio + "p ", "t")
    prompt, text = "<image>" * in_prompt, "<audio>" * in_text
    if (images, audio) == (in_prompt, in_text):
        assert with_placeholders(sample(prompt, text)) == (prompt, text)
    elif in_prompt or in_text:
        with pytest.raises(BadSample, match="placeholders"):
            with_placeholders(sample(prompt, text))


def row_of(number: int, *media: bytes, tokens: int = 2) -> SampleRow:
    images = tuple(Medium(data, "") for data in media)
    return SampleRow(
        number, f"{number}", "", np.zeros(tokens, np.uint16), 1, images, image_sizes=((1, 1),) * len(media)
    )


def write_rows(path: Path, rows: list[SampleRow], limit: int = 1000) -> list[tuple[int, int, int]]:
    writer = SampleWriter(path, np.dtype(np.uint16), limit)
    for row in rows:
        writer.add(row)
    writer.close()
    return [(group.rows, group.tokens, group.media_bytes) for group in writer.row_groups]


def test_row_groups_are_limited_by_tokens_rows_and_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_shards, "MEDIA_BYTES", 1 << 16)
    monkeypatch.setattr(sample_shards, "REPEATED_BYTES", 1 << 19)
    monkeypatch.setattr(sample_shards, "MEDIA_ROWS", 50)
    assert write_rows(tmp_path / "a", [row_of(n, tokens=300) for n in range(7)]) == [
        (3, 900, 0),
        (3, 900, 0),
        (1, 300, 0),
    ]
    assert write_rows(tmp_path / "b", [row_of(n) for n in range(51)], 1 << 30)[1] == (1, 2, 0)
    half = 1 << 15
    large = [np.random.default_rng(n).bytes(half) for n in range(4)]
    assert write_rows(tmp_path / "c", [row_of(n, one) for n, one in enumerate(large)]) == [(2, 4, 2 * half)] * 2
    repeated = [row_of(n, large[0]) for n in range(6)]
    assert write_rows(tmp_path / "d", repeated) == [(6, 12, 6 * half)]
    assert (tmp_path / "d").stat().st_size < 1.2 * half, "a repeated picture is stored once"
    assert write_rows(tmp_path / "e", [row_of(n, large[0]) for n in range(40)])[0] == (16, 32, 16 * half)
    assert write_rows(tmp_path / "f", [row_of(0, large[0] * 3), row_of(1, b"x")]) == [(1, 2, 3 * half), (1, 2, 1)]
    table = pq.read_table(tmp_path / "d", columns=["images"])
    assert all(row[0]["bytes"] == large[0] for row in table.column("images").to_pylist())


def test_labels_and_groups(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "in")
    manifest = local_build(folder, tmp_path / "out")
    assert manifest.media["labels"] == ["0", "1", "2"]
    assert all(row["label"] == str(row["document_id"] % 3) for row in stored(manifest))
    grouped = local_build(folder, tmp_path / "grouped", columns={"group": "label"})
    found = {split: {row["group"] for row in stored(grouped, split)} for split in grouped.splits}
    assert sorted(group for groups in found.values() for group in groups) == ["0", "1", "2"]


def test_captions_of_one_picture_check_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glowflow.data.processors import image

    folder = write_files(tmp_path / "in", {f"{n}.png": png(seed=n) for n in range(6)})
    lines = [f"{n}.png,{k}" for n in range(6) for k in range(5)]
    (folder / "captions.csv").write_text("file_name,text\n" + "\n".join(lines))
    calls: list[bytes] = []
    real = image.check_image
    monkeypatch.setattr(image, "check_image", lambda data, config: calls.append(data) or real(data, config))
    manifest = local_build(folder, tmp_path / "out")
    assert len(calls) == len(set(calls)) == 6 and manifest.media["images"] == 30


# --- bad samples ---------------------------------------------------------------------------------------------------


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


def broken_folder(folder: Path, good: int = 60) -> tuple[Path, Counter[str]]:
    """Good samples with one of every kind among them."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    files = {f"{n}.png": png(seed=n) for n in range(good)}
    files |= {
        "cut.jpg": stream.getvalue()[: len(stream.getvalue()) // 2],
        "text.png": b"this is no picture",
        "zero.png": b"",
        "large.png": png(90, 120),
        "text.wav": b"this is no recording",
        "empty.wav": wav(np.zeros(0)),
        "long.wav": wav(np.zeros(8000 * 3)),
    }
    documents: list[dict[str, Any]] = [{"text": f"a {n}", "images": [f"{n}.png"]} for n in range(good)]
    bad = {
        "image_decode": {"images": ["cut.jpg"]},
        "image_header": {"images": ["text.png"]},
        "image_too_large": {"images": ["large.png"]},
        "no_data": {"images": ["zero.png"]},
        "missing_file": {"images": ["gone.png"]},
        "audio_header": {"audio": ["text.wav"]},
        "audio_empty": {"audio": ["empty.wav"]},
        "audio_too_long": {"audio": ["long.wav"]},
        "placeholders": {"text": "<image><image>", "images": ["1.png"]},
        "text": {"text": 1j},
    }
    lines = [json.dumps(document) for document in documents]
    for position, (kind, document) in enumerate(bad.items()):
        line = json.dumps({"text": "b", **document}) if kind != "text" else "{no json"
        lines.insert(position * 5 + 3, line)
    write_files(folder, files)
    (folder / "docs.jsonl").write_text("\n".join(lines))
    return folder, Counter(bad.keys())


LIMITS = {"image": {"max_pixels": 10_000}, "audio": {"max_file_seconds": 2.0}}


def test_error_names_every_bad_sample_and_leaves_nothing(tmp_path: Path) -> None:
    folder, kinds = broken_folder(tmp_path / "in")
    with pytest.raises(DataError) as caught:
        local_build(folder, tmp_path / "out", **LIMITS)
    assert Counter(problem.rule.split(":")[0] for problem in caught.value.problems) == kinds
    assert all(problem.key.startswith("docs.jsonl:") for problem in caught.value.problems)
    assert "data.on_bad_sample=skip" in str(caught.value) and not (tmp_path / "out").exists()


def test_skip_leaves_them_out_and_counts_them(tmp_path: Path) -> None:
    folder, kinds = broken_folder(tmp_path / "in")
    manifest = local_build(folder, tmp_path / "out", on_bad_sample="skip", **LIMITS)
    bad = manifest.media["bad"]
    assert bad["counts"] == dict(sorted(kinds.items())) and (bad["skipped"], bad["blank"]) == (10, 0)
    assert len(bad["first"]) == 10 and {kind for _, kind, _ in bad["first"]} == set(kinds)
    rows = stored(manifest)
    assert len(rows) == 60 and not any(row["bad"] for row in rows)
    assert sum(manifest.media["samples"].values()) == 60


def test_blank_keeps_their_places(tmp_path: Path) -> None:
    folder, kinds = broken_folder(tmp_path / "in")
    manifest = local_build(folder, tmp_path / "out", on_bad_sample="blank", **LIMITS)
    rows = stored(manifest)
    blanks = [row for row in rows if row["bad"]]
    assert [row["document_id"] for row in rows] == list(range(70)) and len(blanks) == 10
    assert Counter(row["bad"].split(":")[0] for row in blanks) == kinds
    for row in blanks:
        assert (row["tokens"], row["num_prompt"], row["images"], row["audio"]) == ([BOS, BOS], 1, [], [])
        assert row["text"] == "" and row["label"] is None and row["image_sizes"] == []
    assert manifest.media["bad"]["blank"] == 10 and sum(manifest.media["samples"].values()) == 60


def test_too_many_bad_samples_stop_the_build_until_that_is_allowed(tmp_path: Path) -> None:
    documents = [{"text": f"{n}", "images": [f"{n}.png"]} for n in range(40)]
    folder = write_documents(tmp_path / "in", documents, {f"{n}.png": png() for n in range(0, 40, 2)})
    for _ in range(2):
        with pytest.raises(DataError, match="20 of 40 samples are bad") as caught:
            local_build(folder, tmp_path / "out", on_bad_sample="skip")
        assert "missing_file 20" in str(caught.value) and "docs.jsonl:1" in str(caught.value)
        assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = local_build(folder, tmp_path / "out", on_bad_sample="skip", max_bad_fraction=0.5)
    assert manifest.media["bad"]["skipped"] == 20 and not (tmp_path / "out" / ".building").exists()
    with pytest.raises(DataError, match="20 of 40"):
        local_build(folder, tmp_path / "out", on_bad_sample="skip", max_bad_fraction=0.4)
    with pytest.raises(DataError, match="no samples that can be used"):
        empty = write_documents(tmp_path / "none", [{"text": f"{n}", "images": [f"{n}.png"]} for n in range(5)])
        local_build(empty, tmp_path / "void", on_bad_sample="skip")


# --- the same bytes ------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_the_same_build_elsewhere_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glowflow.data.datasets.media.files.EXTENT_BYTES", 1000)
    small = {"unit_bytes": 2000}
    first = local_build(mixed_folder(tmp_path / "x" / "in"), tmp_path / "one", "words", **small)
    second = local_build(mixed_folder(tmp_path / "y" / "in"), tmp_path / "two", "words", **small)
    assert contents(first.root) == contents(second.root)
    assert first.check("hash") == [] and len(first.splits["train"].shards) > 1
    assert not any(str(tmp_path).encode() in content for content in contents(first.root).values())


def test_any_cut_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path / "in")
    whole = local_build(folder, tmp_path / "one")
    monkeypatch.setattr("glowflow.data.datasets.media.files.EXTENT_BYTES", 1)
    pieces = local_build(folder, tmp_path / "two", unit_bytes=1, row_group_tokens=3)
    assert stored(whole) == stored(pieces)
    assert {s: i.documents for s, i in whole.splits.items()} == {s: i.documents for s, i in pieces.splits.items()}


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "in")
    options, config = BuildOptions(unit_bytes=1), config_of(tmp_path)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, tokens: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        build(str(folder), tmp_path / "out", "bytes", config=config, options=options, use_ray=False, progress=stop)
    seen: list[int] = []
    manifest = build(
        str(folder), tmp_path / "out", "bytes", config=config, options=options, use_ray=False,
        progress=lambda done, total, tokens: seen.append(done),
    )  # fmt: skip
    assert seen[0] == 2
    fresh = build(str(folder), tmp_path / "fresh", "bytes", config=config, options=options, use_ray=False)
    assert manifest.fingerprint == fresh.fingerprint


@pytest.mark.parametrize(
    "keys",
    [
        {"columns": {"text": "label"}},
        {"prompt": "p"},
        {"template": "{text}!"},
        {"on_bad_sample": "skip"},
        {"image": {"max_pixels": 1000}},
        {"audio": {"max_file_seconds": 1.0}},
    ],
)
def test_what_decides_the_samples_is_in_the_key(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = mixed_folder(tmp_path / "in", 6)
    plain, other = (resolve(str(folder), config_of(tmp_path, **one)) for one in ({}, keys))
    assert build_key(plain, "bytes", BuildOptions()) != build_key(other, "bytes", BuildOptions())
    later = {"image": {"size": 32}, "audio": {"mels": 40}, "max_bad_fraction": 0.5, "modality_dropout": 0.1}
    again = resolve(str(folder), config_of(tmp_path, **later))
    assert build_key(plain, "bytes", BuildOptions()) == build_key(again, "bytes", BuildOptions())


def test_changed_media_are_other_contents(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "in", 6)
    before = resolve(str(folder), config_of(tmp_path)).digest
    os.utime(folder / "1.png")
    assert resolve(str(folder), config_of(tmp_path)).digest == before
    (folder / "1.png").write_bytes(png(seed=99))
    assert resolve(str(folder), config_of(tmp_path)).digest != before


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_tokenizers_are_trained_on_prompt_and_text_without_placeholders(tmp_path: Path) -> None:
    documents = [{"text": "<image>abc", "q": "xyz", "images": [f"{n}.png"]} for n in range(4)]
    folder = write_documents(tmp_path / "in", documents, {f"{n}.png": png() for n in range(4)})
    chars = local_build(folder, tmp_path / "a", "chars", prompt="{q}: ").tokenizer()
    assert isinstance(chars, MediaTokenizer) and chars.base.spec()["chars"] == " :abcxyz"
    words = local_build(folder, tmp_path / "b", "words:3", prompt="{q} ").tokenizer()
    assert words.vocab_size == 5 and words.eos_id == words.bos_id


def test_a_text_source_beside_one_with_media(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "in")
    (tmp_path / "text").mkdir()
    for n in range(6):
        (tmp_path / "text" / f"{n}.txt").write_text(f"a literal <image> {n}\n" * 3)
    names = [str(folder), str(tmp_path / "text")]
    config = config_of(tmp_path, sources=[SourceConfig(dataset=name) for name in names])
    assert find_built(config) is None
    (media, _), (text, _) = ensure_built(config, use_ray=False)
    assert media.tokenizer_fingerprint == text.tokenizer_fingerprint and media.media and not text.media
    flat, _, _ = read_tokens(text, "train", 0, 0)
    assert int(flat.max()) == BOS, "no token of media in plain text"
    found = find_built(config)
    assert found is not None and [one.fingerprint for one, _ in found] == [media.fingerprint, text.fingerprint]
    turned = config_of(tmp_path, sources=[SourceConfig(dataset=name) for name in reversed(names)])
    with pytest.raises(DataError, match="must come before sources of text"):
        ensure_built(turned, use_ray=False)


def test_prepared_once_with_the_vocabulary_that_is_expected(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "in")
    config = config_of(tmp_path, dataset=str(folder))
    assert expected_vocabulary(config) == 259
    (first, _), *_ = ensure_built(config, use_ray=False)
    assert (
        first.tokenizer().vocab_size == 259 and expected_vocabulary(config_of(tmp_path, dataset=str(first.root))) == 259
    )
    bpe = config_of(tmp_path, dataset=str(folder), tokenizer="bpe:300")
    assert expected_vocabulary(bpe) == 302
    (again, _), *_ = ensure_built(config, use_ray=False, tokenizer=MediaTokenizer(ByteTokenizer()))
    assert again.root == first.root
    check_tokenizer(first, "bytes")
    with pytest.raises(DataError, match="which is bytes"):
        check_tokenizer(first, "chars")
    assert (expected_vocabulary(config_of(tmp_path, dataset="digits")), 26) == (26, 26)
    assert expected_vocabulary(config_of(tmp_path, dataset="flickr8k")) == 4002


# --- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    from glowflow.cli.data import data

    return CliRunner().invoke(data, ["build", *arguments])


def test_the_command_takes_overrides_and_tells_what_was_bad(tmp_path: Path) -> None:
    folder, _ = broken_folder(tmp_path / "in")
    overrides = ["data.on_bad_sample=skip", "data.image.max_pixels=10000", "data.audio.max_file_seconds=2"]
    shown = run(str(folder), str(tmp_path / "out"), *overrides, "--local", "--cache-dir", str(tmp_path / "cache"))
    assert shown.exit_code == 0, shown.output
    assert "image_too_large 1" in shown.output and "10 skipped" in shown.output and "docs.jsonl:3" in shown.output
    told = run(str(folder), str(tmp_path / "out"), *overrides, "--local", "--json", "data.tokenizer=chars")
    assert json.loads(told.stdout)["media"]["bad"]["skipped"] == 10
    assert Manifest.load(tmp_path / "out").tokenizer_spec["base"]["kind"] == "chars"


def test_overrides_that_do_nothing_are_refused(tmp_path: Path) -> None:
    shown = run(str(tmp_path), str(tmp_path / "out"), "data.image.size=32", "training.lr=1", "--local")
    assert isinstance(shown.exception, ConfigError)
    assert [problem.key for problem in shown.exception.problems] == ["data.image.size", "training.lr"]
