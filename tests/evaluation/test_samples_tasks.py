"""What models of samples write, the classes they tell apart and what they find, right about blind ones too."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glowflow.config.errors import DataError
from glowflow.data.manifest import Manifest
from glowflow.data.samples.collate import collate
from glowflow.evaluation.load import Target
from glowflow.evaluation.sample_options import SampleOptions
from glowflow.evaluation.samples import evaluate_samples
from glowflow.evaluation.writing import measure_answers, prompt_of

from .colours import build, config_of, reader_of, rows, target_of, train

FUSIONS = ["prefix", "cross_attention", "bottleneck", "late", "mixture"]

pytestmark = pytest.mark.usefixtures("one_thread")


# -- answers and BLEU -------------------------------------------------------------------------------------------------


def test_answers_of_a_trained_model(trained: Target, manifest: Manifest) -> None:
    found, texts = measure_answers(reader_of(trained, manifest, batch_size=7))
    assert found["samples"] == 48 and found["groups"] == 24 and found["unfinished"] == 0
    assert found["exact"] == 1 and found["confidence"]["exact"] == [1, 1]
    assert [one["accuracy"] for one in found["positions"]] == [1, 1, 1]
    assert {one.document: one.text for one in texts} == {60 * 2 + n: row.text for n, row in enumerate(rows(24, 2))}
    assert texts[0].prompt.split() == "<image> <audio> is".split()
    blind, _ = measure_answers(reader_of(trained, manifest, without=("image",)))
    assert blind["exact"] < 0.7
    assert [one["accuracy"] for one in blind["positions"][1:]] == [1, 1]  # it still hears
    low, high = blind["confidence"]["exact"]
    assert low < blind["exact"] < high
    few, texts = measure_answers(reader_of(trained, manifest), limit=5)
    assert few["samples"] == len(texts) == 5 and {one.document for one in texts} == set(range(120, 125))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_answers_equal_whole_passes_over_one_sample(mixed: Manifest, fusion: str) -> None:
    """Batched, cached generation with media of all sizes against one pass over everything for every token."""
    config = config_of(mixed, fusion, data={"image": {"size": None}, "on_bad_sample": "blank"}, init_std=0.6)
    target = target_of(config, mixed)
    reader = reader_of(target, mixed, batch_size=6)
    _, texts = measure_answers(reader, limit=8)
    view, tokenizer = reader.view(prompt_loss=False), mixed.tokenizer()
    samples = {sample.document_id: prompt_of(sample) for sample in reader.usable(view)}
    for one in texts:
        prompt, new = samples[one.document], []
        while len(new) < 5:
            ids = np.append(prompt.tokens, np.array(new, np.int32))
            blank = np.zeros(len(ids))
            batch = collate([replace(prompt, tokens=ids, targets=blank, weights=blank)], view)
            with torch.no_grad():
                hidden = target.module(batch, compute_loss=False)[0].hidden[0, len(ids) - 1]
                token = int(target.module.logits(hidden).argmax())
            if token == tokenizer.eos_id:
                break
            new.append(token)
        assert one.text.startswith(tokenizer.decode(new).strip().rstrip("\ufffd")), (one, new)
    assert len({one.text for one in texts}) > 4


def test_bleu_of_texts_about_pictures(trained: Target, manifest: Manifest) -> None:
    options = SampleOptions(bleu=True, answers=True, limit=10)
    greedy = evaluate_samples(trained, manifest, options=options)["bleu"]
    assert (greedy["groups"], greedy["references"], greedy["beams"]) == (10, 2, 1)
    assert greedy["bleu"][:3] == pytest.approx([100, 100, 100]) and greedy["brevity_penalty"] == 1
    assert greedy["bleu"][3] == 0  # no text has four words
    beams = evaluate_samples(trained, manifest, options=replace(options, beams=3))["bleu"]
    assert beams["bleu"] == pytest.approx(greedy["bleu"]) and beams["beams"] == 3
    blind = evaluate_samples(trained, manifest, options=replace(options, without=("image",)))["bleu"]
    assert blind["bleu"][2] < 90


# -- the other tasks --------------------------------------------------------------------------------------------------


def test_a_classifier(tmp_path: Path) -> None:
    manifest = build(tmp_path / "untold", told=False)
    target = train(target_of(config_of(manifest, "late", "classification"), manifest), manifest, 40)
    file = tmp_path / "predicted.jsonl"
    found = evaluate_samples(target, manifest, options=SampleOptions(predictions=file), batch_size=7)
    predicted = [json.loads(line) for line in file.read_text().splitlines()]
    assert found["accuracy"] == 1 and found["macro_f1"] == 1 and found["labels"] == ["blue", "green", "red"]
    assert np.trace(found["confusion"]) == found["samples"] == len(predicted) == 48
    assert found["confidence"]["units"] == found["groups"] == 24
    blind = evaluate_samples(target, manifest, options=SampleOptions(("image",), predictions=file), batch_size=48)
    predicted = [json.loads(line) for line in file.read_text().splitlines()]
    assert blind["accuracy"] < 0.7 and blind["without"] == ["image"]
    right = [one["predicted"] == one["wanted"] for one in predicted]
    assert blind["accuracy"] == pytest.approx(np.mean(right))
    assert blind["loss"] == pytest.approx(np.mean([one["nll"] for one in predicted])) and blind["loss"] > found["loss"]
    low, high = blind["confidence"]["accuracy"]
    assert low < blind["accuracy"] < high
    deaf = evaluate_samples(target, manifest, options=SampleOptions(("audio",)))
    assert deaf["accuracy"] > 0.9


def test_classes_of_another_data_set_are_refused(manifest: Manifest, mixed: Manifest) -> None:
    config = config_of(manifest, "late", "classification", num_classes=7)
    with pytest.raises(DataError, match="has 3 labels, and the model tells 7 classes apart"):
        evaluate_samples(target_of(config, manifest), manifest)
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_samples(target_of(config, manifest), mixed)


def test_retrieval(manifest: Manifest) -> None:
    target = target_of(config_of(manifest, "late", "contrastive"), manifest)
    found = evaluate_samples(target, manifest, batch_size=7)
    reader = reader_of(target, manifest)
    view, texts, media, owners = reader.view(), [], [], []
    for sample in reader.usable(view):
        with torch.no_grad():
            text, medium = target.module(collate([sample], view))[0].pairs
        texts.append(text[0].double().numpy())
        media.append(medium[0].double().numpy())
        owners.append(sample.group)
    first = {owner: index for index, owner in reversed(list(enumerate(owners)))}
    names = list(first)[::-1]
    pictures = np.stack([media[first[name]] for name in names])
    ranks = [
        int((pictures @ text > pictures[names.index(owner)] @ text + 1e-6).sum())
        for text, owner in zip(texts, owners, strict=True)
    ]
    assert found["text_to_media"]["R@5"] == pytest.approx(100 * np.mean([rank < 5 for rank in ranks]), abs=4)
    assert (found["samples"], found["groups"]) == (48, 24)
    assert found["chance"] == pytest.approx({"R@1": 100 / 24, "R@5": 500 / 24, "R@10": 1000 / 24})
    # Two texts of a picture name its colour alone, so a good model finds one of the pictures of that colour.
    good = evaluate_samples(train(target, manifest, 40), manifest)
    sizes: dict[str, int] = defaultdict(int)
    for row in rows(24, 2)[::2]:
        sizes[row.label or ""] += 1
    ideal = 100 * sum(min(5, size) for size in sizes.values()) / 24
    assert good["text_to_media"]["R@5"] == pytest.approx(ideal, abs=25) and ideal > 2 * found["chance"]["R@5"]
    for direction in ("text_to_media", "media_to_text"):
        for name, value in good[direction].items():
            low, high = good["confidence"][direction][name]
            assert low <= value <= high
