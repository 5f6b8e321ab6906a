"""The parts of an evaluation of samples that need no model: references, prompts, exchanged media, options, reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glowflow.cli.sample_report import report_lines
from glowflow.config.errors import ConfigError
from glowflow.config.loader import load_config
from glowflow.config.schema import GlowFlowConfig
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import CharTokenizer, WordTokenizer, train_tokenizer
from glowflow.data.samples.sample import PreparedItem, PreparedSample
from glowflow.evaluation.classes import class_report
from glowflow.evaluation.perplexity import with_media_of
from glowflow.evaluation.references import answer_text
from glowflow.evaluation.sample_options import SampleOptions, require_possible
from glowflow.evaluation.sample_reader import in_batches
from glowflow.evaluation.writing import WrittenText, prompt_of, save_lines, word_accuracy

IMAGE, AUDIO = 257, 258


def sample(tokens: list[int], items: list[PreparedItem], num_prompt: int = 1, document: int = 0) -> PreparedSample:
    """As language modelling makes it: [bos] ... [eos] with all places."""
    ids = np.array(tokens, np.int32)
    kinds = np.array([place >= num_prompt and token < IMAGE for place, token in enumerate(tokens)])
    weights = kinds[1:].astype(np.float32)
    targets = np.where(weights > 0, ids[1:], 0)
    return PreparedSample(ids[:-1], targets, weights, 0, document, items=items, num_prompt=num_prompt)


def item(modality: str, position: int, slots: int, value: int, present: bool = True) -> PreparedItem:
    features = np.full((4, 4, 3) if modality == "image" else (5, 8), value)
    return PreparedItem(modality, features, position, slots, present)


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "bpe"])
def test_an_answer_is_what_stands_behind_the_prompt(kind: str) -> None:
    texts = ["what is it ? a dog runs", "a cat sits on the mat"]
    tokenizer = MediaTokenizer(train_tokenizer(kind, texts, 300 if kind == "bpe" else None))
    prompt, text = "<image> what is it ? ", "a cat sits"
    tokens = [tokenizer.bos_id, *tokenizer.encode_sample(prompt), *tokenizer.encode_sample(text), tokenizer.eos_id]
    start = 1 + len(tokenizer.encode_sample(prompt))
    assert answer_text(prompt + text, tokens, start, tokenizer) == "a cat sits"
    whole = answer_text(prompt + text, tokens, 1, tokenizer)  # no prompt: what follows the picture is the answer
    assert whole.split() == "what is it ? a cat sits".split()


@pytest.mark.parametrize("base", [WordTokenizer(["<eos>", "<unk>", "a", "dog"]), CharTokenizer("adgo ")])
def test_words_that_the_tokens_lost_come_from_the_text(base: Any) -> None:
    """Else a model that says <unk> would be right."""
    tokenizer = MediaTokenizer(base)
    for prompt, text in (("<image> a ", "zebra a dog"), ("<image>", "a zebra"), ("dog zebra <audio> ", "zebra")):
        tokens = [tokenizer.bos_id, *tokenizer.encode_sample(prompt), *tokenizer.encode_sample(text), tokenizer.eos_id]
        assert tokenizer.unk_id in tokens
        start = 1 + len(tokenizer.encode_sample(prompt))
        assert answer_text(prompt + text, tokens, start, tokenizer).split() == text.split()


# -- prompts and exchanged media --------------------------------------------------------------------------------------


def test_the_prompt_ends_before_the_first_target_that_counts() -> None:
    # [bos] <image> <image> Q A B [eos]; the answer begins with A
    one = sample([256, IMAGE, IMAGE, 81, 65, 66, 256], [item("image", 1, 2, 7)], num_prompt=4)
    prompt = prompt_of(one)
    assert prompt.tokens.tolist() == [256, IMAGE, IMAGE, 81] and len(prompt.items) == 1
    assert not prompt.weights.any() and len(prompt.targets) == 4
    # Without a prompt the picture at the start is one all the same; a later one belongs to the answer.
    tokens = [256, IMAGE, IMAGE, 65, AUDIO, 66, 256]
    bare = prompt_of(sample(tokens, [item("image", 1, 2, 7), item("audio", 4, 1, 3)]))
    assert bare.tokens.tolist() == [256, IMAGE, IMAGE] and [one.modality for one in bare.items] == ["image"]


def test_exchanged_media_take_the_places_they_need() -> None:
    own = sample([256, IMAGE, IMAGE, 65, AUDIO, 66, 256], [item("image", 1, 2, 1), item("audio", 4, 1, 2)])
    other = sample([256, IMAGE, 70, AUDIO, AUDIO, AUDIO, 256], [item("image", 1, 1, 8), item("audio", 3, 3, 9)])
    both = with_media_of(own, other, ["image", "audio"])
    assert both.tokens.tolist() == [256, IMAGE, 65, AUDIO, AUDIO, AUDIO, 66]
    assert both.targets.tolist() == [0, 65, 0, 0, 0, 66, 256] and both.weights.tolist() == [0, 1, 0, 0, 0, 1, 1]
    assert [(one.position, one.slots, int(one.features.flat[0])) for one in both.items] == [(1, 1, 8), (3, 3, 9)]
    sound = with_media_of(own, other, ["audio"])
    assert sound.tokens.tolist() == [256, IMAGE, IMAGE, 65, AUDIO, AUDIO, AUDIO, 66]
    assert [int(one.features.flat[0]) for one in sound.items] == [1, 9]
    same = with_media_of(own, own, ["image", "audio"])
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(getattr(same, name), getattr(own, name))
    assert own.tokens.tolist() == [256, IMAGE, IMAGE, 65, AUDIO, 66]  # is left as it was


def test_media_without_places_keep_their_placeholder() -> None:
    own = sample([256, IMAGE, 65, AUDIO, 66, 256], [item("image", 1, 0, 1), item("audio", 3, 0, 2)])
    other = sample([256, IMAGE, AUDIO, 256], [item("image", 1, 0, 8), item("audio", 2, 0, 9)])
    found = with_media_of(own, other, ["audio"])
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(own, name))
    assert [(one.position, int(one.features.flat[0])) for one in found.items] == [(1, 1), (3, 9)]


def test_batches_hold_every_sample_once_and_alike_ones_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    batches = list(in_batches(enumerate(lengths), 7, lambda pair: pair[1]))
    assert sorted(number for batch in batches for number, _ in batch) == list(range(500))
    padding = sum(max(length for _, length in batch) * len(batch) for batch in batches)
    in_order = sum(max(lengths[at : at + 7]) * len(lengths[at : at + 7]) for at in range(0, 500, 7))
    assert padding < 1.2 * sum(lengths) < in_order
    assert list(in_batches([], 4, len)) == []


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_words_are_compared_by_position() -> None:
    wanted = ["three plus four", "two", "one plus two is three"]
    written = ["three plus five", "two extra", "one minus two is"]
    found = word_accuracy([text.split() for text in wanted], [text.split() for text in written])
    assert [one["accuracy"] for one in found] == [1, 0.5, 0.5, 1, 0]
    assert [one["samples"] for one in found] == [3, 2, 2, 1, 1]
    assert word_accuracy([], []) == []


def test_the_table_of_classes_by_hand() -> None:
    wanted, predicted = list("aaabbc"), list("aabbba")
    found = class_report(wanted, predicted, ["a", "b", "c", "unused"])
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    a, b, c, unused = found["classes"]
    assert (a["precision"], a["recall"], a["samples"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert (b["precision"], b["recall"], c["f1"], unused["samples"]) == (pytest.approx(2 / 3), 1, 0, 0)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)  # of the classes that occur


# -- options ----------------------------------------------------------------------------------------------------------


def config_of(task: str = "language_modelling", modalities: str = "image audio", **data: Any) -> GlowFlowConfig:
    model: dict[str, Any] = {"arch": "multimodal", "dim": 16, "depth": 1, "heads": 2, "task": task, "fusion": "late"}
    model |= {name: {"heads": 2} for name in modalities.split()}
    return load_config({"model": model, "data": data})


def problems(options: SampleOptions, config: GlowFlowConfig) -> list[str]:
    try:
        require_possible(options, config)
    except ConfigError as error:
        return [f"{problem.key}: {problem.rule}" for problem in error.problems]
    return []


def test_what_the_model_can_do_is_not_refused() -> None:
    for options in (
        SampleOptions(),
        SampleOptions(("image",), "audio", answers=True, bleu=True, beams=3, limit=5, predictions=Path("x")),
        SampleOptions(("image", "audio")),
        SampleOptions(permute="all"),
    ):
        assert problems(options, config_of()) == []
    assert problems(SampleOptions(("audio",), predictions=Path("x")), config_of("classification")) == []
    assert problems(SampleOptions(), config_of("contrastive", "image")) == []
    text = load_config({"model": {"arch": "transformer", "dim": 16, "depth": 1, "heads": 2}})
    assert problems(SampleOptions(), text) == []


def test_everything_that_is_wrong_is_said_at_once() -> None:
    everything = SampleOptions(("audio",), "audio", answers=True, bleu=True, limit=3, predictions=Path("x"))
    found = problems(everything, config_of("classification", "image"))
    assert len(found) == 5
    assert [text for text in found if text.startswith("--without: the model reads no audio (it reads image)")]
    assert [text for text in found if text.startswith("--permute: the model reads no audio")]
    for name in ("--permute", "--answers", "--bleu"):
        wanted = f"{name}: needs model.task language_modelling, and the model was trained for classification"
        assert wanted in found
    text = load_config({"model": {"arch": "transformer", "dim": 16, "depth": 1, "heads": 2}})
    assert len(problems(everything, text)) == 6


@pytest.mark.parametrize(
    ("options", "config", "rule"),
    [
        (SampleOptions(beams=4), config_of(), "--beams: is of the texts of --bleu"),
        (SampleOptions(limit=4), config_of(), "--limit: limits what is written"),
        (SampleOptions(predictions=Path("x")), config_of(), "--predictions: has nothing to write down"),
        (SampleOptions(("image",), "all"), config_of(), "--permute: image is removed by --without"),
        (SampleOptions(permute="image"), config_of(without=["image"]), "--permute: the run leaves image out"),
        (SampleOptions(("image",)), config_of("contrastive", "image"), "--without: leaves nothing to find"),
        (SampleOptions(permute="all"), config_of(modalities=""), "--permute: the model reads text alone"),
        (SampleOptions(bleu=True, beams=0), config_of(), "--beams: must be at least 1"),
    ],
)
def test_combinations_that_mean_nothing(options: SampleOptions, config: GlowFlowConfig, rule: str) -> None:
    (found,) = problems(options, config)
    assert found.startswith(rule)


# -- what is written down ---------------------------------------------------------------------------------------------


def test_predictions_are_json_lines(tmp_path: Path) -> None:
    texts = [
        WrittenText(3, None, "<image> été", "猫", "eos", ("猫",), True),
        WrittenText(4, "g", "", "a", "length", ()),
    ]
    save_lines(texts, tmp_path / "out.jsonl")
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {
        "document": 3, "group": None, "prompt": "<image> été", "text": "猫", "finish": "eos",
        "wanted": ["猫"], "right": True,
    }  # fmt: skip
    assert second["group"] == "g" and second["right"] is None
    with pytest.raises(ConfigError, match="cannot be written"):
        save_lines(texts, tmp_path / "no" / "such" / "folder.jsonl")


CLASSES: dict[str, Any] = {
    "task": "classification", "samples": 6, "groups": 5, "seconds": 1.0, "without": ["audio"], "bad_samples": {},
    "accuracy": 4 / 6, "loss": 0.5, "confidence": {"accuracy": [0.4, 0.9]},
    **class_report(list("aaabbc"), list("aabbba"), ["a", "b", "c"]),
}  # fmt: skip


def test_reports_fit_a_screen() -> None:
    lines = list(report_lines("run at step 5 on digits, test", CLASSES))
    assert lines[0] == "run at step 5 on digits, test: 6 samples of 5 groups in 1.0 s"
    assert lines[1].strip() == "without audio" and "66.67 %   95 % interval 40.00 % to 90.00 %" in lines[2]
    many = {**CLASSES, **class_report([str(n) for n in range(300)], ["0"] * 300, [str(n) for n in range(300)])}
    for report in (lines, list(report_lines("run", many))):
        assert len(report) <= 24 and max(map(len, report)) <= 120
    bounds = {"level": 0.95, "bleu": [[1.0, 2.0]] * 4, "exact": [0.1, 0.3], "lower_percent": [20.0, 30.0]}
    language: dict[str, Any] = {
        "task": "language_modelling", "samples": 9, "groups": 9, "tokens": 90, "seconds": 2.0, "without": [],
        "bad_samples": {"no_data": 2}, "loss": 1.0, "perplexity": math.e,
        "confidence": {"loss": [0.9, 1.1], "perplexity": [2.4, 3.0]},
        "permuted": {"modalities": ["image"], "samples": 8, "same": 1, "right": 2.7, "permuted": 3.6,
                     "lower_percent": 25.0, "confidence": bounds},
        "answers": {"samples": 9, "exact": 0.2, "confidence": bounds, "unfinished": 2,
                    "positions": [{"position": n, "accuracy": 0.5, "samples": 9} for n in range(1, 33)]},
        "bleu": {"groups": 9, "references": 5.0, "beams": 1, "bleu": [60.0, 40, 30, 20], "confidence": bounds,
                 "brevity_penalty": 0.9, "length": 80, "reference_length": 90},
    }  # fmt: skip
    text = "\n".join(report_lines("run", language))
    assert "left out as bad samples: 2 no_data" in text and "BLEU-4" in text
    assert "right is lower by       25.00 %   95 % interval 20.00 % to 30.00 %, paired" in text
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 120
    nobody = {**language["permuted"], "right": None, "samples": 0, "same": 9}
    assert "no sample got another one" in "\n".join(report_lines("run", {**language, "permuted": nobody}))
