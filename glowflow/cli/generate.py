"""``glowflow generate``: text from a trained model, written as it is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from glowflow.cli.output import echo_json

__all__ = ["generate", "stream_text"]


@click.command()
@click.argument("target")
@click.option("--prompt", default="", help="Text to go on from; empty: the start of a document.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.8, show_default=True, help="0: greedy.")
@click.option("--top-k", type=click.IntRange(min=1), default=None, help="Sample among the k most likely tokens.")
@click.option("--top-p", type=click.FloatRange(min=0.0, max=1.0, min_open=True), default=None, help="Nucleus sampling.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def generate(
    target: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    storage: str,
    as_json: bool,
) -> None:
    """Write text with TARGET: a run, a checkpoint directory, or an exported file."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    from glowflow.evaluation.load import load_target

    pieces = stream_text(load_target(target, storage), prompt, max_tokens=max_tokens, **sampling)
    if as_json:
        echo_json({"target": target, "prompt": prompt, "text": "".join(pieces), **sampling})
        return
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def stream_text(loaded: Any, prompt: str, *, max_tokens: int, **sampling: Any) -> Iterator[str]:
    """Yield the decoded continuation piece by piece; half a character is held back until it is whole."""
    from glowflow.core.generation import SamplingOptions, generate
    from glowflow.data.processors.text import tokenizer_from_spec

    tokenizer = tokenizer_from_spec(loaded.tokenizer_spec)
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    options = SamplingOptions(eos_id=tokenizer.eos_id, **sampling)
    ids: list[int] = []
    shown = ""
    for token in generate(loaded.module, prompt_ids, max_tokens, loaded.config.data.context, options):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]
