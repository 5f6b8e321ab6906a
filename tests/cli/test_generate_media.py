"""``glowflow generate`` with pictures and recordings: the model sees what it sees in evaluation; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glowflow.cli.main import run
from glowflow.config.errors import ConfigError, DataError
from glowflow.core.generation import SamplingOptions
from glowflow.core.model import GlowFlowModel
from glowflow.data.plan import eval_plan
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import ByteTokenizer
from glowflow.data.samples.collate import collate
from glowflow.data.samples.sample import PreparedSample
from glowflow.data.samples.view import media_view
from glowflow.evaluation.load import load_target
from glowflow.evaluation.prompts import Media, MediaPrompts
from glowflow.evaluation.writer import Writer, WritingOptions
from tests.data.media_sets import MediaRow, png, tone, write_media_set

Call = Callable[..., Any]
CONTEXT = 48
FUSIONS = ("prefix", "cross_attention", "bottleneck", "late", "mixture")
TOKENIZER = MediaTokenizer(ByteTokenizer())
MODEL = {
    "arch": "multimodal",
    **{"dim": 16, "depth": 2, "heads": 2, "init_std": 0.4},
    "image": {"encoder": "vit", "patch": 4, "depth": 1, "heads": 2},
    "audio": {"encoder": "conv", "channels": [8, 8], "depth": 1, "heads": 2, "tokens": 3},
}
DATA = {
    "context": CONTEXT,
    "image": {"size": 8, "augment": {"flip": 0.5, "erase": 1.0}},
    "audio": {"rate": 8000, "n_fft": 256, "hop": 128, "mels": 8, "max_seconds": 0.2},
}
GREEDY = ("--temperature", "0", "--max-tokens", "16")


def save(path: Path, data: dict[str, Any] | None = None, **model: Any) -> str:
    """A small model of random weights that looks and listens, and says different things, in one file."""
    config = {"model": {**MODEL, **model}, "data": {**DATA, **(data or {})}, "resources": {"accelerator": "cpu"}}
    made = GlowFlowModel.from_config(config)
    made.set_tokenizer(TOKENIZER.spec())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if "gate" in name or "alpha" in name:  # cross-attention begins closed
                parameter.fill_(1.0)
            if name.startswith(("image_encoder", "audio_encoder")) and parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        embedding = made.module.get_parameter("embedding.weight")
        embedding[128:256] *= 0.2  # printable characters, most of the time
        embedding[TOKENIZER.eos_id] *= 0.8
        embedding[TOKENIZER.vocab_size - 2 :] *= 0.2
    made.save(path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {fusion: save(root / f"{fusion}.pt", fusion=fusion) for fusion in FUSIONS}


@pytest.fixture(scope="module")
def model(models: dict[str, str]) -> str:
    return models["prefix"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures ``0.png`` to ``4.png`` of different sizes, recordings ``0.wav`` to ``2.wav``."""
    root = tmp_path_factory.mktemp("files")
    for number in range(5):
        (root / f"{number}.png").write_bytes(png(6 + number, 9 - number, seed=number))
    for number in range(3):
        (root / f"{number}.wav").write_bytes(tone(0.05 * (1 + number), 300 * (1 + number)))
    return root


@pytest.fixture
def results(capsys: pytest.CaptureFixture[str]) -> Call:
    """The results of a command with --json."""

    def call(*args: str | Path) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert run(["generate", *map(str, args), "--json"]) == 0, capsys.readouterr().err
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
        return found

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Call:
    """The one message of a command that the user must change."""

    def call(*args: str | Path, mentions: tuple[str, ...]) -> str:
        capsys.readouterr()
        code = run(["generate", *map(str, args)])
        shown = capsys.readouterr()
        assert code == 2 and "Traceback" not in shown.err and shown.out == ""
        for text in mentions:
            assert text in shown.err, f"{text!r} is not in:\n{shown.err}"
        return shown.err

    return call


# -- what is written ---------------------------------------------------------------------------------------------------


def samples_of(target: str, rows: list[MediaRow], root: Path) -> list[PreparedSample]:
    """The rows as an evaluation of this model prepares them from a built data set."""
    manifest = write_media_set(root, {"validation": rows})
    view = media_view(load_target(target).config, training=False)
    plan = eval_plan(
        manifest, split="validation", context=CONTEXT, global_batch=len(rows), layout="bucketed", view=view
    )
    (samples,) = plan.samples(range(1))
    return samples


