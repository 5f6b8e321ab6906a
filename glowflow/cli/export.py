"""``glowflow export``: a checkpoint becomes one file of ours, a Hugging Face folder, or a file of llama2.c."""

from __future__ import annotations

from pathlib import Path

import click

from glowflow.cli.output import note
from glowflow.config.errors import ConfigError, Problem

__all__ = ["export"]

_DEFAULT = "file"
_storage = click.option("--storage", default="runs", show_default=True, help="Directory of the run directories.")


class _Formats(click.Group):
    """Formats by name; without one, arguments are those of the default: ``glowflow export CHECKPOINT FILE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Formats)
def export() -> None:
    """Write CHECKPOINT (a run, a checkpoint directory or an exported file) in another form.

    `glowflow export CHECKPOINT FILE` writes one .pt or .safetensors file with weights, config and tokenizer.
    """


@export.command(name=_DEFAULT)
@click.argument("checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@_storage
def to_file(checkpoint: str, file: Path, storage: str) -> None:
    """Write CHECKPOINT to FILE (.pt or .safetensors); what `glowflow export CHECKPOINT FILE` does."""
    from glowflow.evaluation.load import export_target

    if file.suffix not in (".pt", ".safetensors"):
        hint = "`glowflow export hf` and `glowflow export llama2c` write the formats of others"
        raise ConfigError(Problem("FILE", "must end in .pt or .safetensors", str(file), hint))
    export_target(checkpoint, storage, file)
    note(f"wrote {file}")


@export.command(name="hf")
@click.argument("checkpoint")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@_storage
def to_huggingface(checkpoint: str, folder: Path, dtype: str, storage: str) -> None:
    """Write CHECKPOINT as DIR, a Llama (Mistral, Qwen2) or GPT-2 folder of Hugging Face's transformers."""
    from glowflow.core.conversion.huggingface import write_huggingface
    from glowflow.data.processors.text import tokenizer_from_spec
    from glowflow.evaluation.load import load_target

    loaded = load_target(checkpoint, storage)
    tokenizer = tokenizer_from_spec(loaded.tokenizer_spec)
    write_huggingface(
        folder,
        loaded.config.model,
        loaded.config.data.context,
        loaded.module.state_dict(),
        dtype=dtype,
        special_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
        files=tokenizer.files(),
    )
    if "tokenizer.json" not in tokenizer.files():
        note(f"no tokenizer.json: transformers has no tokenizer like {tokenizer.name}")
    note(f"wrote {folder}")


@export.command(name="llama2c")
@click.argument("checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--version", type=click.Choice(["0", "1"]), default="0", show_default=True, help="0: what run.c reads.")
@_storage
def to_llama2c(checkpoint: str, file: Path, version: str, storage: str) -> None:
    """Write the weights of CHECKPOINT to FILE as llama2.c reads them."""
    from glowflow.core.conversion.llama2c import write_llama2c
    from glowflow.evaluation.load import load_target

    loaded = load_target(checkpoint, storage)
    config = loaded.config
    write_llama2c(file, config.model, config.data.context, loaded.module.state_dict(), int(version))
    note(f"wrote {file}")
