"""The catalogue's entries of text."""

from __future__ import annotations

from dataclasses import replace

from glowflow.data.datasets.entry import Entry
from glowflow.data.datasets.layout import contiguous, held_out
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.datasets.wikitext import article_starts

__all__ = ["TEXT_ENTRIES"]


def _wikitext_layout(files: dict[str, FileFacts]) -> dict[str, list[Extent]]:
    """Documents are articles; their ids go on over the splits."""
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for split, facts in files.items():
        starts = article_starts(facts.path)
        extents = []
        for start, end in zip(starts, [*starts[1:], facts.bytes], strict=True):
            extents.append(Extent(facts.path, facts.name, "text", start, end, document_id, end - start))
            document_id += 1
        splits[split] = extents
    return splits


def _shakespeare_layout(files: dict[str, FileFacts]) -> dict[str, list[Extent]]:
    return contiguous(files["train"])


def _shakespeare_tune_layout(files: dict[str, FileFacts]) -> dict[str, list[Extent]]:
    return held_out(files["train"])


def _wikitext(name: str, size: str, vocabulary: int) -> Entry:
    return Entry(
        name=name,
        description=f"Wikipedia articles, word level with <unk>, {size} training tokens (arXiv:1609.07843)",
        licence="CC BY-SA 3.0",
        tokenizer="words",
        files={
            "train": ("train.txt", "wiki.train.tokens"),
            "validation": ("valid.txt", "validation.txt", "wiki.valid.tokens"),
            "test": ("test.txt", "wiki.test.tokens"),
        },
        folders=(f"datasets/Salesforce/wikitext/{name}-v1",),
        lines=True,
        layout=_wikitext_layout,
        vocabulary=vocabulary,
    )


_SHAKESPEARE = "datasets/karpathy/tiny_shakespeare"
_TINYSHAKESPEARE = Entry(
    name="tinyshakespeare",
    description="1.1 million characters of Shakespeare, 90/10 by characters as in nanoGPT",
    licence="public domain",
    tokenizer="chars",
    files={"train": ("input.txt",)},
    # The converted files lie in a pull request's commit and in the branch that the hub keeps for every data set.
    folders=(
        f"{_SHAKESPEARE}/data",
        f"{_SHAKESPEARE}@6fa1fd1127e424cd6f68d48df00814d5b1b034c4/data",
        f"{_SHAKESPEARE}@refs/convert/parquet/default",
    ),
    lines=False,
    layout=_shakespeare_layout,
    vocabulary=65 + 2,
)
TEXT_ENTRIES = (
    Entry(
        name="python-stdlib",
        description="sources of the standard library of the Python that runs GlowFlow; on every machine, split by file",
        licence="Python Software Foundation License 2.0",
        tokenizer="bpe:4096",
        files={},
        folders=(),
        lines=False,
    ),
    _TINYSHAKESPEARE,
    replace(
        _TINYSHAKESPEARE,
        name="tinyshakespeare-tune",
        description="the training part of tinyshakespeare, 90/10 again: to choose settings without its validation part",
        layout=_shakespeare_tune_layout,
        home="tinyshakespeare",
    ),
    _wikitext("wikitext-2", "2.1 million", 33_278),
    _wikitext("wikitext-103", "103 million", 267_735),
)
