"""``glowflow import``: weights of llama2.c or Hugging Face become a checkpoint that every command takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from glowflow.cli.output import note
from glowflow.config.errors import CheckpointError, ConfigError, Problem

__all__ = ["import_model"]

_SUFFIXES = (".json", ".bin")


@click.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    "given",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Its tokenizer.json, or tokenizer.bin of llama2.c; default: the one beside the weights.",
)
def import_model(source: Path, out: Path, given: Path | None) -> None:
    """Turn SOURCE into OUT, one .safetensors or .pt file of GlowFlow.

    SOURCE is a .bin file of llama2.c (legacy or version 1), or a folder of Hugging Face's transformers with
    config.json and safetensors of a Llama, Mistral, Qwen2 or GPT-2.
    """
    from glowflow.config.loader import load_config
    from glowflow.core.conversion.source import read_foreign
    from glowflow.core.model import GlowFlowModel
    from glowflow.data.processors.text import load_tokenizer_file

    if out.suffix not in (".pt", ".safetensors"):
        raise ConfigError(Problem("OUT", "must end in .pt or .safetensors", str(out)))
    foreign = read_foreign(source)
    path = _tokenizer_file(source.expanduser(), given)
    tokenizer = load_tokenizer_file(path)
    rows = foreign.model["vocab_size"]
    if tokenizer.vocab_size > rows:
        rule = f"{path} has {tokenizer.vocab_size:,} tokens, but the model in {source} knows {rows:,}"
        raise CheckpointError(Problem("--tokenizer", rule, hint="name the tokenizer that the model was trained with"))
    data = {"context": foreign.context, "tokenizer": str(path.absolute())}
    model = GlowFlowModel(load_config({"model": foreign.model, "data": data}), tokenizer.spec())
    model.load_state_dict(foreign.state, str(source))
    model.save(out)
    if tokenizer.vocab_size < rows:
        note(f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model rows for {rows:,}: the last mean nothing")
    note(f"{foreign.described}: {model.num_parameters():,} parameters, context {foreign.context:,}, {path.name}")
    shown = shlex.quote(str(out))
    note(f"wrote {out}; next: glowflow generate {shown} | glowflow train --from {shown}")


def _tokenizer_file(source: Path, given: Path | None) -> Path:
    """The tokenizer that was named, or the one that lies beside the weights.

    Raises:
        ConfigError: there is none, or more than one that could be meant.
    """
    if given is not None:
        path = given.expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.suffix not in _SUFFIXES or not path.is_file():
            hint = "a sentencepiece .model becomes one by llama2.c's tokenizer.py or transformers' save_pretrained"
            rule = "must be a tokenizer.json, or a tokenizer.bin of llama2.c, that exists"
            raise ConfigError(Problem("--tokenizer", rule, str(given), hint))
        return path
    folder = source if source.is_dir() else source.parent
    names = [folder / "tokenizer.json", folder / "tokenizer.bin"]
    found = [path for path in (names if source.is_dir() else reversed(names)) if path.is_file()]
    found = found[:1] or sorted(path for path in folder.glob("tok*.bin") if path != source)
    if len(found) != 1:
        rule = "must be given: " + (
            f"beside the weights lie {', '.join(path.name for path in found)}"
            if found
            else f"neither tokenizer.json nor tok*.bin is in {folder}"
        )
        raise ConfigError(Problem("--tokenizer", rule))
    return found[0]
