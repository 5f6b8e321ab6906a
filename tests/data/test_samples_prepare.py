"""Samples as the model gets them, against written-out references: sequences, targets, media, blanks, dropout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glowflow.config.errors import DataError
from glowflow.config.loader import load_config
from glowflow.core.batch import Batch
from glowflow.data.manifest import Manifest
from glowflow.data.plan import eval_plan, plan
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import ByteTokenizer
from glowflow.data.samples.collate import collate
from glowflow.data.samples.payload import pack_samples, unpack_samples
from glowflow.data.samples.plan import SamplePlan
from glowflow.data.samples.sample import PreparedSample, blank_sample
from glowflow.data.samples.view import MediaView, media_view
from tests.data.media_sets import MIXED, MediaRow, mixed_rows, png, row_tokens, tone, write_media_set
from tests.data.test_samples_plan import equal

TOKENIZER = MediaTokenizer(ByteTokenizer())
IDS = {"image": TOKENIZER.media_ids["<image>"], "audio": TOKENIZER.media_ids["<audio>"]}
ROWS = [
    *mixed_rows(20, seed=5, sizes=(4, 8, 16, 30)),
    MediaRow("then <image> and <audio> and <image> it ends", "", [png(8, 8), png(16, 4)], [tone(0.1)], label="1"),
    MediaRow("<audio>", "<image><image>", [png(20, 20), png(4, 4)], [tone(0.02)]),
    MediaRow("", "only a prompt"),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_media_set(tmp_path_factory.mktemp("prepare"), {"train": ROWS})


def view(training: bool = False, **changes: Any) -> MediaView:
    return replace(media_view(load_config(MIXED), training=training), **changes)


def evaluated(manifest: Manifest, seen: MediaView, context: int = 128) -> list[PreparedSample]:
    """All samples in the order of the rows."""
    size = manifest.split("train").rows
    made = eval_plan(manifest, split="train", context=context, global_batch=size, layout="bucketed", view=seen)
    return next(made.samples(range(1)))


def slots_of(row: MediaRow, seen: MediaView) -> dict[str, list[int]]:
    """Places of each medium by the rule of the encoders: patches of 4 x 4; two convolutions, one of stride 2."""
    images, audio = [], []
    for content in row.images:
        import io

        from PIL import Image

        width, height = Image.open(io.BytesIO(content)).size
        shrink = min(1.0, 16 / max(height, width))
        sides = [min(16, max(1, round(side * shrink / 4)) * 4) for side in (height, width)]
        images.append((sides[0] // 4) * (sides[1] // 4))
    for content in row.audio:
        samples = (len(content) - 44) // 2
        audio.append(-(-max(1, samples // 80) // 2))
    return {"image": images, "audio": audio}


def reference(row: MediaRow, seen: MediaView, context: int) -> tuple[list[int], list[int], list[float], list[tuple]]:
    """Inputs, targets, weights, and (modality, position, places) of each medium, token by token."""
    tokens, prompt = row_tokens(row, TOKENIZER)
    slots = slots_of(row, seen)
    weights_of = {"text": seen.loss_weights.text, "image": seen.loss_weights.image, "audio": seen.loss_weights.audio}
    line: list[tuple[int, float]] = []
    media: list[tuple[str, int, int]] = []
    used = {"image": 0, "audio": 0}
    for index, token in enumerate(tokens.tolist()):
        kind = next((name for name, number in IDS.items() if number == token), "text")
        weight = weights_of[kind] if index >= (1 if seen.prompt_loss else prompt) else 0.0
        count = 1
        if kind in seen.modalities:
            if seen.places:
                count = slots[kind][used[kind]]
            used[kind] += 1
            media.append((kind, len(line), count if seen.places else 0))
        line += [(token, weight)] + [(token, 0.0)] * (count - 1)
    line = line[: context + 1]
    inputs = [token for token, _ in line[:-1]]
    weights = [weight for _, weight in line[1:]]
    targets = [token if weight else 0 for token, weight in line[1:]]
    placed = [(name, at, min(count, len(inputs) - at)) for name, at, count in media if at < len(inputs)]
    return inputs, targets, weights, placed


@settings(max_examples=60)
@given(
    context=st.sampled_from([128, 40, 17, 9, 3, 1]),
    places=st.booleans(),
    modalities=st.sampled_from([("image", "audio"), ("image",), ("audio",), ()]),
    image_weight=st.sampled_from([0.0, 0.5]),
    prompt_loss=st.booleans(),
)
def test_sequences_are_those_of_the_reference(
    manifest: Manifest,
    context: int,
    places: bool,
    modalities: tuple[str, ...],
    image_weight: float,
    prompt_loss: bool,
) -> None:
    seen = view(places=places, modalities=modalities, prompt_loss=prompt_loss, on_long_sample="truncate")
    seen = replace(seen, loss_weights=seen.loss_weights.model_copy(update={"image": image_weight}))
    for row, sample in zip(ROWS, evaluated(manifest, seen, context), strict=True):
        inputs, targets, weights, media = reference(row, seen, context)
        assert sample.tokens.tolist() == inputs
        assert sample.targets.tolist() == targets
        assert sample.weights.tolist() == weights
        assert [(item.modality, item.position, item.slots) for item in sample.items] == media


def test_classification_asks_for_the_label_at_the_last_position(manifest: Manifest) -> None:
    for row, sample in zip(ROWS, evaluated(manifest, view(task="classification")), strict=True):
        inputs, _, _, _ = reference(row, view(), 1000)
        eos = TOKENIZER.eos_id
        assert sample.tokens.tolist() == [*inputs, eos]
        assert sample.label == (-1 if row.label is None else int(row.label))
        assert sample.targets[-1] == max(0, sample.label)
        assert sample.weights.tolist() == [0.0] * len(inputs) + [float(row.label is not None)]


@pytest.mark.parametrize("context", [128, 8])
def test_contrastive_weighs_samples_that_have_the_medium(manifest: Manifest, context: int) -> None:
    seen = view(task="contrastive", modalities=("image",), places=False, on_long_sample="truncate")
    made = eval_plan(manifest, split="train", context=context, global_batch=23, layout="bucketed", view=seen)
    samples = next(made.samples(range(1)))
    for row, sample in zip(ROWS, samples, strict=True):
        first = (row.prompt + row.text).find("<image>")
        has = 0 <= first + 1 < context if row.images else False
        assert sample.weights.tolist() == [0.0] * (len(sample.tokens) - 1) + [float(has)]
    assert made.step_weight(0) == sum(sample.weights.sum() for sample in samples)


def test_classification_needs_labels_and_the_same_ones(manifest: Manifest, tmp_path: Path) -> None:
    seen, arguments = view(task="classification"), {"seed": 0, "context": 99, "global_batch": 2, "layout": "bucketed"}
    none = write_media_set(tmp_path / "none", {"train": [MediaRow("a")]}, name="none")
    with pytest.raises(DataError, match=r"data\.columns\.label"):
        plan([(none, 1.0)], view=seen, **arguments)
    other = write_media_set(tmp_path / "other", {"train": [MediaRow("a", label="cat")]}, name="other")
    with pytest.raises(DataError, match="other: must have the labels of media"):
        plan([(manifest, 1.0), (other, 1.0)], view=seen, **arguments)
    plan([(manifest, 1.0), (none, 1.0)], view=seen, **arguments)


# -- what is random ---------------------------------------------------------------------------------------------------


def trained(manifest: Manifest, epoch: int, **changes: Any) -> dict[int, PreparedSample]:
    seen = view(training=True, **changes)
    size = manifest.split("train").rows
    made = plan([(manifest, 1.0)], seed=1, context=128, global_batch=size, layout="bucketed", view=seen)
    return {sample.document_id: sample for sample in next(made.samples(range(epoch, epoch + 1)))}


def test_augmentation_depends_on_the_epoch_and_not_on_who_prepares(manifest: Manifest) -> None:
    one, again, other = trained(manifest, 0), trained(manifest, 0), trained(manifest, 1)
    assert all(equal(one[number], again[number]) for number in one)
    changed = [
        not np.array_equal(a.features, b.features)
        for number in one
        for a, b in zip(one[number].items, other[number].items, strict=True)
        if a.present and b.present
    ]
    assert np.mean(changed) > 0.8
    plain = evaluated(manifest, view())
    assert all(equal(a, b) for a, b in zip(plain, evaluated(manifest, view()), strict=True))


def test_modality_dropout_leaves_something_of_a_sample_with_several(tmp_path: Path) -> None:
    rows = [MediaRow("<image><audio> x", images=[png()], audio=[tone()]) for _ in range(150)]
    rows += [MediaRow("<image> x", images=[png()]) for _ in range(150)]
    built = write_media_set(tmp_path, {"train": rows}, rows_per_group=300)
    seen = trained(built, 0, modality_dropout=0.5)
    both = Counter(tuple(item.present for item in seen[number].items) for number in range(150))
    alone = Counter(seen[number].items[0].present for number in range(150, 300))
    assert both[(False, False)] == 0
    # Of each modality p - p^2 / 2 of the samples lose it: 37.5 %.
    assert all(0.27 < both[kind] / 150 < 0.48 for kind in ((True, False), (False, True)))
    assert 0.38 < alone[False] / 150 < 0.62
    dropped = [tuple(item.present for item in trained(built, 1, modality_dropout=0.5)[n].items) for n in range(50)]
    assert dropped != [tuple(item.present for item in seen[n].items) for n in range(50)], "each epoch draws anew"


def test_without_keeps_the_places_and_reads_no_file(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    full, less = evaluated(manifest, view()), evaluated(manifest, view(without=("image",)))
    for one, two in zip(full, less, strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.weights.tolist() == two.weights.tolist()
        for a, b in zip(one.items, two.items, strict=True):
            assert (a.modality, a.position, a.slots) == (b.modality, b.position, b.slots)
            assert b.present == (b.modality == "audio")
            if not b.present:
                assert not b.features.any()


# -- bad samples ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rows = mixed_rows(20)
    rows[4].images = [rows[4].images[0], b"no picture"]
    rows[4].facts = {"image": [(8, 8), (8, 8)]}
    rows[9].bad = "missing_file: there is no file b.png"
    rows[11].facts = {"image": [(16, 16)]}  # the file is another one than when the data set was built
    return write_media_set(tmp_path_factory.mktemp("damaged"), {"train": rows})


@pytest.mark.parametrize("policy", ["blank", "skip"])
def test_a_bad_sample_keeps_its_place_and_weighs_nothing(damaged: Manifest, policy: str) -> None:
    samples = evaluated(damaged, view(on_bad_sample=policy))
    kinds = {number: sample.bad.partition(":")[0] for number, sample in enumerate(samples) if sample.bad}
    assert kinds == {4: "image_header", 9: "missing_file", 11: "image_decode"}
    for number in kinds:
        assert not samples[number].weights.any()
        assert not samples[number].targets.any()
    assert [item.present for item in samples[4].items] == [False, False], "the good picture of a bad sample neither"
    assert [item.slots for item in samples[4].items] == [4, 4]
    assert len(samples[4].tokens) == len(reference(mixed_rows(20)[4], view(), 1000)[0])
    batch = collate(samples, view())
    assert float(batch.loss_weights.sum()) == sum(sample.weights.sum() for sample in samples)


def test_a_bad_sample_stops_the_run_by_name(damaged: Manifest) -> None:
    seen = view(on_bad_sample="error")
    made = eval_plan(damaged, split="train", context=128, global_batch=20, layout="bucketed", view=seen)
    next(made.samples(range(1), 0, 4))
    with pytest.raises(DataError, match=r"file-4 \(document 4\).*image_header") as caught:
        next(made.samples(range(1), 0, 5))
    assert "data.on_bad_sample=blank" in str(caught.value)
    with pytest.raises(DataError, match=r"file-9.*there is no file b.png"):
        next(made.samples(range(1), 9, 10))


# -- batches ----------------------------------------------------------------------------------------------------------


def check_places(batch: Batch, samples: list[PreparedSample], seen: MediaView) -> None:
    """slot_index names all positions that hold a placeholder's token of a modality that has places, in order."""
    length = batch.tokens.shape[1]
    flat, free = batch.tokens.flatten(), torch.ones(batch.tokens.numel(), dtype=torch.bool)
    for name, media in batch.modalities.items():
        items = [(row, item) for row, sample in enumerate(samples) for item in sample.items if item.modality == name]
        number = len(items)
        assert media.present.tolist() == ([item.present for _, item in items] or [False])
        assert media.sample_index.tolist() == ([row for row, _ in items] or [0])
        assert media.positions.tolist() == ([item.position for _, item in items] or [0])
        for row in range(len(samples)):
            mine = [index for index in media.row_items[row].tolist() if index < max(1, number)]
            assert mine == [index for index, (owner, _) in enumerate(items) if owner == row]
            assert all(index == max(1, number) for index in media.row_items[row].tolist()[len(mine) :])
        each = seen.num_tokens(name, media.sizes.amax(0).tolist())
        expected = []
        for index, (row, item) in enumerate(items):
            for place in range(item.slots):
                token = index * each + (place if item.present else 0)
                expected.append((row * length + item.position + place, token))
        assert list(zip(media.slot_index.tolist(), media.token_index.tolist(), strict=True)) == expected
        free[media.slot_index] = False
        if seen.places:
            assert (flat[media.slot_index] == IDS[name]).all()
            assert int((flat == IDS[name]).sum()) == len(media.slot_index)
    assert batch.text_index is not None
    assert torch.equal(batch.text_index, free.nonzero().squeeze(1))


