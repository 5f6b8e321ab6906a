"""Readers of sources with media: what each makes of the layouts that people have, and that text stays text."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.data.datasets.catalogue import resolve
from glowflow.data.datasets.media.columns import as_text, fill
from glowflow.data.datasets.media.encoding import decode_wav, encode_png, encode_wav
from glowflow.data.processors.bad import BadSample
from tests.data.media_sets import png, tone
from tests.data.media_sources import config_of, local_build, read_source, samples_of, write_files, write_idx, write_tar

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- Parquet -------------------------------------------------------------------------------------------------------


def test_parquet_of_the_hugging_face_layout(tmp_path: Path) -> None:
    pictures = [{"bytes": png(seed=n), "path": f"{n}.png"} for n in range(5)]
    sounds = [[{"bytes": tone(0.05), "path": None}], [], None, [{"bytes": b"x", "path": "a"}] * 2, []]
    write_parquet(
        tmp_path / "a.parquet",
        {
            "image": pa.array([*pictures[:4], None], IMAGE),
            "audio": pa.array(sounds, pa.list_(IMAGE)),
            "caption": ["one", "two", None, "four", "five"],
            "label": [3, 1, 4, 1, 5],
        },
        row_group_size=2,
    )
    found = read_source(tmp_path / "a.parquet", tmp_path)
    assert [sample.document_id for sample in found] == list(range(5))
    assert [len(sample.images) for sample in found] == [1, 1, 1, 1, 0]
    assert [len(sample.audio) for sample in found] == [1, 0, 0, 2, 0]
    assert [sample.text for sample in found] == ["one", "two", "", "four", "five"]
    assert [sample.label for sample in found] == ["3", "1", "4", "1", "5"]
    assert found[1].images[0].data == png(seed=1) and found[1].images[0].path == "1.png"
    assert not any(sample.bad for sample in found)


def test_parquet_of_plain_bytes_and_conversations(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a cat"}],
        [{"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "a dog"}],
    ]
    folder = write_parquet(tmp_path / "d" / "a.parquet", {"jpg": [b"1", b"2"], "messages": turns}).parent
    found = read_source(folder, tmp_path)
    assert [sample.text for sample in found] == [
        "user: <image> what?\nassistant: a cat",
        "user: and <image>?\nassistant: a dog",
    ]
    assert [sample.images[0].data for sample in found] == [b"1", b"2"]


def test_parquet_rows_that_name_files(tmp_path: Path) -> None:
    write_files(tmp_path / "d", {"pics/1.png": png()})
    rows = [{"bytes": None, "path": "pics/1.png"}, {"bytes": None, "path": "pics/2.png"}]
    write_parquet(tmp_path / "d" / "a.parquet", {"image": pa.array(rows, IMAGE), "text": ["a", "b"]})
    one, two = read_source(tmp_path / "d", tmp_path)
    assert one.images[0].data == png() and one.images[0].path == "pics/1.png"
    assert two.bad is not None and two.bad.kind == "missing_file" and "pics/2.png" in two.bad.reason


def test_files_of_the_library_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the library datasets, which only this test uses")
    from PIL import Image

    for number in range(6):
        Image.fromarray(np.full((4 + number, 5, 3), number * 40, np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.wav").write_bytes(tone(0.05 + number / 100))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.Sequence(datasets.Image()),
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "image": [str(tmp_path / f"{n}.png") for n in range(6)],
        "images": [[str(tmp_path / f"{n}.png")] * (n % 3) for n in range(6)],
        "audio": [{"bytes": (tmp_path / f"{n}.wav").read_bytes(), "path": f"{n}.wav"} for n in range(6)],
        "text": [f"text {n}" for n in range(6)],
        "label": [n % 2 for n in range(6)],
    }
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    table = table.cast_column("audio", datasets.Audio(decode=False))  # encoding one would need another library
    table.to_parquet(str(tmp_path / "set" / "a.parquet"))
    found = read_source(tmp_path / "set", tmp_path)
    assert [sample.label for sample in found] == ["cat", "dog"] * 3
    assert [sample.text for sample in found] == rows["text"]
    assert [sample.images[0].data for sample in found] == [(tmp_path / f"{n}.png").read_bytes() for n in range(6)]
    assert [sample.audio[0].data for sample in found] == [(tmp_path / f"{n}.wav").read_bytes() for n in range(6)]
    mapped = read_source(tmp_path / "set", tmp_path, columns={"image": "images"})
    assert [len(sample.images) for sample in mapped] == [0, 1, 2, 0, 1, 2]


def test_a_damaged_parquet_file_is_one_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [png(seed=n) for n in range(300)], "text": ["x"] * 300})
    content = bytearray(path.read_bytes())
    content[50:4000] = b"\xff" * 3950
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_source(path, tmp_path)


# --- WebDataset ----------------------------------------------------------------------------------------------------


def members(count: int) -> list[tuple[str, bytes]]:
    found = []
    for n in range(count):
        fields = {"caption": f"of json {n}", "url": f"https://x/{n}"}
        found += [
            (f"part/{n:03d}.jpg", png(seed=n)),
            (f"part/{n:03d}.txt", f"caption {n}\n".encode()),
            (f"part/{n:03d}.json", json.dumps(fields).encode()),
            (f"part/{n:03d}.cls", b"7\n"),
            (f"part/{n:03d}.wav", tone(0.05)),
        ]
    return found


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_tar_groups_members_by_name(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, members(8), "w:gz" if name.endswith("gz") else "w")
    found = read_source(path, tmp_path)
    assert [sample.text for sample in found] == [f"caption {n}" for n in range(8)]
    assert [sample.images[0].data for sample in found] == [png(seed=n) for n in range(8)]
    assert [len(sample.audio) for sample in found] == [1] * 8 and {sample.label for sample in found} == {"7"}
    assert found[0].name == f"{name}:part/000" and found[0].images[0].path == "part/000.jpg"
    mapped = read_source(path, tmp_path, columns={"text": "caption"}, prompt="<image> <audio> {url}: ")
    assert [sample.text for sample in mapped] == [f"of json {n}" for n in range(8)]
    assert mapped[3].prompt == "<image> <audio> https://x/3: "


def test_any_way_into_an_archive_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [*members(20), ("x" * 150 + ".jpg", b"long name"), ("z.txt", b"last")])
    whole = read_source(path, tmp_path)
    monkeypatch.setattr("glowflow.data.datasets.media.files.EXTENT_BYTES", 1)
    source = resolve(str(path), config_of(tmp_path))
    assert len(source.splits["train"]) == 22
    pieces = sorted(samples_of(source), key=lambda sample: sample.document_id)
    assert pieces == whole and len(whole) == 22


def test_real_webdataset(glowflow_data: Path, tmp_path: Path) -> None:
    found = read_source(glowflow_data / "cc12m-sample" / "cc12m-train-0000.tar", tmp_path)
    assert len(found) == 32 and all(len(sample.images) == 1 and sample.text for sample in found)
    assert found[0].text == "Red Square is a city square in Moscow, Russia."


def test_archives_whose_members_are_apart_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.txt", b"z")])
    with pytest.raises(DataError, match="next to each other"):
        resolve(str(path), config_of(tmp_path))
    (tmp_path / "no.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(DataError, match="no readable tar"):
        resolve(str(tmp_path / "no.tar"), config_of(tmp_path))


def test_a_cut_or_garbled_archive_loses_nothing_silently(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "whole.tar", members(6)).read_bytes()
    whole = read_source(tmp_path / "whole.tar", tmp_path)
    starts = [content.index(f"part/{n:03d}.jpg".encode()) for n in range(6)]
    (tmp_path / "cut.tar").write_bytes(content[: starts[3] + 600])
    cut = read_source(tmp_path / "cut.tar", tmp_path)
    assert [bool(sample.bad) for sample in cut] == [False] * 3 + [True]
    assert [s.text for s in cut[:3]] == [s.text for s in whole[:3]]
    assert cut[3].bad is not None and cut[3].bad.kind == "no_data" and "cut off" in str(cut[3].bad)
    garbled = bytearray(content)
    garbled[starts[2] : starts[2] + 512] = b"\xab" * 512
    (tmp_path / "bad.tar").write_bytes(garbled)
    bad = read_source(tmp_path / "bad.tar", tmp_path)
    assert [bool(sample.bad) for sample in bad] == [False, False, True] and "damaged at byte" in str(bad[2].bad)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_an_archive_is_bad_samples_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    whole = write_tar(tmp_path / "whole.tar", members(3)).read_bytes()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "a.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_source(path, tmp_path)
    except DataError:
        return
    assert len(found) == len({sample.document_id for sample in found}) >= 2


# --- captions, folders, idx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_folder_with_a_captions_file(tmp_path: Path, kind: str) -> None:
    rows = [("pics/1.png", 'a "red" cat, or dog'), ("2.wav", "a tone"), ("gone.png", "missing"), ("", "text alone")]
    if kind == "csv":
        cells = [(name, '"' + text.replace('"', '""') + '"') for name, text in rows]
        text = "file_name,caption\n" + "".join(f"{name},{caption}\n" for name, caption in cells)
    elif kind == "tsv":
        text = "file_name\tcaption\n" + "".join(f"{name}\t{caption}\n" for name, caption in rows)
    else:
        text = "\n".join(json.dumps({"file_name": name, "caption": caption}) for name, caption in rows)
    folder = write_files(tmp_path / "d", {"pics/1.png": png(), "2.wav": tone(), "3.png": png()})
    (folder / f"captions.{kind}").write_text(text)
    found = read_source(folder, tmp_path)
    assert [sample.text for sample in found if not sample.bad] == [rows[0][1], rows[1][1], rows[3][1]]
    assert [len(sample.images) for sample in found] == [1, 0, 0, 0] and [len(s.audio) for s in found] == [0, 1, 0, 0]
    assert found[2].bad is not None and found[2].bad.kind == "missing_file" and "gone.png" in found[2].bad.reason
    assert found[0].group == "pics/1.png"
    skipped = resolve(str(folder), config_of(tmp_path)).skipped
    assert [one.name for one in skipped] == ["1 files such as 3.png"]


def test_captions_of_one_picture_are_in_one_split(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", {f"{n}.png": png(seed=n) for n in range(30)})
    lines = [f"{n}.png,caption {k} of {n}" for k in range(5) for n in range(30)]
    (folder / "captions.csv").write_text("file_name,text\n" + "\n".join(lines))
    source = resolve(str(folder), config_of(tmp_path))
    pictures = {split: {sample.group for sample in samples_of(source, split)} for split in source.splits}
    assert sum(map(len, pictures.values())) == 30 == len(set().union(*pictures.values()))
    assert all(pictures[split] for split in ("train", "validation", "test"))
    assert sum(len(samples_of(source, split)) for split in source.splits) == 150


def test_two_columns_of_files_and_a_group(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", {"1.png": png(), "1.wav": tone(), "2.wav": tone(0.2)})
    (folder / "metadata.csv").write_text(
        "image,audio,speaker,text\n1.png,1.wav,ann,one\n,2.wav,ann,two\n1.png,,bob,three\n"
    )
    found = read_source(folder, tmp_path, columns={"group": "speaker"})
    assert [(len(s.images), len(s.audio), s.group) for s in found] == [(1, 1, "ann"), (0, 1, "ann"), (1, 0, "bob")]
    assert found[0].key == found[1].key != found[2].key


def test_captions_with_split_folders(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_files(tmp_path / "d" / split, {"1.png": png(), "metadata.jsonl": '{"file_name": "1.png", "text": "a"}\n'})
    source = resolve(str(tmp_path / "d"), config_of(tmp_path))
    assert {split: len(samples_of(source, split)) for split in source.splits} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", {"1.png": png()})
    (folder / "captions.csv").write_text("file_name,text\n1.png,good\n1.png,too,many\n1.txt,no medium\n\n1.png,good\n")
    assert [s.bad.kind if s.bad else "" for s in read_source(folder, tmp_path)] == ["", "text", "missing_file", ""]
    (folder / "captions.csv").unlink()
    lines = ['{"text": "a", "file_name": "1.png"}', "{no", "[1]", '{"text": ["a", "b"], "file_name": "1.png"}']
    (folder / "captions.jsonl").write_text("\n".join([*lines, '{"text": "\\ud800"}', '{"text": "plain"}']))
    found = read_source(folder, tmp_path)
    assert [s.bad.kind if s.bad else "" for s in found] == ["", "text", "text", "text", "text", ""]


def test_a_folder_per_class(tmp_path: Path) -> None:
    files = {f"{label}/{n}.png": png(seed=n) for label in ("cat", "dog") for n in range(6)}
    folder = write_files(tmp_path / "d", {**files, "bird/song/1.wav": tone(), "README.md": "read me"})
    found = read_source(folder, tmp_path)
    assert [sample.label for sample in found] == ["bird"] + ["cat"] * 6 + ["dog"] * 6
    assert found[0].audio[0].data == tone() and found[1].images[0].data == png(seed=0)
    for split in ("train", "test"):
        write_files(tmp_path / "s" / split, files)
    source = resolve(str(tmp_path / "s"), config_of(tmp_path))
    assert set(source.splits) == {"train", "validation", "test"} and len(samples_of(source, "test")) == 12
    assert {sample.label for sample in samples_of(source)} == {"cat", "dog"}


def test_pictures_without_captions_or_classes(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", {"1.png": png(), "2.png": png()})
    with pytest.raises(DataError, match="neither a file of captions nor a folder for each class"):
        resolve(str(folder), config_of(tmp_path))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 256, (40, 5, 7), dtype=np.uint8)
    write_idx(tmp_path / "d", "train", pictures, [n % 10 for n in range(40)], packed=packed)
    write_idx(tmp_path / "d", "t10k", pictures[:3], [1, 2, 3], packed=packed)
    source = resolve(str(tmp_path / "d"), config_of(tmp_path))
    assert [len(samples_of(source, split)) for split in ("train", "validation", "test")] == [38, 2, 3]
    found = sorted(samples_of(source), key=lambda sample: sample.document_id)[3:]
    assert [sample.label for sample in found] == [str(n % 10) for n in range(40)]
    import io

    decoded = [np.asarray(Image.open(io.BytesIO(sample.images[0].data))) for sample in found]
    assert np.array_equal(np.stack(decoded), pictures)


def test_idx_files_that_lie(tmp_path: Path) -> None:
    pictures = np.zeros((4, 3, 3), np.uint8)
    write_idx(tmp_path / "a", "train", pictures, [1, 2, 3])
    with pytest.raises(DataError, match="must have 4 labels"):
        resolve(str(tmp_path / "a"), config_of(tmp_path))
    write_idx(tmp_path / "b", "train", pictures, [1, 2, 3, 4], packed=False)
    path = tmp_path / "b" / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert [bool(sample.bad) for sample in read_source(tmp_path / "b", tmp_path)] == [False, False, True, True]
    path.write_bytes(content[:4] + b"\x7f\xff\xff\xff" + content[8:])
    with pytest.raises(DataError, match="cannot hold"):
        resolve(str(tmp_path / "b"), config_of(tmp_path))


# --- interleaved documents -----------------------------------------------------------------------------------------


def test_interleaved_documents(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "d", {"a.png": png(seed=1), "b.wav": tone()})
    embedded = {"bytes": base64.b64encode(png(seed=2)).decode(), "path": "in/memory.png"}
    documents = [
        {"text": "x <image> y <audio> z <image>", "images": ["a.png", embedded], "audio": ["b.wav"]},
        {"text": "text alone"},
        {"text": "<image>", "images": [{"bytes": "no base64!"}]},
        {"text": "<audio>", "audio": [None]},
        {"text": "<image>", "image": "https://example.org/a.png"},
    ]
    (folder / "docs.jsonl").write_text("\n\n".join(json.dumps(document) for document in documents))
    found = read_source(folder / "docs.jsonl", tmp_path)
    assert [medium.data for medium in found[0].images] == [png(seed=1), png(seed=2)]
    assert [medium.path for medium in found[0].images] == ["a.png", "in/memory.png"]
    assert found[0].audio[0].data == tone() and found[0].text == documents[0]["text"]
    assert (found[1].images, found[1].audio, found[1].text) == ((), (), "text alone")
    kinds = [sample.bad.kind if sample.bad else "" for sample in found]
    assert kinds == ["", "", "no_data", "no_data", "missing_file"]


def test_conversations_in_the_llava_layout(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    folder = write_files(tmp_path / "d", {"a.png": png()})
    lines = [json.dumps({"image": "a.png", "conversations": turns})] * 3
    (folder / "chat.jsonl").write_text("\n".join([*lines, json.dumps({"text": "b"})]))
    assert read_source(folder, tmp_path)[0].text == "human: <image>\nWhat?\ngpt: A cat."


# --- columns, templates --------------------------------------------------------------------------------------------


def test_templates_interpret_nothing_but_names() -> None:
    record = {"a": "x{b}", "b": 3, "c.d": None, "e-f": "!"}
    assert fill("{a} {b}{c.d}{e-f} {0} {} {{b}} {a.__class__} {a!r}", record) == "x{b} 3! {0} {} {3}  {a!r}"


def test_unknown_columns_are_all_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [png()] * 3, "question": ["q"] * 3})
    keys = {"columns": {"label": "klass"}, "prompt": "<image> {questoin}", "template": "{answer}"}
    with pytest.raises(DataError) as caught:
        resolve(str(tmp_path / "a.parquet"), config_of(tmp_path, **keys))
    assert [problem.key for problem in caught.value.problems] == ["data.columns.label", "data.prompt", "data.template"]
    assert "image, question" in str(caught.value)


def test_values_of_columns() -> None:
    assert [as_text(value) for value in (None, "a", 1, 1.5, True)] == ["", "a", "1", "1.5", "True"]
    parts = [{"type": "image"}, {"type": "text", "text": " what"}, {"type": "audio"}]
    assert as_text([{"role": "user", "content": parts}]) == "user: <image> what<audio>"
    for value in (b"bytes", ["a", "b"], [{"role": "user"}], {"a": 1}, [{"role": "u", "content": [{"type": "video"}]}]):
        with pytest.raises(BadSample):
            as_text(value, "x")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for label in (b"cat", b"d\xffg"):
        for n in range(3):
            path = os.path.join(os.fsencode(folder), label, b"%d\xfe.png" % n)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(png(seed=n))
    manifest = local_build(folder, tmp_path / "out")
    assert manifest.media["labels"] == ["cat", "d?g"] and manifest.media["images"] == 6
    names = ['"\\ud800.png"', '"a\\u0000b.png"', '"' + "x" * 5000 + '.png"', '"1.png"', '"./"']
    write_files(
        tmp_path / "e", {"1.png": png(), "docs.jsonl": "".join(f'{{"text": "", "image": {n}}}\n' for n in names)}
    )
    found = read_source(tmp_path / "e", tmp_path)
    assert [s.bad.kind if s.bad else "" for s in found] == ["missing_file"] * 3 + ["", "missing_file"]
    assert local_build(tmp_path / "e", tmp_path / "f", on_bad_sample="blank").media["bad"]["blank"] == 4


# --- detection -----------------------------------------------------------------------------------------------------


def test_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rows = [{"text": f"row {n}", "image": "https://x/a.png", "file": "x.png", "images": []} for n in range(5)]
    (tmp_path / "a" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "b.parquet", {"text": ["a", "b", "c"], "image": ["x.png"] * 3, "path": ["1.png"] * 3})
    (tmp_path / "captions.csv").write_text("text,number\na,1\n")
    write_tar(tmp_path / "c" / "code.tar.gz", [("main.py", b"print()"), ("read.txt", b"me")], "w:gz")
    write_files(tmp_path / "c", {"1.txt": "one", "2.txt": "two"})
    skipping = config_of(tmp_path, on_bad_file="skip")
    assert resolve(str(tmp_path / "c"), skipping).samples is None
    write_files(tmp_path / "m", {"1.md": "one", "2.md": "two", "3.md": "three", "pics/a.png": png(), "b.png": png()})
    assert resolve(str(tmp_path / "m"), skipping).samples is None
    for name in ("a", "b.parquet", "captions.csv"):
        assert resolve(str(tmp_path / name), config_of(tmp_path)).samples is None


def test_a_mapped_column_makes_samples_of_plain_rows(tmp_path: Path) -> None:
    rows = [{"review": f"row {n}", "stars": n} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {"columns": {"text": "review", "label": "stars"}}
    found = read_source(tmp_path / "a.jsonl", tmp_path, **keys)
    assert [(sample.text, sample.label) for sample in found] == [(f"row {n}", str(n)) for n in range(5)]


def test_a_copy_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "mirror" / "datasets" / "ann" / "cats"
    for split, count in (("train", 4), ("validation", 2)):
        write_parquet(
            hub / "data" / f"{split}-00000-of-00001.parquet", {"image": [png()] * count, "text": ["a"] * count}
        )
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", f"file://{tmp_path / 'mirror'}")
    source = resolve("hf://datasets/ann/cats", config_of(tmp_path))
    assert (source.name, source.origin) == ("cats", "hf://datasets/ann/cats")
    assert {split: len(samples_of(source, split)) for split in source.splits} == {"train": 4, "validation": 2}
    monkeypatch.setenv("GLOWFLOW_HF_MIRROR", "file:///nowhere")
    assert resolve("hf://datasets/ann/cats", config_of(tmp_path)).digest == source.digest, "from the cache"
    with pytest.raises(DataError, match="cannot be fetched"):
        resolve("hf://datasets/ann/dogs", config_of(tmp_path))


# --- files that are written ----------------------------------------------------------------------------------------


def test_written_wav_and_png_are_what_was_given() -> None:
    samples = np.sin(np.arange(800) / 5) * 0.5
    decoded, rate = decode_wav(encode_wav(samples, 8000))
    assert rate == 8000 and np.abs(decoded - samples).max() < 1e-4
    loud, _ = decode_wav(encode_wav(samples * 8, 8000))
    assert np.abs(loud - samples * 2).max() < 1e-4, "scaled, not clipped"
    for content in (b"", b"RIFF", encode_wav(samples, 8000)[:30]):
        with pytest.raises(ValueError):
            decode_wav(content)
    assert encode_png(np.zeros((3, 4), np.uint8)) == encode_png(np.zeros((3, 4), np.uint8))
