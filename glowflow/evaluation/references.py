"""What a data set with media says its samples' texts are: what generated texts are compared with.

The text of a shard is prompt and answer in one. Tokens say where the answer begins; where they lost a word (it is not
in the vocabulary), the words come from the text, so that nothing is right for having said ``<unk>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glowflow.data.manifest import Manifest
from glowflow.data.processors.text import Tokenizer
from glowflow.data.shards import read_rows

__all__ = ["Reference", "answer_text", "read_references"]

_COLUMNS = ["document_id", "text", "tokens", "num_prompt", "group", "bad"]


@dataclass(frozen=True)
class Reference:
    """One sample of a split.

    Args:
        document: its number in the data set.
        group: what it belongs to; None: to nothing but itself.
        answer: its text without the prompt.
    """

    document: int
    group: str | None
    answer: str


def read_references(manifest: Manifest, split: str) -> Iterator[Reference]:
    """All samples of a split but the bad ones, in the order of the shards; no media are read.

    Raises:
        DataError: a shard is missing or damaged.
    """
    tokenizer = manifest.tokenizer()
    for index, shard in enumerate(manifest.split(split).shards):
        for group in range(len(shard.row_groups)):
            table = read_rows(manifest, split, index, group, _COLUMNS)
            for row in table.to_pylist():
                if row["bad"] is None:
                    tokens = np.array(row["tokens"], np.int64)
                    answer = answer_text(row["text"], tokens, row["num_prompt"], tokenizer)
                    yield Reference(row["document_id"], row["group"], answer)


def answer_text(text: str, tokens: NDArray[Any] | Sequence[int], num_prompt: int, tokenizer: Tokenizer) -> str:
    """The part of a sample's text behind its prompt, without spaces around it.

    Args:
        text: prompt and answer.
        tokens: [bos] + prompt + answer + [eos].
        num_prompt: how many of them are bos and prompt; media that follow at once belong to the prompt too.
    """
    media = set(getattr(tokenizer, "media_ids", {}).values())
    while num_prompt < len(tokens) - 1 and int(tokens[num_prompt]) in media:
        num_prompt += 1
    ids = np.asarray(tokens, np.int64)
    prompt, answer = ids[1:num_prompt], ids[num_prompt:-1]
    unknown: int | None = getattr(tokenizer, "unk_id", None)
    if unknown is not None and bool((answer == unknown).any()):
        return _behind_prompt(text, prompt, answer, tokenizer).strip()
    return tokenizer.decode(answer).strip()


def _behind_prompt(text: str, prompt: NDArray[Any], answer: NDArray[Any], tokenizer: Tokenizer) -> str:
    """The part of the text whose tokens are those of the answer, behind a part whose tokens are the prompt's."""
    encode: Any = getattr(tokenizer, "encode_sample", tokenizer.encode)
    for place in range(len(text) + 1):
        if np.array_equal(encode(text[:place]), prompt) and np.array_equal(encode(text[place:]), answer):
            return text[place:]
    return text  # no place divides the tokens as they are: compare with all of it
