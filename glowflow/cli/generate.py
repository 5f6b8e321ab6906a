"""``glowflow generate``: text from a trained model, written as it is sampled; prompts may hold media."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from glowflow.cli.output import echo_json, note
from glowflow.config.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from glowflow.evaluation.load import Target
    from glowflow.evaluation.prompts import Media
    from glowflow.evaluation.writer import Writer, WritingOptions, Written

__all__ = ["generate", "stream_text"]

_FILES = {"image": "images", "audio": "audio"}
_NOT_WITH_MEDIA = {
    "draft": "both models would have to read it",
    "truncate_prompt": "its places at the beginning would be lost",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@click.command()
@click.argument("target")
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from, also several; none: a document's start.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='File of prompts: one a line, or JSON lines with "prompt", and perhaps "images" and "audio" (.jsonl).',
)
@click.option("--image", "images", multiple=True, metavar="FILE", help="A picture for the prompt's next <image>.")
@click.option("--audio", multiple=True, metavar="FILE", help="A recording for the prompt's next <audio>.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.8, show_default=True, help="0: greedy.")
@click.option("--top-k", type=click.IntRange(min=1), default=None, help="Sample among the k most likely tokens.")
@click.option("--top-p", type=click.FloatRange(min=0.0, max=1.0, min_open=True), default=None, help="Nucleus sampling.")
@click.option(
    "--min-p",
    type=click.FloatRange(min=0.0, max=1.0),
    default=None,
    help="Sample among the tokens that are at least so likely, relative to the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: tokens that the text holds already become less likely.",
)
@click.option("--stop", "stops", multiple=True, help="End the text before this string; may be given several times.")
@click.option("--beams", type=click.IntRange(min=1), default=None, help="Beam search for the likeliest text.")
@click.option(
    "--length-penalty", type=float, default=1.0, show_default=True, help="Of a beam search; larger: longer texts."
)
@click.option("--draft", metavar="TARGET", help="A smaller model with the same tokenizer, for speculative decoding.")
@click.option("--draft-tokens", type=click.IntRange(min=1), default=4, show_default=True, help="It proposes at a time.")
@click.option(
    "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Texts after each prompt."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Texts written at once.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--truncate-prompt", is_flag=True, help="Read only the end of a prompt longer than the context.")
@click.option("--no-cache", is_flag=True, help="Pass over the whole text for every token: slow, for checks.")
@click.option("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one.")
@click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
@click.option(
    "--logprobs", type=click.IntRange(min=0), help="In JSON: each token's log-probability and the N likeliest."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--jsonl", "as_jsonl", is_flag=True, help="Print one JSON document per text, one a line.")
@click.pass_context
def generate(
    ctx: click.Context, target: str, prompts: tuple[str, ...], prompts_file: Path | None, **given: Any
) -> None:
    """Write text with TARGET: a run, a checkpoint directory, or an exported file."""
    named = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    _require_compatible(given, named, len(prompts) + (prompts_file is not None))
    asked = _prompts(prompts, prompts_file, given)
    sampling = {name: given[name] for name in _SAMPLING}
    with _option_names():
        writer, loaded = _writer(target, given)
        options = _writing_options(given, sampling)
        several = len(asked) * given["num_samples"] > 1
        if given["as_json"] or given["as_jsonl"] or several or given["beams"]:
            written = _write(writer, asked, options, given)
        else:
            _stream(writer, *asked[0], options)
            return
    if given["as_jsonl"]:
        for one in written:
            click.echo(json.dumps(_document(one, asked[one.number][1], writer), ensure_ascii=False))
    elif given["as_json"]:
        results = [_document(one, asked[one.number][1], writer) for one in written]
        about = {"target": target, "checkpoint": str(loaded.path), "step": loaded.step}
        echo_json({**about, **_method(given, sampling, writer), "results": results})
    else:
        _print(written, several)
        _tell_speculation(writer)


def stream_text(loaded: Target, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """Yield the decoded continuation piece by piece; half a character is held back until it is whole."""
    from glowflow.core.generation import SamplingOptions
    from glowflow.evaluation.writer import Writer, WritingOptions

    return Writer(loaded).stream(prompt, WritingOptions(max_tokens, SamplingOptions(**sampling)))


def _require_compatible(given: dict[str, Any], named: set[str], sources: int) -> None:
    """Refuse options that do not go together.

    Args:
        given: all options.
        named: those that stand on the command line.
        sources: prompts on the command line, and a file of them.

    Raises:
        ConfigError: with all problems.
    """
    problems = []

    def refuse(name: str, rule: str) -> None:
        problems.append(Problem(f"--{name.replace('_', '-')}", rule))

    if given["beams"]:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            if name in named:
                refuse(name, "has no effect with --beams, which takes the likeliest text")
        for name in ("draft", "logprobs"):
            if name in named:
                refuse(name, "cannot be used with --beams")
        if given["num_samples"] > given["beams"]:
            refuse("num_samples", f"must be at most --beams ({given['beams']})")
    elif "length_penalty" in named:
        refuse("length_penalty", "needs --beams")
    if given["draft"] is None and "draft_tokens" in named:
        refuse("draft_tokens", "needs --draft")
    if given["draft"] is not None and "logprobs" in named and not given["beams"]:
        refuse("logprobs", "cannot be used with --draft")
    if "logprobs" in named and not (given["as_json"] or given["as_jsonl"]):
        refuse("logprobs", "needs --json or --jsonl")
    if given["as_json"] and given["as_jsonl"]:
        refuse("jsonl", "cannot be used with --json")
    if "" in given["stops"]:
        refuse("stop", "must not be empty")
    for option in [option for option in ("image", "audio") if given[_FILES[option]]]:
        if sources > 1:
            refuse(option, "belongs to a single --prompt: give each prompt its own in a file of --prompts")
        for name in ("draft", "truncate_prompt"):
            if given[name]:
                refuse(name, f"cannot be used with --{option}: {_NOT_WITH_MEDIA[name]}")
    if problems:
        raise ConfigError(problems)


def _prompts(prompts: Sequence[str], file: Path | None, given: dict[str, Any]) -> list[tuple[str, Media]]:
    """All prompts with their media."""
    from glowflow.evaluation.prompts import Media

    here = Media(given["images"], given["audio"])
    if here and file is not None:
        raise ConfigError(Problem("--image, --audio", f"belong to a --prompt; the lines of {file} have their own"))
    return [*((text, here) for text in prompts), *(_read_prompts(file) if file else [])] or [("", here)]


def _read_prompts(file: Path) -> list[tuple[str, Media]]:
    """The prompts of a file.

    Raises:
        DataError: it is not UTF-8, holds nothing, or a line is not as it should be.
    """
    from glowflow.evaluation.prompts import Media

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(file), f"is not UTF-8: {error.reason} at byte {error.start}")) from error
    prompts: list[tuple[str, Media]] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if file.suffix != ".jsonl":
            prompts.append((line, Media()))
            continue
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of(line, file.parent))
        except ValueError as error:
            problems.append(Problem(f"{file}:{number}", str(error)))
    if not problems and not prompts:
        problems.append(Problem(str(file), "holds no prompts"))
    if problems:
        raise DataError(problems[:10])
    return prompts


def _prompt_of(line: str, folder: Path) -> tuple[str, Media]:
    """A line's prompt and files, whose paths are relative to the folder."""
    from glowflow.evaluation.prompts import Media

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError('must be an object with the text "prompt"')
    if "image" in row and "images" not in row:
        raise ValueError('has "image": pictures are a list of paths under "images"')
    files = []
    for key in _FILES.values():
        paths = row.get(key, [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f'"{key}" must be a list of paths')
        files.append([str(folder / path) for path in paths])
    return row["prompt"], Media(*files)


@contextmanager
def _option_names() -> Iterator[None]:
    """What the library calls by its arguments' names is called by the options' here."""
    options = {"max_new_tokens": "--max-tokens", "num_beams": "--beams", "num_results": "--num-samples"}
    options |= {"images": "--image"}
    for name in (*_SAMPLING, "length_penalty", "draft", "draft_tokens", "device", "audio", "truncate_prompt"):
        options[name] = f"--{name.replace('_', '-')}"
    try:
        yield
    except ConfigError as error:
        if not error.problems:
            raise
        raise ConfigError([replace(p, key=options.get(p.key, p.key)) for p in error.problems]) from error


def _writer(target: str, given: dict[str, Any]) -> tuple[Writer, Target]:
    from glowflow.evaluation.load import load_target
    from glowflow.evaluation.writer import Writer, device_named

    loaded = load_target(target, given["storage"])
    draft = None if given["draft"] is None else load_target(given["draft"], given["storage"])
    device = device_named(given["device"], loaded)
    return Writer(loaded, draft, draft_tokens=given["draft_tokens"], device=device), loaded


def _writing_options(given: dict[str, Any], sampling: dict[str, Any]) -> WritingOptions:
    from glowflow.core.generation import SamplingOptions
    from glowflow.evaluation.writer import WritingOptions

    return WritingOptions(
        given["max_tokens"],
        SamplingOptions(**sampling),
        given["stops"],
        truncate_prompt=given["truncate_prompt"],
        cached=not given["no_cache"],
    )


def _write(
    writer: Writer, asked: Sequence[tuple[str, Media]], options: WritingOptions, given: dict[str, Any]
) -> list[Written]:
    samples, beams = given["num_samples"], given["beams"]
    texts, media = [text for text, _ in asked], [own for _, own in asked]
    if beams:
        penalty = given["length_penalty"]
        return writer.search(texts, options, beams, media=media, length_penalty=penalty, best=samples)
    size, log_probs = given["batch_size"], given["logprobs"]
    return writer.write(texts, options, media=media, samples=samples, batch_size=size, log_probs=log_probs)


def _stream(writer: Writer, prompt: str, media: Media, options: WritingOptions) -> None:
    pieces = writer.stream(prompt, options, media)
    first = next(pieces, "")  # what is wrong with the prompt is told before anything is printed
    click.echo(prompt + first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    _tell_speculation(writer)


def _tell_speculation(writer: Writer) -> None:
    share = writer.speculation.accepted_share
    if share is not None:
        counts = writer.speculation
        note(
            f"draft: {share:.0%} of {counts.proposed:,} proposed tokens accepted, {counts.passes:,} passes of the model"
        )


def _print(written: Sequence[Written], several: bool) -> None:
    for number, one in enumerate(written, 1):
        if several:
            score = "" if one.score is None else f", score {one.score:.4f}"
            click.echo(f"=== {number} of {len(written)}{score}")
        click.echo(one.prompt + one.text)


def _method(given: dict[str, Any], sampling: dict[str, Any], writer: Writer) -> dict[str, Any]:
    """How the texts were decoded."""
    if given["beams"]:
        return {"max_tokens": given["max_tokens"], "beams": given["beams"], "length_penalty": given["length_penalty"]}
    method = {"max_tokens": given["max_tokens"], **sampling}
    if given["draft"] is None:
        return method
    counts = writer.speculation
    share = {"proposed": counts.proposed, "accepted": counts.accepted, "accepted_share": counts.accepted_share}
    return {**method, "draft": {"target": given["draft"], "tokens": given["draft_tokens"], **share}}


def _document(one: Written, media: Media, writer: Writer) -> dict[str, Any]:
    """One text as it stands in the JSON."""
    files = {key: [str(file) for file in media.of(modality)] for modality, key in _FILES.items()}
    document: dict[str, Any] = {
        "prompt": one.prompt,
        **{key: paths for key, paths in files.items() if paths},
        "sample": one.sample,
        "text": one.text,
        "finish": one.finish,
        "prompt_tokens": one.prompt_tokens,
        "tokens": len(one.ids),
    }
    if one.score is not None:
        document |= {"log_prob": one.log_prob, "score": one.score}
    if one.scores:
        document["logprobs"] = [
            {**_token(token, told.log_prob, writer), "top": [_token(*other, writer) for other in told.alternatives]}
            for token, told in zip(one.ids, one.scores, strict=True)
        ]
    return document


def _token(token: int, log_prob: float, writer: Writer) -> dict[str, Any]:
    return {"token": token, "text": writer.decode(token), "log_prob": log_prob}