@settings(max_examples=40)
@given(
    first=st.integers(0, 22),
    count=st.integers(1, 8),
    places=st.booleans(),
    modalities=st.sampled_from([("image", "audio"), ("image",), ("audio",), ()]),
    without=st.sampled_from([(), ("image",), ("image", "audio")]),
    context=st.sampled_from([128, 12]),
)
def test_batches_have_all_samples_and_media_in_their_places(
    manifest: Manifest,
    first: int,
    count: int,
    places: bool,
    modalities: tuple[str, ...],
    without: tuple[str, ...],
    context: int,
) -> None:
    left_out = tuple(name for name in without if name in modalities)
    seen = view(places=places, modalities=modalities, without=left_out, on_long_sample="truncate")
    samples = evaluated(manifest, seen, context)[first : first + count]
    batch = collate(samples, seen)
    rows, length = batch.tokens.shape
    longest = max(len(sample.tokens) for sample in samples)
    assert (rows, length % 8) == (len(samples), 0)
    assert longest <= length < longest + 8
    assert tuple(batch.modalities) == modalities
    assert batch.single_document
    assert batch.reset.all()
    assert not batch.document_ids.any()
    assert torch.equal(batch.positions, torch.arange(length).expand(rows, length))
    for row, sample in enumerate(samples):
        end = len(sample.tokens)
        assert batch.tokens[row, :end].tolist() == sample.tokens.tolist()
        assert batch.targets[row, :end].tolist() == sample.targets.tolist()
        assert batch.loss_weights[row, :end].tolist() == sample.weights.tolist()
        assert not batch.tokens[row, end:].any()
        assert not batch.loss_weights[row, end:].any()
        assert batch.readout is not None
        assert batch.readout[row] == end - 1
    check_places(batch, samples, seen)


