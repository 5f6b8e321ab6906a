"""What `data inspect` tells of a data set with media, and the contact sheets that it writes."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glowflow.cli.main import run
from glowflow.config.errors import DataError
from glowflow.config.loader import load_config
from glowflow.data.histograms import bars, histogram
from glowflow.data.inspect import inspect_dataset
from glowflow.data.manifest import Manifest
from glowflow.data.processors.image import ImageProcessor
from glowflow.data.processors.text import WordTokenizer
from glowflow.data.sheets import SheetOptions, sheet_of, write_sheet
from glowflow.data.sheets.cards import Card, runs
from glowflow.data.sheets.lines import set_lines
from tests.data.media_sets import MediaRow, mixed_rows, png, tone, write_media_set

SPLITS = {
    "train": [*mixed_rows(12), MediaRow("", bad="image_decode: the file ends too early", label="4")],
    "validation": [MediaRow("<image>a <b>bold</b> & more", images=[png(8, 12)], group="g")],
}
READS = [
    *("model.arch=multimodal", "model.dim=16", "model.heads=2", "model.image={encoder: linear, patch: 4, heads: 2}"),
    *("data.image.size=8", "data.audio.rate=8000"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_media_set(tmp_path_factory.mktemp("set"), SPLITS)


# -- histograms --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50) | st.lists(st.floats(1e-6, 1e9), min_size=1))
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    found = histogram(values)
    assert found is not None
    assert sum(found.counts) == len(values) and len(found.counts) == len(found.edges) - 1 <= 11
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        assert low < high and sum(low <= value < high for value in values) == count
    assert found.least == min(values) and found.largest == max(values)
    assert len(set(found.labels())) == len(found.counts)
    json.dumps(found.to_dict())


def test_borders_are_round_and_long_tails_double() -> None:
    even = histogram([12, 13, 47])
    assert even is not None and even.edges == (10, 15, 20, 25, 30, 35, 40, 45, 50)
    assert even.labels()[0] == "10–14" and even.summary() == "12 to 47, median 13"
    tail = histogram([3, 5, 300])
    assert tail is not None and tail.edges == (2, 4, 8, 16, 32, 64, 128, 256, 512)
    seconds = histogram([0.31, 0.42, 0.55])
    assert seconds is not None and seconds.labels()[0] == "0.3–0.35"
    one = histogram([0.16, 0.16])
    assert one is not None and one.labels() == ["0.16"] and one.summary() == "0.16"
    assert histogram([]) is None


def test_bars_are_as_long_as_the_counts() -> None:
    lines = bars(["a", "bb", "c"], [8, 4, 0], width=8)
    assert lines == [" a  ████████ 8", "bb  ████ 4", " c  0"]
    assert bars(["x", "y"], [10_000, 1], width=8)[1] == "y  ▏ 1"


# -- facts -------------------------------------------------------------------------------------------------------------


def test_counts_lengths_labels_and_bad_samples(built: Manifest) -> None:
    shown = inspect_dataset(built.root, samples=1)
    media = shown["media"]
    assert json.loads(json.dumps(media)) == media
    train = media["splits"]["train"]
    # mixed_rows: text, image, audio, image and audio, two images, in turn.
    assert train["samples"] == {"text": 3, "image": 5, "audio": 2, "image+audio": 2}
    assert (train["images"], train["audio"], train["bad"]) == (9, 4, {"image_decode": 1})
    assert train["labels"] == {"0": 3, "1": 3, "2": 2, "3": 2, "4": 3}
    assert train["image_sizes"] == {"distinct": 1, "most": [[8, 8, 9]]}
    assert train["audio_rates"] == {"8000": 4} and 0.05 <= train["audio_seconds"]["least"] <= 0.12
    lengths = [row["num_tokens"] for row in inspect_dataset(built.root, samples=50)["samples"]["train"]][:12]
    assert train["tokens"]["least"] == min(lengths) and train["tokens"]["largest"] == max(lengths)
    assert media["splits"]["validation"]["image_widths"]["largest"] == 12
    everything = media["all"]
    assert everything["images"] == 10 and sum(everything["samples"].values()) == 13
    assert sum(everything["tokens"]["counts"]) == 13
    assert media["placeholders"] == {"<image>": 257, "<audio>": 258}
    assert media["bad"]["first"] == [["row", "image_decode", "the file ends too early"]]
    assert {"column": "audio_lengths", "type": "list<struct<samples: int64, rate: int32>>"} in media["schema"]


def test_it_prints_for_people(built: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", str(built.root), "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "image_sizes    list<struct<height: int32, width: int32>>",
        "train                  3      5      2                2         9           4       1",
        "<image> is token 257, <audio> is token 258",
        "tokens of a sample",
        "pictures, height × width: 2 sizes",
        "seconds of a recording (8 kHz)",
        "labels: 5",
        "bad samples: 0 left out, 1 kept as blanks; image_decode 1",
        "row: image_decode: the file ends too early",
        "[validation 13, ",
        "<image>a <b>bold</b>",
    ):
        assert text in printed, f"{text!r} is not in:\n{printed}"


def test_many_sizes_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [MediaRow("<image>", images=[png(4, 4 + number)]) for number in range(12)]
    assert write_media_set(tmp_path, {"train": rows}).root == tmp_path
    assert run(["data", "inspect", str(tmp_path), "--samples", "0"]) == 0
    printed = capsys.readouterr().out
    assert "12 sizes, the 8 most frequent" in printed and "widths of pictures: 4 to 15" in printed
    assert (
        "labels" not in printed.split("source")[1] and "recording (" not in printed and "bad samples: none" in printed
    )


def test_a_shard_without_the_columns_is_an_error(built: Manifest, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    manifest = write_media_set(tmp_path, {"train": mixed_rows(3)})
    path = manifest.shard_path(manifest.splits["train"].shards[0])
    pq.write_table(pq.read_table(path).drop_columns(["bad", "label"]), path)
    with pytest.raises(DataError, match="lacks the columns bad, label"):
        inspect_dataset(tmp_path)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read"):
        inspect_dataset(tmp_path)


def test_text_data_sets_are_as_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.txt").write_text("words " * 20)
    assert run(["data", "build", str(tmp_path / "in"), str(tmp_path / "out"), "--local", "--tokenizer", "bytes"]) == 0
    assert "media" not in inspect_dataset(tmp_path / "out")
    with pytest.raises(DataError, match="text alone"):
        sheet_of(Manifest.load(tmp_path / "out"), SheetOptions())


# -- sheets ------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The texts and pictures of a page, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> _Page:
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_a_sheet_shows_what_the_processors_give(built: Manifest) -> None:
    config = load_config(None, READS)
    sheet = sheet_of(built, SheetOptions(samples=99), config)
    assert [card.number for card in sheet.cards] == list(range(13)) and "13 of 13 samples" in sheet.title
    both = sheet.cards[3]
    assert (both.prompt, both.label, both.group) == ("<image><audio> says ", "3", "group 1")
    picture, sound = both.media
    want = ImageProcessor(config.data.image).pixels(SPLITS["train"][3].images[0], None)
    assert picture.array is not None and np.array_equal(picture.array, want)
    assert (picture.raw, picture.prepared, picture.slots) == ("8 × 8", "8 × 8", 4)
    # The recording is shown, and it is said that this model does not read it; the picture takes four places.
    assert sound.array is not None and sound.reason == "not read by the model" and sound.slots == 1
    assert both.length == both.tokens + 3 and f"{both.tokens} tokens, {both.length} with media" in both.facts
    assert sheet.cards[12].bad == "image_decode: the file ends too early" and not sheet.cards[12].media


def test_few_samples_are_drawn_and_stay_the_same(built: Manifest) -> None:
    numbers = [[card.number for card in sheet_of(built, SheetOptions(samples=5)).cards] for _ in range(2)]
    assert numbers[0] == numbers[1] == sorted(set(numbers[0])) and len(numbers[0]) == 5
    assert numbers[0] != list(range(5))
    (card,) = sheet_of(built, SheetOptions(split="validation")).cards
    assert card.text == "<image>a <b>bold</b> & more"
    with pytest.raises(DataError, match="no such split"):
        sheet_of(built, SheetOptions(split="test"))


def test_words_keep_their_spaces_and_nothing_is_shown_of_the_ends(tmp_path: Path) -> None:
    words = WordTokenizer(["<eos>", "<unk>", "see", "a", "cat"])
    rows = [MediaRow("a cat", "<image> see", images=[png()])]
    manifest = write_media_set(tmp_path, {"train": rows}, base=words)
    (card,) = sheet_of(manifest, SheetOptions()).cards
    assert (card.prompt, card.text) == ("<image> see", " a cat")
    (row,) = inspect_dataset(tmp_path)["samples"]["train"]
    assert row["text"] == "<image> see a cat" and row["num_tokens"] == 6


def test_a_file_that_fails_only_now_is_shown_with_its_reason(tmp_path: Path) -> None:
    facts = {"image": [(8, 8)]}
    rows = [MediaRow("<image> cut", images=[png()[:60]], facts=facts), MediaRow("<audio> ok", audio=[tone()])]
    sheet = sheet_of(write_media_set(tmp_path, {"train": rows}), SheetOptions())
    (medium,) = sheet.cards[0].media
    assert medium.array is None and medium.reason.startswith("image_")
    for name in ("sheet.png", "sheet.html"):
        write_sheet(sheet, tmp_path / name)
    assert medium.reason in read(tmp_path / "sheet.html").text


def test_augmentation_is_seeded_and_off_by_default(tmp_path: Path) -> None:
    rows = [MediaRow("<image>", images=[png(8, 8, seed=number)]) for number in range(4)]
    manifest = write_media_set(tmp_path, {"train": rows})
    config = load_config(None, [*READS, "data.image.augment.erase=1"])

    def pictures(augment: bool) -> np.ndarray:
        sheet = sheet_of(manifest, SheetOptions(augment=augment), config)
        return np.stack([card.media[0].array for card in sheet.cards])

    assert np.array_equal(pictures(True), pictures(True))
    assert not np.array_equal(pictures(True), pictures(False))


def test_html_is_one_file_with_escaped_text(built: Manifest, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "sheet.html"
    assert run(["data", "inspect", str(built.root), "--sheet", str(page), "--split", "validation", "--json"]) == 0
    shown = read(page)
    assert "<image>a <b>bold</b> & more" in shown.text and "<b>bold" not in page.read_text()
    (picture,) = shown.pictures
    source = picture["src"] or ""
    assert source.startswith("data:image/png;base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert decoded.size == (12, 8)
    assert not re.search(r'(src|href)="(?!data:)', page.read_text())


def test_png_holds_all_cards_and_is_reproducible(
    built: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sheet.png"
    assert run(["data", "inspect", str(built.root), "--sheet", str(file), "--samples", "99"]) == 0
    assert f"contact sheet: {file}" in capsys.readouterr().err
    with Image.open(file) as picture:
        assert picture.width == 2280 and picture.height > 2000
        edges = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # The frame of the bad sample is red.
    assert (edges == (0xB4, 0x23, 0x18)).all(1).sum() > 500
    before = file.read_bytes()
    assert run(["data", "inspect", str(built.root), "--sheet", str(file), "--samples", "99"]) == 0
    assert file.read_bytes() == before


def test_settings_of_a_config_prepare_the_sheet(
    built: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {image: {size: 16, color: gray}}\n")
    page = tmp_path / "sheet.html"
    args = ["data", "inspect", str(built.root), "data.image.size=6", "--config", str(config), "--sheet", str(page)]
    assert run(args) == 0
    shown = read(page)
    assert "6 × 6, resize, gray" in shown.text and "8 × 8 → 6 × 6" in shown.text


@pytest.mark.parametrize(
    ("args", "mentions"),
    [
        (("--sheet", "sheet.jpg"), "must end in .png or .html"),
        (("--sheet", "sheet.png", "--samples", "1000"), "at most 240"),
        (("--split", "train", "--augment"), "--augment: has no effect without --sheet"),
        (("--sheet", "/proc/none/sheet.html"), "cannot be written"),
        (("--sheet", "sheet.html", "--config", "none.yaml"), "none.yaml"),
    ],
)
def test_what_is_refused(
    built: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path, args: Any, mentions: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["data", "inspect", str(built.root), *args]) == 2
    shown = capsys.readouterr()
    assert mentions in shown.err and "Traceback" not in shown.err and shown.out == ""


# -- text in lines -----------------------------------------------------------------------------------------------------


def card(prompt: str, text: str) -> Card:
    return Card(0, "", prompt, text, None, None, 1, 1, ())


def test_placeholders_and_hidden_characters_are_seen() -> None:
    assert runs(card("<image>see ", "a\tb\x00<audio>")) == [
        ("<image>", "image"),
        ("see ", "prompt"),
        ("a→b\ufffd", "text"),
        ("<audio>", "audio"),
    ]


@given(st.text(alphabet="ab \n<", max_size=80), st.integers(3, 12))
def test_lines_hold_the_whole_text_and_fit(text: str, width: int) -> None:
    lines = set_lines([(text, "text")], width, lambda piece, style: len(piece), most=10**6)
    joined = "".join(piece for line in lines for piece, _ in line)
    assert joined == text.replace("\n", "↵")
    for line in lines:
        assert len("".join(piece for piece, _ in line).replace("↵", "").rstrip()) <= width


def test_long_texts_end_in_dots() -> None:
    lines = set_lines([("word " * 50, "text")], 10, lambda piece, style: len(piece), most=3)
    assert len(lines) == 3 and lines[-1][-1][0].endswith("…")