def greedy_by_hand(target: str, sample: PreparedSample, most: int) -> tuple[str, str, list[float]]:
    """The likeliest token after each whole pass over the sample's prompt and what has been written.

    Returns:
        The text, why it ends, and the log-probability of each token.
    """
    loaded = load_target(target)
    view, written, log_probs = media_view(loaded.config, training=False), [], []
    while len(written) < most:
        tokens = np.array([*sample.tokens[: sample.num_prompt], *written], np.int32)
        zeros = np.zeros(len(tokens), np.int32)
        one = PreparedSample(tokens, zeros, zeros.astype(np.float32), 0, 0, items=sample.items)
        batch = collate([one], view)
        with torch.inference_mode():
            output, _ = loaded.module(batch, compute_loss=False)
            scores = loaded.module.logits(output.hidden[0, len(tokens) - 1]).log_softmax(-1)
        token = int(scores.argmax())
        if token == TOKENIZER.eos_id:
            return TOKENIZER.decode(written), "eos", log_probs
        written.append(token)
        log_probs.append(scores[token].item())
    return TOKENIZER.decode(written), "length", log_probs


def told(one: dict[str, Any]) -> tuple[str, str, Any]:
    """The same of a result with --logprobs."""
    return one["text"], one["finish"], pytest.approx([token["log_prob"] for token in one["logprobs"]], abs=1e-4)


PROMPTS = ("<image> and <audio> are ", "see <image>, <image>: ", "hear <audio> ")
MEDIA = ((["0.png"], ["1.wav"]), (["1.png", "2.png"], []), ([], ["0.wav"]))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_writes_what_an_evaluation_would(
    models: dict[str, str], files: Path, results: Call, tmp_path: Path, fusion: str
) -> None:
    rows = [
        MediaRow("x", prompt, [(files / f).read_bytes() for f in images], [(files / f).read_bytes() for f in audio])
        for prompt, (images, audio) in zip(PROMPTS, MEDIA, strict=True)
    ]
    lines = [
        {"prompt": prompt, "images": images, "audio": audio}
        for prompt, (images, audio) in zip(PROMPTS, MEDIA, strict=True)
    ]
    asked = files / f"{fusion}.jsonl"
    asked.write_text("\n".join(json.dumps(line) for line in lines))
    target = models[fusion]
    want = [greedy_by_hand(target, sample, 10) for sample in samples_of(target, rows, tmp_path)]
    args = (target, "--prompts", asked, "--temperature", "0", "--max-tokens", "10", "--logprobs", "0")
    found = results(*args)
    assert [told(one) for one in found] == want
    assert found[1]["images"] == [str(files / "1.png"), str(files / "2.png")] and "audio" not in found[1]
    assert [told(one) for one in results(*args, "--batch-size", "1")] == want
    assert [told(one) for one in results(*args, "--no-cache")] == want
    beams = results(target, "--prompts", asked, "--beams", "1", "--max-tokens", "10")
    assert [one["text"] for one in beams] == [text for text, _, _ in want]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_media_matter(models: dict[str, str], files: Path, results: Call, fusion: str) -> None:
    def scores(image: str, audio: str) -> list[float]:
        media = ("--image", files / image, "--audio", files / audio)
        args = (models[fusion], "--prompt", "<image><audio>?", *media, "--temperature", "0", "--max-tokens", "4")
        (one,) = results(*args, "--logprobs", "0")
        return [token["log_prob"] for token in one["logprobs"]]

    first = scores("0.png", "0.wav")
    assert scores("0.png", "0.wav") == first
    assert scores("3.png", "0.wav") != pytest.approx(first, abs=1e-3)
    assert scores("0.png", "2.wav") != pytest.approx(first, abs=1e-3)