def test_features_are_normalised_and_padded_with_zeros(manifest: Manifest) -> None:
    seen = view()
    samples = evaluated(manifest, seen)
    batch = collate(samples, seen)
    pictures = [item.features for sample in samples for item in sample.items if item.modality == "image"]
    image = batch.modalities["image"]
    assert len({picture.shape for picture in pictures}) > 3
    assert image.features.shape == (len(pictures), 3, 16, 16)
    assert image.features.dtype == torch.float32
    for index, picture in enumerate(pictures):
        height, width, _ = picture.shape
        assert image.sizes[index].tolist() == [height, width]
        expected = (picture.astype(np.float64).transpose(2, 0, 1) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(image.features[index, :, :height, :width].numpy(), expected, atol=1e-6)
        assert not image.features[index, :, height:].any()
        assert not image.features[index, :, :, width:].any()
    sounds = [item.features for sample in samples for item in sample.items if item.modality == "audio"]
    audio = batch.modalities["audio"]
    for index, frames in enumerate(sounds):
        assert audio.sizes[index].tolist() == [len(frames)]
        assert torch.equal(audio.features[index, : len(frames)], torch.from_numpy(np.array(frames)))
        assert not audio.features[index, len(frames) :].any()


def test_a_micro_batch_without_media_has_a_blank_of_each_modality() -> None:
    seen = view()
    batch = collate([blank_sample(), blank_sample()], seen)
    assert batch.tokens.shape == (2, 8)
    assert batch.sample_ids.tolist() == [-1, -1]
    assert not batch.loss_weights.any()
    assert batch.modalities["image"].features.shape == (1, 3, 4, 4)
    assert batch.modalities["audio"].features.shape == (1, 2, 16)
    for media in batch.modalities.values():
        assert media.present.tolist() == [False]
        assert media.row_items.tolist() == [[1], [1]]
        assert not media.features.any()
        assert len(media.slot_index) == len(media.token_index) == 0
    assert collate([blank_sample()], MediaView()).modalities == {}


def test_the_encoder_makes_as_many_tokens_as_the_view_says(manifest: Manifest) -> None:
    """The contract of ``token_index``: token s of an item is its s-th valid one, S that of the padded size."""
    from glowflow.core.encoders.encoder import build_encoder

    config = load_config({**MIXED, "model": {**MIXED["model"], "vocab_size": TOKENIZER.vocab_size}})
    model = config.model.reading(image=3, audio=16)  # type: ignore[attr-defined]
    samples = evaluated(manifest, view())
    batch = collate(samples, view())
    for name, media in batch.modalities.items():
        encoder = build_encoder(name, model)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        tokens, valid = encoder(media.features, media.sizes)
        items = [item for sample in samples for item in sample.items if item.modality == name]
        assert valid.sum(1).tolist() == [item.slots for item in items]
        assert int(media.token_index.max()) < tokens.shape[0] * tokens.shape[1]
        assert valid.flatten()[media.token_index].all()


# -- crossing processes -----------------------------------------------------------------------------------------------


def test_a_payload_gives_back_the_same_samples(manifest: Manifest) -> None:
    seen = view(without=("audio",))
    samples = [*evaluated(manifest, seen), blank_sample()]
    samples[0].name, samples[1].bad = "Grüße 猫", "audio_decode: never mind"
    steps = [samples[:5], samples[5:5], samples[5:]]
    weights = np.array([1.0, 0.1, 1e9 + 0.5])
    given_back = list(unpack_samples(pack_samples(steps, weights)))
    assert [weight for _, weight in given_back] == weights.tolist()
    for one, (two, _) in zip(steps, given_back, strict=True):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert equal(a, b)
            assert [x.features.dtype for x in a.items] == [x.features.dtype for x in b.items]
    empty = list(unpack_samples(pack_samples([[blank_sample()]], np.ones(1))))
    assert equal(empty[0][0][0], blank_sample())


def test_the_view_survives_json_and_leaves_out_no_field() -> None:
    seen = view(training=True, without=("image",), pairing="shuffled", max_bad_fraction=0.3, on_long_sample="truncate")
    plain = json.loads(json.dumps(seen.plain()))
    assert MediaView.from_plain(plain) == seen
    assert set(plain) == set(vars(seen))


def test_the_view_of_a_config() -> None:
    config = load_config({**MIXED, "data": {**MIXED["data"], "without": ["audio"], "pairing": "shuffled"}})
    seen = media_view(config, training=True)
    assert (seen.modalities, seen.places, seen.without, seen.pairing) == (
        ("image", "audio"),
        True,
        ("audio",),
        "shuffled",
    )
    assert seen.image.augment.active
    assert seen.modality_dropout == 0.2
    calm = media_view(config, training=False, without=["image"], pairing="matched")
    assert (calm.without, calm.pairing, calm.modality_dropout) == (("image", "audio"), "matched", 0.0)
    assert not calm.image.augment.active
    assert not calm.audio.augment.active
    text = media_view(load_config({"model": {"arch": "transformer"}}), training=True)
    assert (text.modalities, text.slots("image", (8, 8))) == ((), 1)
    contrastive = {**MIXED["model"], "audio": None, "task": "contrastive", "fusion": "late"}
    config = load_config({"model": contrastive, "data": {**MIXED["data"], "modality_dropout": 0.5}})
    assert media_view(config, training=True).modality_dropout == 0.0, "half a pair teaches nothing"
    with pytest.raises(DataError, match=r"data\.without"):
        media_view(config, training=False, without=["image"])


def test_tasks_that_prepare_samples_load_no_torch() -> None:
    code = "import sys, glowflow.data.items; print({'torch', 'PIL', 'soundfile', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_plan_of_samples_is_what_the_module_says(manifest: Manifest) -> None:
    made = plan([(manifest, 1.0)], seed=0, context=128, global_batch=4, layout="bucketed", view=view())
    assert isinstance(made, SamplePlan)
    for arguments in ((range(-1, 2),), (range(2), 3, 2), (range(2), 0, 5)):
        with pytest.raises(ValueError, match="not in a global batch of 4"):
            next(made.samples(*arguments))


def test_what_is_not_random_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glowflow.data.processors.image import ImageProcessor

    decoded: list[int] = []
    pixels = ImageProcessor.pixels

    def counted(self: ImageProcessor, data: bytes, rng: np.random.Generator | None = None) -> Any:
        decoded.append(len(data))
        return pixels(self, data, rng)

    monkeypatch.setattr(ImageProcessor, "pixels", counted)
    pictures = [png(8, 8, seed=number) for number in range(4)]
    rows = [MediaRow(f"<image> caption {number}", images=[pictures[number // 5]]) for number in range(20)]
    built = write_media_set(tmp_path, {"train": rows}, rows_per_group=20)
    trained_with = {"seed": 1, "context": 128, "global_batch": 20, "layout": "bucketed"}
    calm = plan([(built, 1.0)], view=view(training=False), **trained_with)
    for samples in calm.samples(range(3)):
        for sample in samples:
            (item,) = sample.items
            expected = pixels(ImageProcessor(view().image), pictures[sample.document_id // 5])
            assert np.array_equal(item.features, expected)
    assert len(decoded) == 4
    decoded.clear()
    random = plan([(built, 1.0)], view=view(training=True, modality_dropout=0.0), **trained_with)
    list(random.samples(range(3)))
    assert len(decoded) == 60


def test_the_largest_row_group_is_the_one_that_is_written() -> None:
    from glowflow.data import sample_shards
    from glowflow.data.samples import table

    assert table._GROUP_MEDIA_BYTES == sample_shards.MEDIA_BYTES
