"""From a path that somebody names to a foreign checkpoint in our terms: which format it is, and what it is not."""

from __future__ import annotations

from pathlib import Path

from glowflow.config.errors import CheckpointError, Problem
from glowflow.core.conversion.huggingface import read_huggingface
from glowflow.core.conversion.layout import Foreign
from glowflow.core.conversion.llama2c import read_llama2c

__all__ = ["read_foreign"]


def read_foreign(source: str | Path) -> Foreign:
    """Read a llama2.c file or a Hugging Face folder.

    Raises:
        CheckpointError: it is neither, damaged, or a model that we have no architecture for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return read_huggingface(path)
    if not path.is_file():
        raise CheckpointError(Problem(str(source), "does not exist"))
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error.strerror or error}")) from error
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        hint = "only safetensors and llama2.c's .bin are read: load it where it was made and save it as safetensors"
        raise CheckpointError(Problem(str(path), "is a pickle of PyTorch or a zip, which may run code", hint=hint))
    if path.suffix == ".json" or start[8:9] == b"{":
        hint = f"give the folder with config.json beside it: {path.parent}"
        raise CheckpointError(Problem(str(path), "is one file of a Hugging Face folder, or of GlowFlow", hint=hint))
    return read_llama2c(path)