def test_prompts_are_collated_as_samples_are(model: str, files: Path, tmp_path: Path) -> None:
    rows = [MediaRow("", "<image>", [png(6, 9)]), MediaRow("", "no <audio> but <image>", [png(9, 5)], [tone(0.1)])]
    target = load_target(model)
    prompts = MediaPrompts(target.config, TOKENIZER)
    made = prompts.prepare([row.prompt for row in rows], [Media(row.images, row.audio) for row in rows])
    # In the data set the end of the document follows, which is a target only.
    samples = samples_of(model, rows, tmp_path)
    want, found = collate(samples, prompts.view), prompts.batch(made)
    assert torch.equal(found.tokens, want.tokens)
    assert found.readout is not None and want.readout is not None and torch.equal(found.readout, want.readout)
    for name in ("image", "audio"):
        for field, value in vars(want.modalities[name]).items():
            assert torch.equal(getattr(found.modalities[name], field), value), (name, field)


def test_samples_have_random_numbers_of_their_own(model: str, files: Path, results: Call) -> None:
    args = (model, "--prompt", "<image>", "--image", files / "0.png", "--max-tokens", "12", "--temperature", "1")
    found = results(*args, "--num-samples", "5")
    assert len({one["text"] for one in found}) == 5
    assert results(*args, "--num-samples", "5", "--batch-size", "2") == found
    assert results(*args)[0] == found[0]


def test_without_placeholders_the_media_come_first(model: str, files: Path, results: Call, capsys: Any) -> None:
    media = ("--image", files / "0.png", "--audio", files / "0.wav", *GREEDY)
    (bare,), (full,) = (results(model, "--prompt", prompt, *media) for prompt in (" is", "<image><audio> is"))
    assert bare["text"] == full["text"] and bare["prompt"] == " is"
    assert bare["prompt_tokens"] == full["prompt_tokens"] == 1 + 4 + 3 + 3
    (empty,) = results(model, *media)
    assert empty["prompt"] == "" and empty["prompt_tokens"] == 8
    capsys.readouterr()
    assert run(["generate", model, "--prompt", " is", *map(str, media)]) == 0
    assert capsys.readouterr().out == f" is{bare['text']}\n"


def test_a_text_ends_where_the_context_is_full(model: str, files: Path, results: Call) -> None:
    lines = [{"prompt": "<image>" + "x" * number, "images": ["0.png"]} for number in (0, 20, CONTEXT - 5)]
    (files / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = results(model, "--prompts", files / "long.jsonl", "--temperature", "1")
    for one in found:
        assert one["finish"] in ("length", "eos")
        assert one["finish"] == "eos" or one["tokens"] == CONTEXT + 1 - one["prompt_tokens"]
    assert found[2]["prompt_tokens"] == CONTEXT and found[2]["tokens"] <= 1
    alone = results(model, "--prompt", lines[1]["prompt"], "--image", files / "0.png", "--temperature", "0")
    beam = results(model, "--prompt", lines[1]["prompt"], "--image", files / "0.png", "--beams", "1")
    assert alone[0]["text"] == beam[0]["text"]


def test_a_document_ends_with_its_token(files: Path, results: Call, tmp_path: Path) -> None:
    target = save(tmp_path / "eos.pt")
    made = GlowFlowModel.load(target)
    with torch.no_grad():
        made.module.get_parameter("embedding.weight")[TOKENIZER.eos_id] *= 6
    made.save(target)
    args = (target, "--prompt", "<image>", "--image", files / "0.png", "--max-tokens", "30")
    found = results(*args, "--temperature", "1", "--num-samples", "6")
    ended = [one for one in found if one["finish"] == "eos"]
    assert ended and all(one["tokens"] < 30 for one in ended)


def test_stop_strings_beams_and_log_probs_work_with_media(model: str, files: Path, results: Call) -> None:
    args = (model, "--prompt", "<image> shows", "--image", files / "1.png")
    (whole,) = results(*args, *GREEDY, "--logprobs", "2")
    assert len(whole["logprobs"]) == whole["tokens"] and len(whole["logprobs"][0]["top"]) == 2
    stop = whole["text"][4:6]
    (cut,) = results(*args, *GREEDY, "--stop", stop)
    assert (cut["text"], cut["finish"]) == (whole["text"][: whole["text"].index(stop)], "stop")
    found = results(*args, "--beams", "3", "--num-samples", "3", "--max-tokens", "6")
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True) and len({one["text"] for one in found}) == 3
    assert all(one["images"] == [str(files / "1.png")] for one in found)


