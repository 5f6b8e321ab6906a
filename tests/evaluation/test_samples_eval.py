"""Perplexity of texts with media and with those of others, equal to slow computations; and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glowflow.cli.main import run
from glowflow.config.errors import ConfigError, DataError
from glowflow.config.loader import apply_overrides
from glowflow.core.model import GlowFlowModel
from glowflow.data.manifest import Manifest
from glowflow.data.samples.collate import collate
from glowflow.evaluation.documents import document_texts
from glowflow.evaluation.load import Target
from glowflow.evaluation.perplexity import sample_losses, summary, with_media_of
from glowflow.evaluation.sample_options import SampleOptions
from glowflow.evaluation.sample_reader import SampleReader
from glowflow.evaluation.samples import evaluate_samples
from tests.data.media_sets import MediaRow, write_media_set

from . import colours
from .colours import config_of, picture, reader_of, rows, target_of

FUSIONS = ["prefix", "cross_attention", "bottleneck", "late", "mixture"]

pytestmark = pytest.mark.usefixtures("one_thread")


def measure_perplexity(reader: SampleReader, permuted: Sequence[str] = ()) -> dict[str, Any]:
    return summary(sample_losses(reader, permuted), permuted)


def slow_losses(target: Target, manifest: Manifest, view: Any) -> dict[int, tuple[float, float]]:
    """Of each sample alone: loss in nats and number of targets, with all scores at once in fp64."""
    found = {}
    for sample in reader_of(target, manifest).usable(view):
        batch = collate([sample], view)
        with torch.no_grad():
            hidden = target.module(batch, compute_loss=False)[0].hidden
            nll = -target.module.logits(hidden).double().log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        found[sample.document_id] = float((nll * batch.loss_weights).sum()), float(batch.loss_weights.sum())
    return found


# -- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_perplexity_equals_the_slow_one_whatever_the_batch(mixed: Manifest, fusion: str) -> None:
    config = config_of(mixed, fusion, data={"image": {"size": None}, "on_bad_sample": "blank"})
    target = target_of(config, mixed)
    slow = slow_losses(target, mixed, reader_of(target, mixed).view())
    nll, tokens = (sum(pair[index] for pair in slow.values()) for index in (0, 1))
    for batch_size in (1, 7, 64) if fusion == "prefix" else (9,):
        result = measure_perplexity(reader_of(target, mixed, batch_size=batch_size))
        assert result["loss"] == pytest.approx(nll / tokens, rel=1e-5) and result["tokens"] == tokens
        assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert result["samples"] == len(slow) == 39
        low, high = result["confidence"]["perplexity"]
        assert low < result["perplexity"] < high
    assert result["groups"] == result["confidence"]["units"] == 14 and result["confidence"]["unit"] == "group"


def test_bad_samples_are_counted_and_left_out(mixed: Manifest) -> None:
    target = target_of(config_of(mixed, data={"on_bad_sample": "blank"}), mixed)
    reader = reader_of(target, mixed)
    measure_perplexity(reader)
    assert dict(reader.about()["bad_samples"]) == {"image_decode": 1}
    strict = target_of(config_of(mixed), mixed)
    with pytest.raises(DataError, match="is cut off"):
        measure_perplexity(reader_of(strict, mixed))


def test_only_text_counts_whatever_the_model_was_trained_on(manifest: Manifest) -> None:
    plain = target_of(config_of(manifest), manifest)
    want = measure_perplexity(reader_of(plain, manifest))
    weights = {"text": 0.5, "image": 2.0, "audio": 1.0}
    other = replace(plain, model=plain.model)
    object.__setattr__(
        other.model, "config", config_of(manifest, data={"loss_weights": weights, "pairing": "shuffled"})
    )
    found = measure_perplexity(reader_of(other, manifest))
    assert (found["loss"], found["tokens"]) == (want["loss"], want["tokens"]) and want["tokens"] == 48 * 4


# -- media of other samples -------------------------------------------------------------------------------------------


def test_media_of_another_are_those_of_the_shuffled_plan(mixed: Manifest) -> None:
    """Exchanging all modalities by hand gives the samples that the plan with ``pairing: shuffled`` gives."""
    config = config_of(mixed, data={"image": {"size": None}, "on_bad_sample": "blank"})
    reader = reader_of(target_of(config, mixed), mixed)
    others = list(reader.samples(reader.view(pairing="shuffled")))
    exchanged = 0
    for own, other in zip(reader.samples(reader.view()), others, strict=True):
        if own.bad or other.bad:
            continue
        found = with_media_of(own, other, ["image", "audio"])
        for name in ("tokens", "targets", "weights"):
            np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
        for mine, wanted in zip(found.items, other.items, strict=True):
            assert (mine.modality, mine.position, mine.slots) == (wanted.modality, wanted.position, wanted.slots)
            np.testing.assert_array_equal(mine.features, wanted.features)
        exchanged += len(own.tokens) != len(found.tokens)
    assert exchanged > 3


@pytest.mark.parametrize("permuted", [["image"], ["image", "audio"]])
def test_a_model_that_looks_and_listens_needs_its_media(
    trained: Target, manifest: Manifest, permuted: list[str]
) -> None:
    found = measure_perplexity(reader_of(trained, manifest), permuted)["permuted"]
    low, high = found["confidence"]["lower_percent"]
    assert 10 < low < found["lower_percent"] < high < 100


def test_the_comparison_is_the_paired_one(trained: Target, manifest: Manifest) -> None:
    permuted, reader = ["audio"], reader_of(trained, manifest, batch_size=5)
    result = measure_perplexity(reader, permuted)
    found = result["permuted"]
    view = reader.view()
    others = {s.document_id: s for s in reader.samples(reader.view(pairing="shuffled"))}
    right, wrong, tokens = 0.0, 0.0, 0
    for own in reader.samples(view):
        pair = [own, with_media_of(own, others[own.document_id], permuted)]
        for total, sample in enumerate(pair):
            batch = collate([sample], view)
            with torch.no_grad():
                scores = trained.module.logits(trained.module(batch, compute_loss=False)[0].hidden).double()
            nll = -scores.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
            loss = float((nll * batch.loss_weights).sum())
            right, wrong = (right + loss, wrong) if total == 0 else (right, wrong + loss)
        tokens += int(batch.loss_weights.sum())
    assert (found["samples"], found["same"], found["modalities"]) == (48, 0, permuted)
    assert found["right"] == pytest.approx(math.exp(right / tokens), rel=1e-5) == pytest.approx(result["perplexity"])
    assert found["permuted"] == pytest.approx(math.exp(wrong / tokens), rel=1e-4)
    assert found["lower_percent"] == pytest.approx(100 * (1 - math.exp((right - wrong) / tokens)), abs=1e-2)
    low, high = found["confidence"]["lower_percent"]
    assert 10 < low < found["lower_percent"] < high < 100


def test_a_blind_model_loses_nothing(manifest: Manifest) -> None:
    """Its text does not depend on the media, so the difference is exactly 0, whatever its perplexity."""
    target = target_of(config_of(manifest, "late"), manifest)
    with torch.no_grad():
        target.model.module.fusion.down.weight.zero_()  # type: ignore[union-attr]
    found = measure_perplexity(reader_of(target, manifest), ["image", "audio"])["permuted"]
    assert found["right"] == found["permuted"] and found["lower_percent"] == 0
    assert found["confidence"]["lower_percent"] == [0, 0]


def test_the_same_picture_is_not_another_one(tmp_path: Path) -> None:
    """Eleven captions of one picture and one of another: most get what they had, which is reported."""
    same, other = picture("red", 0), picture("blue", 1)
    texts = [MediaRow("red", "<image>", [same if number else other]) for number in range(12)]
    manifest = write_media_set(tmp_path / "a", {"train": texts, "validation": texts})
    target = target_of(config_of(manifest, audio=None), manifest)
    found = measure_perplexity(reader_of(target, manifest), ["image"])["permuted"]
    assert (found["samples"], found["same"]) == (2, 10)
    alone = write_media_set(tmp_path / "b", {"train": texts, "validation": texts[1:]})
    nobody = measure_perplexity(reader_of(target, alone), ["image"])["permuted"]
    assert (nobody["samples"], nobody["same"], nobody["lower_percent"]) == (0, 11, None)


def test_a_model_is_compared_on_its_own_media_whatever_it_was_trained_on(trained: Target, manifest: Manifest) -> None:
    want = measure_perplexity(reader_of(trained, manifest), ["image"])["permuted"]
    shuffled = config_of(manifest, data={"pairing": "shuffled"})
    reader = replace(reader_of(trained, manifest), config=shuffled)
    assert measure_perplexity(reader, ["image"])["permuted"] == want


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_same_numbers(
    trained: Target, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "model.pt", tmp_path / "written.jsonl"
    trained.model.save(file, 60)
    asked = ["--permute", "image", "--answers", "--bleu", "--limit", "6"]
    assert run(["eval", str(file), *asked, "--predictions", str(out), "--json"]) == 0, capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out)
    options = SampleOptions(permute="image", answers=True, bleu=True, limit=6)
    want = evaluate_samples(trained, manifest, options=options)
    for name in ("perplexity", "permuted", "answers", "bleu", "confidence", "samples", "groups"):
        assert shown[name] == json.loads(json.dumps(want[name])), name
    assert shown["step"] == 60 and len(out.read_text().splitlines()) == 6 + 6
    assert run(["eval", str(file), *asked]) == 0
    text = capsys.readouterr().out
    assert f"{want['permuted']['lower_percent']:.2f} %" in text and "BLEU-4" in text
    assert len(text.splitlines()) <= 20


def test_the_command_refuses_with_all_reasons(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.pt"
    target_of(config_of(manifest, "late", "classification", audio=None), manifest).model.save(file, 0)
    assert run(["eval", str(file), "--bleu", "--permute", "audio", "--without", "audio", "--beams", "3"]) != 0
    error = capsys.readouterr().err
    for rule in ("--bleu", "needs model.task language_modelling", "the model reads no audio", "--without"):
        assert rule in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("fusion", "task", "name"),
    [
        ("prefix", "language_modelling", "loss"),
        ("late", "classification", "loss"),
        ("late", "contrastive", "text_to_media"),
    ],
)
def test_bf16_is_near(manifest: Manifest, fusion: str, task: str, name: str) -> None:
    target = target_of(config_of(manifest, fusion, task), manifest)
    exact, rough = (evaluate_samples(target, manifest, precision=precision)[name] for precision in ("fp32", "bf16"))
    if task == "contrastive":
        assert rough["R@10"] == pytest.approx(exact["R@10"], abs=10)
    else:
        assert exact != rough and rough == pytest.approx(exact, rel=0.02)


def test_progress_and_conditions_are_told(trained: Target, manifest: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate_samples(
        trained, manifest, "train", SampleOptions(("audio",)), batch_size=16,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(n, 8) for n in range(1, 9)]
    assert (result["split"], result["without"], result["samples"], result["task"]) == (
        "train", ["audio"], 120, "language_modelling",
    )  # fmt: skip
    with pytest.raises(DataError, match="no such split"):
        evaluate_samples(trained, manifest, "tset")
    with pytest.raises(ConfigError, match="--without"):
        evaluate_samples(trained, manifest, options=SampleOptions(("image",), permute="image"))


def test_a_model_of_text_alone_whose_rows_are_samples(model: GlowFlowModel, byte_manifest: Manifest) -> None:
    """Each document from its start to its end, which packed sequences give only with a long context."""
    config = apply_overrides(model.config, {"data.layout": "bucketed", "data.context": 512})
    object.__setattr__(model, "config", config)
    target = Target(model, dict(byte_manifest.tokenizer_spec), 0, Path("model.pt"), None)
    found, total, count = evaluate_samples(target, byte_manifest), 0.0, 0
    for text in document_texts(byte_manifest, "validation"):
        ids = torch.from_numpy(byte_manifest.tokenizer().encode_document(text.decode()).astype(np.int64))[None]
        with torch.no_grad():
            cache = model.module.new_cache(1, ids.shape[1])
            scores = model.module.decode(ids[:, :-1], cache).double().log_softmax(-1)
        total -= scores.gather(-1, ids[:, 1:, None]).sum().item()
        count += 1
    split = byte_manifest.split("validation")
    assert (found["tokens"], found["samples"], found["groups"]) == (split.tokens - split.rows, count, count)
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)
    assert found["confidence"]["unit"] == "sample" and found["without"] == []


def test_the_world_is_what_the_tests_take_it_for() -> None:
    texts = [row.text for row in rows(24, 2)]
    assert set(texts) == {f"{colour} and {pitch}" for colour in colours.COLOURS for pitch in colours.PITCHES}


# -- against another model --------------------------------------------------------------------------------------------


def test_two_models_are_compared_on_the_same_samples(trained: Target, manifest: Manifest) -> None:
    blind = target_of(apply_overrides(trained.config, ["data.without=[image,audio]"]), manifest)
    blind.model.load_state_dict(trained.module.state_dict())
    found = evaluate_samples(trained, manifest, "validation", batch_size=5, against=blind)
    alone = evaluate_samples(blind, manifest, "validation", batch_size=64)
    assert found["against"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    lower = found["against"]["lower_percent"]
    assert lower == pytest.approx(100 * (1 - found["perplexity"] / alone["perplexity"]), rel=1e-5)
    low, high = found["against"]["confidence"]["lower_percent"]
    assert 10 < low < lower < high
    itself = evaluate_samples(trained, manifest, "validation", against=trained)["against"]
    assert itself["lower_percent"] == 0 and itself["confidence"]["lower_percent"] == [0, 0]


def test_models_of_other_texts_are_not_compared(trained: Target, manifest: Manifest) -> None:
    other = target_of(apply_overrides(trained.config, ["data.prompt_loss=true"]), manifest)
    with pytest.raises(DataError, match="measured on other text"):
        evaluate_samples(trained, manifest, "validation", against=other)
    classifier = apply_overrides(trained.config, ["model.task=classification", "model.num_classes=3"])
    with pytest.raises(ConfigError, match="--against"):
        evaluate_samples(trained, manifest, "validation", against=target_of(classifier, manifest))
