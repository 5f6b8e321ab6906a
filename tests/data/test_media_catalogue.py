"""The catalogue's entries with media: what is in them, which split it belongs to, and that nothing leaks."""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from glowflow.config.errors import DataError
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.catalogue import CATALOGUE, resolve
from glowflow.data.datasets.media import av_digits
from glowflow.data.datasets.media.digits import RATE, tone
from glowflow.data.datasets.media.encoding import decode_wav
from glowflow.data.datasets.media.samples import RawSample, read_samples
from tests.data.media_sets import png
from tests.data.media_sources import config_of, local_build, samples_of, stored

needs_real_data = pytest.mark.skipif(
    not os.environ.get("GLOWFLOW_DATA"), reason="needs the data sets that GLOWFLOW_DATA points to; it is not set"
)
ROW_HZ, COLUMN_HZ = (697, 770, 852, 941), (1209, 1336, 1477)


def pixels(sample: RawSample) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(sample.images[0].data)))


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, list[RawSample]]:
    source = resolve("digits", DataConfig())
    return {split: samples_of(source, split, media=split != "train") for split in source.splits}


def test_digits_need_no_download(digits: dict[str, list[RawSample]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert {split: len(samples) for split, samples in digits.items()} == {
        "train": 11_496,
        "validation": 720,
        "test": 720,
    }
    everything = [sample for samples in digits.values() for sample in samples]
    assert [sample.document_id for sample in everything] == list(range(12_936))
    pictures = {split: {sample.group for sample in samples} for split, samples in digits.items()}
    assert sum(map(len, pictures.values())) == len(set().union(*pictures.values())) == 1797
    for samples in digits.values():
        assert {sample.text.split()[1] for sample in samples} == set("0123456789")


def test_digits_say_nothing_before_the_media(digits: dict[str, list[RawSample]]) -> None:
    assert {sample.prompt for samples in digits.values() for sample in samples} == {"<image> <audio> "}
    table = np.zeros((10, 10))
    for sample in digits["train"]:
        words = sample.text.split()
        assert words[::2] == ["picture", "tone", "sum"] and int(words[5]) == int(words[1]) + int(words[3])
        assert sample.label == words[5]
        table[int(words[1]), int(words[3])] += 1
    share = table / table.sum(1, keepdims=True)
    assert np.abs(share - 0.1).max() < 0.03, "a tone is as likely beside any picture"
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 120, "chi-square of 81 degrees of freedom"


def test_tones_are_those_of_a_telephone(digits: dict[str, list[RawSample]]) -> None:
    right = 0
    for sample in digits["test"][:200]:
        samples, rate = decode_wav(sample.audio[0].data)
        time = np.arange(len(samples)) / rate
        power = [[abs(np.exp(-2j * np.pi * f * time) @ samples) for f in tones] for tones in (ROW_HZ, COLUMN_HZ)]
        row, column = (int(np.argmax(one)) for one in power)
        right += sample.text.split()[3] == ("0" if row == 3 else str(3 * row + column + 1))
    assert right == 200 and rate == RATE
    first, second = (tone(5, np.random.default_rng(seed)) for seed in range(2))
    assert first.shape == second.shape and np.abs(first - second).max() > 0.1


def test_pictures_of_digits_look_like_them(digits: dict[str, list[RawSample]]) -> None:
    def matrix(split: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = digits[split][::4]
        return np.stack([pixels(s).ravel() for s in chosen]), np.array([int(s.text.split()[1]) for s in chosen])

    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(3).fit(*matrix("validation"))
    assert classifier.score(*matrix("test")) > 0.85, "180 pictures to learn from"
    assert pixels(digits["test"][0]).shape == (24, 24)


def test_prompts_and_templates_of_entries(tmp_path: Path) -> None:
    keys = {"prompt": "<image><audio>{picture}+{tone}=", "template": "{sum}"}
    source = resolve("digits", config_of(tmp_path, **keys))
    for sample in samples_of(source, "test", media=False):
        numbers = (sample.prompt or "").removeprefix("<image><audio>").removesuffix("=").split("+")
        assert sample.text == str(sum(map(int, numbers)))
    with pytest.raises(DataError, match="columns of digits: label, picture, sum, text, tone"):
        resolve("digits", config_of(tmp_path, template="{colour}"))


def test_readers_without_media_give_the_same_texts(digits: dict[str, list[RawSample]]) -> None:
    plain = samples_of(resolve("digits", DataConfig()), "validation", media=False)
    full = digits["validation"]
    assert [(s.name, s.text, s.key, s.label) for s in plain] == [(s.name, s.text, s.key, s.label) for s in full]
    assert not any(sample.images or sample.audio for sample in plain)


# --- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fsdd", "av-digits", "flickr8k", "multi30k"])
def test_missing_files_say_where_they_belong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    media = CATALOGUE[name].media
    assert media is not None
    with pytest.raises(DataError) as caught:
        resolve(name, config_of(tmp_path))
    assert len(caught.value.problems) == len(media.needs)
    for folder, files in media.needs.items():
        assert str(tmp_path / "data" / folder) in str(caught.value)
        assert str(tmp_path / "cache" / "downloads" / folder) in str(caught.value)
        assert all(names[0] in str(caught.value) for names in files)


# --- real data -----------------------------------------------------------------------------------------------------


@needs_real_data
def test_real_mnist(tmp_path: Path) -> None:
    source = resolve("mnist", config_of(tmp_path))
    sizes = {split: sum(e.end - e.start for e in extents) for split, extents in source.splits.items()}
    assert sizes == {"train": 55_000, "validation": 5_000, "test": 10_000}
    ids = [range(e.document_id, e.document_id + e.end - e.start) for es in source.splits.values() for e in es]
    assert sorted(n for one in ids for n in one) == list(range(70_000))
    labels = Counter(sample.label for sample in samples_of(source, "test", media=False))
    assert labels["0"] == 980 and labels["1"] == 1135
    assert source.samples is not None
    first = next(read_samples(source.splits["test"][0], source.samples))
    assert first.label == "7" and pixels(first).shape == (28, 28) and first.text == ""


@needs_real_data
def test_real_fsdd(tmp_path: Path) -> None:
    source = resolve("fsdd", config_of(tmp_path, template="{word}"))
    parts = {split: samples_of(source, split) for split in source.splits}
    assert {split: len(samples) for split, samples in parts.items()} == {"train": 2400, "validation": 300, "test": 300}
    for split, samples in parts.items():
        indexes = {int(sample.group.rsplit("_", 1)[1].removesuffix(".wav")) for sample in samples if sample.group}
        assert indexes == set({"test": range(5), "validation": range(5, 10), "train": range(10, 50)}[split])
        assert all(sample.label == (sample.group or "")[0] for sample in samples)
    assert parts["test"][0].text == "zero"


@needs_real_data
def test_real_av_digits(tmp_path: Path, glowflow_data: Path) -> None:
    source = resolve("av-digits", config_of(tmp_path))
    parts = {split: samples_of(source, split, media=False) for split in source.splits}
    assert {split: len(samples) for split, samples in parts.items()} == {
        "train": 6000,
        "validation": 1000,
        "test": 2000,
    }
    for samples in parts.values():
        assert set(Counter(sample.label for sample in samples).values()) == {len(samples) // 10}
        assert all((sample.group or " ")[0] == sample.label for sample in samples)
    groups = {split: {sample.group for sample in samples} for split, samples in parts.items()}
    assert {split: len(found) for split, found in groups.items()} == {"train": 2400, "validation": 300, "test": 300}
    assert not groups["train"] & groups["validation"] and not groups["train"] & groups["test"]
    # No picture twice: names hold the part of MNIST and the number in its file.
    numbers = [sample.name.split("/")[1].split("-")[1] for sample in (*parts["train"], *parts["validation"])]
    assert len(numbers) == len(set(numbers))
    assert max(int(n) for n in numbers[:6000]) < 55_000 <= min(int(n) for n in numbers[6000:])


@needs_real_data
def test_real_av_digits_are_degraded_as_the_recipe_says(tmp_path: Path, glowflow_data: Path) -> None:
    mean, components = av_digits.principal_components(str(glowflow_data / "mnist"))
    assert np.allclose(components @ components.T, np.eye(4), atol=1e-6)
    source = resolve("av-digits", config_of(tmp_path))
    assert source.samples is not None
    samples = samples_of(source, "validation")
    picture = np.stack([pixels(sample).ravel() for sample in samples]).astype(float)
    from glowflow.data.datasets.media import idx, mnist

    file = mnist.picture_files(glowflow_data / "mnist")["train"]
    originals = np.stack(list(idx.read_pictures(file, 55_000, 60_000))).reshape(5000, -1).astype(float)
    numbers = [int(sample.name.split("/")[1].split("-")[1]) - 55_000 for sample in samples]
    kept = ((originals[numbers] - mean) @ components.T).var(0).sum() / (originals[numbers] - mean).var(0).sum()
    assert 0.22 < kept < 0.32, "about a quarter of the energy"
    rest = picture - mean - ((picture - mean) @ components.T) @ components
    assert (rest**2).mean() < 0.15 * ((picture - mean) ** 2).mean(), (
        "what is left lies in four components, but for clipping"
    )
    ratios = []
    for sample in samples[:50]:
        clean, _ = decode_wav((glowflow_data / "fsdd" / "recordings" / (sample.group or "")).read_bytes())
        noisy, _ = decode_wav(sample.audio[0].data)
        scale = noisy @ clean / (clean @ clean)
        noise = noisy - scale * clean
        ratios.append(10 * np.log10((scale * clean) @ (scale * clean) / (noise @ noise)))
    assert abs(np.mean(ratios) + 6) < 0.3


@needs_real_data
def test_real_flickr8k(tmp_path: Path) -> None:
    source = resolve("flickr8k", config_of(tmp_path))
    parts = {split: samples_of(source, split, media=split == "test") for split in source.splits}
    sizes = {"train": 30_000, "validation": 5_000, "test": 5_000}
    assert {split: len(samples) for split, samples in parts.items()} == sizes
    assert [(one.name, one.reason) for one in source.skipped] == [
        ("2258277193_586949ec62.jpg.1", "its 5 captions have no picture"),
        ("91 pictures", "are in none of the official splits"),
    ]
    pictures = [{sample.group for sample in samples} for samples in parts.values()]
    assert [len(one) for one in pictures] == [6000, 1000, 1000] and len(set().union(*pictures)) == 8000
    ids = [sample.document_id for samples in parts.values() for sample in samples]
    assert sorted(ids) == list(range(40_000)) and not any(sample.bad for sample in parts["test"])
    first = parts["test"][0]
    assert first.group == "3385593926_d3e9c21170.jpg" and first.text == first.text.lower()
    assert pixels(first).shape == (112, 112, 3) and all(parts["test"][n].images == first.images for n in range(5))


@needs_real_data
def test_real_multi30k(tmp_path: Path) -> None:
    source = resolve("multi30k", config_of(tmp_path))
    parts = {split: samples_of(source, split) for split in source.splits}
    assert {split: len(samples) for split, samples in parts.items()} == {"train": 6993, "validation": 242, "test": 243}
    first = parts["train"][0]
    assert first.prompt == "<image> A little girl climbing into a wooden playhouse.\n"
    assert first.text.startswith("Ein kleines Mädchen") and first.group == "1000268201_693b08cb0e.jpg"


# --- a small copy of flickr8k --------------------------------------------------------------------------------------


def small_flickr8k(folder: Path) -> None:
    """Twelve pictures with five captions each; one caption has no picture, one picture of a split is missing."""
    names = [f"{n}.jpg" for n in range(12)]
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images_112.zip", "w") as archive:
        for number, name in enumerate(names[:-1]):
            archive.writestr(name, png(20, 20, seed=number))
    lines = [f"{name}#{k}\tThe dog {k} of {name} runs ." for name in [*names, "x.jpg.1"] for k in range(5)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    for split, chosen in (("train", names[:8]), ("dev", names[8:10]), ("test", names[10:])):
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(chosen))


def test_a_build_of_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOWFLOW_DATA", str(tmp_path / "data"))
    small_flickr8k(tmp_path / "data" / "flickr8k")
    with pytest.raises(DataError, match=r"11\.jpg#0: missing_file.*has no 11\.jpg"):
        local_build("flickr8k", tmp_path / "out")
    manifest = local_build("flickr8k", tmp_path / "out", "auto", on_bad_sample="skip")
    assert {split: info.rows for split, info in manifest.splits.items()} == {"train": 40, "validation": 10, "test": 5}
    assert manifest.source["skipped"] == [{"name": "x.jpg.1", "reason": "its 5 captions have no picture"}]
    assert manifest.media["bad"]["counts"] == {"missing_file": 5}
    rows, tokenizer = stored(manifest, "validation"), manifest.tokenizer()
    assert rows[0]["text"] == "<image>the dog 0 of 8.jpg runs ." and rows[0]["group"] == "8.jpg"
    assert all(row["num_prompt"] == 2 and row["tokens"][1] == tokenizer.vocab_size - 2 for row in rows)
    train = manifest.splits["train"].shards[0].row_groups[0]
    assert train.media_bytes == 5 * sum(len(png(20, 20, seed=n)) for n in range(8))
    assert manifest.splits["train"].shards[0].bytes < 0.6 * train.media_bytes, "each picture is stored once"