def test_a_prompt_of_text_alone_still_works(model: str, results: Call, tmp_path: Path) -> None:
    (one,) = results(model, "--prompt", "only text", *GREEDY, "--logprobs", "0")
    (sample,) = samples_of(model, [MediaRow("x", "only text")], tmp_path)
    assert told(one) == greedy_by_hand(model, sample, 16)


def test_placeholders_that_the_model_does_not_read_are_tokens(files: Path, results: Call, tmp_path: Path) -> None:
    target = save(tmp_path / "deaf.pt", audio=None)
    row = MediaRow("x", "<image> <audio> ", [(files / "0.png").read_bytes()], [tone()])
    (sample,) = samples_of(target, [row], tmp_path / "set")
    (one,) = results(target, "--prompt", row.prompt, "--image", files / "0.png", *GREEDY, "--logprobs", "0")
    assert told(one) == greedy_by_hand(target, sample, 16)


def test_the_settings_of_the_run_prepare_the_media(files: Path, tmp_path: Path, results: Call) -> None:
    args = ("--prompt", "<image>", "--image", files / "0.png", *GREEDY)
    large = save(tmp_path / "large.pt", {"image": {"size": 16}})
    assert results(large, *args)[0]["prompt_tokens"] == 17
    own = save(tmp_path / "own.pt", {"image": {"size": None, "multiple": 4}})
    assert results(own, *args)[0]["prompt_tokens"] == 1 + 2 * 2


def test_from_python_with_bytes(model: str, files: Path, results: Call) -> None:
    writer = Writer(load_target(model))
    options = WritingOptions(16, SamplingOptions(temperature=0))
    (want,) = results(model, "--prompt", "<image>", "--image", files / "2.png", *GREEDY)
    for picture in ((files / "2.png").read_bytes(), files / "2.png", str(files / "2.png")):
        (one,) = writer.write(["<image>"], options, media=[Media(images=[picture])])
        assert (one.text, one.number) == (want["text"], 0)
    assert "".join(writer.stream("<image>", options, Media(images=files / "2.png"))) == want["text"]
    texts = writer.write(["<image>", "no media"], options, media=[Media(images=[files / "2.png"]), None])
    assert texts[0].text == want["text"] and texts[1].text == writer.write(["no media"], options)[0].text
    with pytest.raises(DataError, match="picture 1 of the prompt 2: image_header"):
        writer.write(["a", "<image>"], options, media=[None, Media(images=[b"nonsense"])])
    assert writer.write([], options) == []


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_numbers_of_placeholders_and_files_must_agree(model: str, files: Path, fails: Call) -> None:
    args = (model, "--image", files / "0.png")
    fails(*args, "--prompt", "<image> <image>", mentions=("prompt: has 2 <image>, but 1 picture is given",))
    fails(*args, "--prompt", "<audio>", mentions=("has 0 <image>, but 1 picture", "has 1 <audio>, but 0 recordings"))
    fails(model, "--prompt", "<image>", mentions=("has 1 <image>, but 0 pictures are given",))
    (files / "wrong.jsonl").write_text('{"prompt": "a"}\n{"prompt": "<image>", "images": ["0.png", "1.png"]}\n')
    fails(model, "--prompts", files / "wrong.jsonl", mentions=("prompt 2: has 1 <image>, but 2 pictures are given",))


def test_files_that_cannot_be_used_are_named_with_the_reason(files: Path, fails: Call, tmp_path: Path) -> None:
    target = save(
        tmp_path / "m.pt", {"image": {"size": 8, "max_pixels": 64}, "audio": {**DATA["audio"], "max_file_seconds": 0.2}}
    )
    (tmp_path / "cut.png").write_bytes(png()[:70])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(png(9, 9))
    (tmp_path / "long.wav").write_bytes(tone(0.3))
    (tmp_path / "empty.wav").write_bytes(b"")
    for name, reason in (
        ("none.png", "missing_file: cannot be read: No such file"),
        (".", "missing_file: cannot be read"),
        ("cut.png", "image_"),
        ("text.png", "image_header"),
        ("large.png", "image_too_large"),
    ):
        fails(target, "--image", tmp_path / name, mentions=(str(tmp_path / name), reason))
    for name, reason in (("long.wav", "audio_too_long"), ("empty.wav", "no_data"), ("text.png", "audio_header")):
        fails(target, "--audio", tmp_path / name, mentions=(str(tmp_path / name), reason))
    message = fails(
        *(target, "--image", tmp_path / "cut.png", "--image", tmp_path / "none.png", "--audio", tmp_path / "long.wav"),
        mentions=("cut.png", "none.png", "long.wav"),
    )
    assert message.count("\n") <= 5


