"""``glowflow generate``: prompts in, text or JSON out, every way of decoding, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glowflow.cli.main import run
from glowflow.core.model import GlowFlowModel

CONTEXT = 48
Call = Callable[..., Any]


def save(
    path: Path, seed: int = 0, tokenizer: dict[str, Any] | None = None, context: int = CONTEXT, **model: Any
) -> str:
    """A small model that says different things, in one file."""
    keys = {"arch": "transformer", "dim": 16, "depth": 2, "heads": 2, "init_std": 0.4, **model}
    config = {
        "model": keys,
        "data": {"context": context},
        "training": {"seed": seed},
        "resources": {"accelerator": "cpu"},
    }
    made = GlowFlowModel.from_config(config)
    made.set_tokenizer(tokenizer or {"kind": "bytes", "vocab_size": 257})
    with torch.no_grad():  # printable characters, most of the time
        made.module.get_parameter("embedding.weight")[128:] *= 0.2
    made.save(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("draft") / "draft.pt", seed=1, depth=1)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Call:
    """What the command prints on stdout."""

    def call(*args: str) -> str:
        capsys.readouterr()
        assert run(["generate", *args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def results(printed: Call) -> Call:
    """The results of a command with --json."""

    def call(*args: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(printed(*args, "--json"))["results"]
        return found

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Call:
    """The one message of a command that the user must change."""

    def call(*args: str, mentions: tuple[str, ...]) -> str:
        capsys.readouterr()
        code = run(["generate", *args])
        shown = capsys.readouterr()
        assert code == 2 and "Traceback" not in shown.err and shown.out == ""
        for text in mentions:
            assert text in shown.err, f"{text!r} is not in:\n{shown.err}"
        return shown.err

    return call


GREEDY = ("--temperature", "0", "--max-tokens", "20")


def test_the_terminal_shows_prompt_and_text(model: str, printed: Call, results: Call) -> None:
    (one,) = results(model, "--prompt", "the ", *GREEDY)
    assert printed(model, "--prompt", "the ", *GREEDY) == f"the {one['text']}\n"
    assert one["prompt_tokens"] == 5 and one["tokens"] == 20 and one["finish"] == "length"


def test_json_says_how_it_was_made(model: str, printed: Call) -> None:
    args = (model, "--prompt", "a", "--max-tokens", "3", "--top-k", "5", "--min-p", "0.1", "--seed", "4", "--json")
    shown = json.loads(printed(*args))
    assert {"target", "checkpoint", "step", "results"} <= set(shown)
    assert (shown["top_k"], shown["min_p"], shown["seed"], shown["temperature"]) == (5, 0.1, 4, 0.8)
    assert shown["top_p"] is None and shown["repetition_penalty"] == 1.0 and shown["max_tokens"] == 3


def test_prompts_of_options_and_files_in_one_batch(model: str, results: Call, printed: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\nthree is longer\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two\\nlines", "more": 1}\n')
    texts = results(model, "--prompt", "zero", "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "9")
    assert [one["prompt"] for one in texts] == ["zero", "one", "", "three is longer"]
    alone = results(
        model, "--prompt", "zero", "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "9", "--batch-size", "1"
    )
    assert texts == alone
    lines = printed(model, "--prompts", str(tmp_path / "prompts.jsonl"), *GREEDY, "--jsonl").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two\nlines"]
    shown = printed(model, "--prompt", "a", "--prompt", "b", *GREEDY)
    assert "=== 1 of 2\na" in shown and "=== 2 of 2\nb" in shown


def test_samples_differ_and_the_first_is_that_of_one(model: str, results: Call) -> None:
    several = results(model, "--prompt", "a", "--num-samples", "4", "--max-tokens", "12")
    assert len({one["text"] for one in several}) == 4 and [one["sample"] for one in several] == [0, 1, 2, 3]
    assert results(model, "--prompt", "a", "--max-tokens", "12")[0] == several[0]


@pytest.mark.parametrize(
    "way", [(), ("--beams", "1"), ("--draft",), ("--no-cache",)], ids=["plain", "beam", "draft", "no"]
)
def test_a_stop_string_ends_the_text_however_it_is_decoded(
    model: str, draft: str, results: Call, printed: Call, way: tuple[str, ...]
) -> None:
    extra = (*way, draft) if way == ("--draft",) else way
    args = (model, "--prompt", "a", "--max-tokens", "20", *(() if "--beams" in way else ("--temperature", "0")), *extra)
    (whole,) = results(*args)
    stop = whole["text"][5:8]
    cut = whole["text"][: whole["text"].index(stop)]
    (one,) = results(*args, "--stop", stop, "--stop", "never said")
    assert (one["text"], one["finish"]) == (cut, "stop")
    assert printed(*args, "--stop", stop) == f"a{cut}\n"


def test_all_ways_of_greedy_decoding_write_the_same(model: str, draft: str, results: Call, printed: Call) -> None:
    (want,) = results(model, "--prompt", "the", *GREEDY)
    for way in (("--no-cache",), ("--draft", draft), ("--draft", draft, "--no-cache"), ("--draft", model)):
        assert results(model, "--prompt", "the", *GREEDY, *way) == [want]
    (beam,) = results(model, "--prompt", "the", "--beams", "1", "--max-tokens", "20")
    assert beam["text"] == want["text"] and beam["score"] == pytest.approx(beam["log_prob"] / 20)
    shown = json.loads(printed(model, "--prompt", "the", *GREEDY, "--draft", model, "--draft-tokens", "3", "--json"))
    assert shown["draft"]["accepted_share"] == 1.0 and shown["draft"]["proposed"] == shown["draft"]["accepted"] > 0


def test_the_draft_tells_how_well_it_guessed(model: str, draft: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["generate", model, "--prompt", "a", "--draft", draft, "--max-tokens", "10"]) == 0
    assert "proposed tokens accepted" in capsys.readouterr().err


def test_beams_give_the_best_texts_with_scores(model: str, results: Call, printed: Call) -> None:
    found = results(model, "--prompt", "a", "--beams", "4", "--num-samples", "3", "--max-tokens", "8")
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True) and len({one["text"] for one in found}) == 3
    assert scores[0] >= results(model, "--prompt", "a", "--beams", "1", "--max-tokens", "8")[0]["score"]
    likeliest = results(model, "--prompt", "a", "--beams", "4", "--length-penalty", "0", "--max-tokens", "8")
    assert likeliest[0]["score"] == likeliest[0]["log_prob"]
    shown = printed(model, "--prompt", "a", "--beams", "2", "--num-samples", "2", "--max-tokens", "4")
    assert "=== 1 of 2, score -" in shown


def test_log_probs_are_the_models_own(model: str, results: Call) -> None:
    args = (model, "--prompt", "ab", "--max-tokens", "6", "--logprobs", "3")
    (sampled,), (hot,) = results(*args, "--top-k", "1"), results(*args, "--temperature", "0")
    assert sampled["logprobs"] == hot["logprobs"]
    own = GlowFlowModel.load(model)
    ids = [256, *b"ab", *(told["token"] for told in hot["logprobs"])]
    scores = own.module.eval().decode(torch.tensor([ids]), own.module.new_cache(1, len(ids)))[0].log_softmax(-1)
    for place, told in enumerate(hot["logprobs"], 2):
        assert told["log_prob"] == pytest.approx(scores[place, told["token"]].item(), abs=1e-4)
        assert told["top"][0] == {key: told[key] for key in ("token", "text", "log_prob")}
        assert len(told["top"]) == 3 and sum(math.exp(one["log_prob"]) for one in told["top"]) <= 1
    assert "".join(told["text"] for told in hot["logprobs"]) == hot["text"]
    assert all(told["top"] == [] for told in results(*args[:-1], "0")[0]["logprobs"])


def test_a_text_may_be_longer_than_the_context(model: str, results: Call) -> None:
    (one,) = results(model, "--prompt", "a", "--max-tokens", "100")
    assert one["tokens"] == 100


def test_every_architecture_writes(results: Call, tmp_path: Path) -> None:
    adaptive = {"kind": "adaptive", "adaptive": {"pattern": "LGWD"}, "window": 4}
    for name, keys in (("xl", {"arch": "transformer-xl", "memory": 20}), ("mix", {"depth": 4, "attention": adaptive})):
        target = save(tmp_path / f"{name}.pt", **keys)
        (want,) = results(target, "--prompt", "the", *GREEDY)
        assert results(target, "--prompt", "the", *GREEDY, "--no-cache") == [want]
        assert results(target, "--prompt", "the", *GREEDY, "--draft", target) == [want]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long(model: str, fails: Call, results: Call, tmp_path: Path) -> None:
    long = "x" * 60
    fails(model, "--prompt", long, mentions=("prompt: has 61 tokens", "at most 48", "--truncate-prompt"))
    fails(model, "--prompt", "a", "--prompt", long, "--json", mentions=("prompt 2: has 61 tokens",))
    cut = results(model, "--prompt", long, "--truncate-prompt", *GREEDY)
    assert cut[0]["tokens"] == 20
    target = save(tmp_path / "xl.pt", arch="transformer-xl", memory=16)
    assert results(target, "--prompt", long, *GREEDY)[0]["tokens"] == 20


def test_numbers_out_of_range(model: str, fails: Call) -> None:
    for option, value in (
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-k", "0"),
        ("--min-p", "1.1"),
        ("--repetition-penalty", "0"),
        ("--max-tokens", "0"),
        ("--beams", "0"),
    ):
        message = fails(model, option, value, mentions=(option, value))
        assert message.count("Error") == 1
    fails(model, "--temperature", "nan", mentions=("--temperature", "finite"))


def test_options_that_do_not_go_together_in_one_message(model: str, draft: str, fails: Call) -> None:
    args = ("--beams", "2", "--temperature", "1", "--min-p", "0.1", "--draft", draft, "--num-samples", "3")
    fails(model, *args, mentions=("--temperature", "--min-p", "--draft", "--num-samples: must be at most --beams (2)"))
    args = ("--logprobs", "2", "--length-penalty", "2", "--draft-tokens", "3", "--stop", "")
    mentions = ("--logprobs: needs --json", "--length-penalty: needs --beams", "--draft-tokens: needs --draft")
    fails(model, *args, mentions=(*mentions, "--stop: must not be empty"))
    fails(model, "--draft", draft, "--logprobs", "2", "--json", "--jsonl", mentions=("--logprobs", "--jsonl"))


def test_beams_and_drafts_stay_within_the_context(model: str, draft: str, fails: Call) -> None:
    fails(model, "--beams", "2", "--max-tokens", "48", mentions=("--max-tokens", "within the context of 48"))
    fails(model, "--draft", draft, "--prompt", "abc", "--max-tokens", "45", mentions=("--max-tokens", "48"))


def test_a_draft_of_another_tokenizer(model: str, fails: Call, tmp_path: Path) -> None:
    other = save(tmp_path / "chars.pt", tokenizer={"kind": "chars", "chars": "abc"}, vocab_size=257)
    fails(model, "--draft", other, mentions=("--draft", "tokenizer", "bytes", "chars"))


def test_devices_and_files_that_are_not_there(model: str, fails: Call, tmp_path: Path) -> None:
    fails(model, "--device", "gpu", mentions=("--device", "cuda:N", "gpu"))
    if not torch.cuda.is_available():
        fails(model, "--device", "cuda", mentions=("--device", "0 CUDA devices"))
    fails(model, "--prompts", str(tmp_path / "none.txt"), mentions=("none.txt",))
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n{"text": "x"}\n{\n')
    message = fails(model, "--prompts", str(tmp_path / "bad.jsonl"), mentions=("bad.jsonl:1", "bad.jsonl:2"))
    assert "bad.jsonl:3: is no JSON" in message
    (tmp_path / "empty.txt").write_text("")
    fails(model, "--prompts", str(tmp_path / "empty.txt"), mentions=("holds no prompts",))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    fails(model, "--prompts", str(tmp_path / "latin.txt"), mentions=("not UTF-8",))


def test_a_diverged_model(fails: Call, tmp_path: Path) -> None:
    target = save(tmp_path / "nan.pt")
    made = GlowFlowModel.load(target)
    with torch.no_grad():
        made.module.get_parameter("norm.weight").fill_(float("nan"))
    made.save(target)
    fails(target, "--max-tokens", "5", mentions=("not finite", "earlier checkpoint"))