def test_a_model_without_the_encoder(files: Path, fails: Call, tmp_path: Path) -> None:
    deaf = save(tmp_path / "deaf.pt", audio=None)
    fails(deaf, "--audio", files / "0.wav", mentions=("--audio: the model reads no recordings: it has no model.audio",))
    text = GlowFlowModel.from_config({"model": {"arch": "transformer", "dim": 16, "depth": 1, "heads": 2}})
    text.set_tokenizer({"kind": "bytes", "vocab_size": 257})
    text.save(tmp_path / "text.pt")
    mentions = ("--image: the model reads no pictures: its architecture, transformer, reads text alone",)
    fails(tmp_path / "text.pt", "--image", files / "0.png", mentions=mentions)


def test_a_model_of_text_takes_placeholders_for_text(results: Call, tmp_path: Path) -> None:
    text = GlowFlowModel.from_config({"model": {"arch": "transformer", "dim": 16, "depth": 1, "heads": 2}})
    text.set_tokenizer({"kind": "bytes", "vocab_size": 257})
    text.save(tmp_path / "text.pt")
    assert results(tmp_path / "text.pt", "--prompt", "<image>", *GREEDY)[0]["prompt_tokens"] == 8


@pytest.mark.parametrize("task", ["classification", "contrastive"])
def test_models_that_do_not_write(files: Path, fails: Call, tmp_path: Path, task: str) -> None:
    keys = {"num_classes": 3} if task == "classification" else {"fusion": "late", "audio": None}
    target = tmp_path / "m.pt"
    made = GlowFlowModel.from_config({"model": {**MODEL, "task": task, **keys}, "data": DATA})
    made.set_tokenizer(TOKENIZER.spec())
    made.save(target)
    mentions = (f"trained for {task}: there is nothing to generate", "glowflow eval")
    fails(target, "--prompt", "<image>", "--image", files / "0.png", mentions=mentions)
    fails(target, "--prompt", "text", mentions=mentions)


def test_options_that_do_not_go_with_media(model: str, files: Path, fails: Call) -> None:
    image = ("--image", files / "0.png")
    message = fails(model, *image, "--draft", model, "--truncate-prompt", mentions=("--draft: cannot be used with",))
    assert "--truncate-prompt: cannot be used with --image" in message
    fails(model, *image, "--prompt", "a", "--prompt", "b", mentions=("--image: belongs to a single --prompt",))
    (files / "some.txt").write_text("a\n")
    fails(model, *image, "--prompts", files / "some.txt", mentions=("some.txt have their own",))
    with pytest.raises(ConfigError, match="draft: cannot be used with media"):
        target = load_target(model)
        Writer(target, target).write(["<image>"], WritingOptions(), media=[Media(images=[files / "0.png"])])


def test_a_prompt_longer_than_the_context(model: str, files: Path, fails: Call) -> None:
    long = "<image>" + "x" * (CONTEXT - 4)
    mentions = (f"prompt: has {CONTEXT + 1} tokens, 4 of them places of media, but", "at most 48 (data.context)")
    fails(model, "--prompt", long, "--image", files / "0.png", mentions=mentions)


def test_lines_of_a_file_that_are_not_as_they_should_be(model: str, files: Path, fails: Call) -> None:
    lines = ['{"prompt": "<image>", "image": "0.png"}', '{"prompt": "<image>", "images": "0.png"}', '{"images": []}']
    (files / "bad.jsonl").write_text("\n".join(lines))
    message = fails(
        model, "--prompts", files / "bad.jsonl", mentions=('bad.jsonl:1: has "image"', '"images" must be a')
    )
    assert "bad.jsonl:3: must be an object" in message
