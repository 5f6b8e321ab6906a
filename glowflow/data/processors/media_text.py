"""The tokenizer of data with media: an ordinary one, and one token each for ``<image>`` and ``<audio>``.

Plain text is encoded as by the tokenizer inside: a literal ``<image>`` in it is text like any other. Only
``encode_sample`` takes placeholders for media; one placeholder is one token, however many places the medium gets in
the sequence of a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES, PLACEHOLDERS
from glowflow.data.processors.text import Ids, Tokenizer, tokenizer_from_spec

__all__ = ["MEDIA_TOKENS", "MediaTokenizer", "count_placeholders", "media_tokenizer_from_spec", "split_placeholders"]

MEDIA_TOKENS = tuple(PLACEHOLDERS[name] for name in MODALITIES)
_PLACEHOLDER = re.compile("(" + "|".join(re.escape(token) for token in MEDIA_TOKENS) + ")")


def split_placeholders(text: str) -> list[str]:
    """A text as its parts, placeholders and what lies between them, in order; their concatenation is the text."""
    return [part for part in _PLACEHOLDER.split(text) if part]


def count_placeholders(text: str) -> dict[str, int]:
    """Number of placeholders of each modality."""
    found = _PLACEHOLDER.findall(text)
    return {name: found.count(PLACEHOLDERS[name]) for name in MODALITIES}


class MediaTokenizer(Tokenizer):
    """A tokenizer with one more token for each modality, behind its own vocabulary; ``<image>`` is the first.

    Documents always end with a token here: with the base's own where it has one, else with the one that starts them.

    Args:
        base: what encodes the text.
    """

    kind = "media"

    def __init__(self, base: Tokenizer) -> None:
        if isinstance(base, MediaTokenizer):
            raise DataError(Problem("tokenizer.base", "has tokens for media already"))
        self.base = base
        self.vocab_size = base.vocab_size + len(MEDIA_TOKENS)
        self.bos_id = base.bos_id
        self.eos_id = base.bos_id if base.eos_id is None else base.eos_id
        self.unk_id: int | None = getattr(base, "unk_id", None)
        self.media_ids = {token: base.vocab_size + index for index, token in enumerate(MEDIA_TOKENS)}

    @property
    def name(self) -> str:
        return self.base.name

    def encode(self, text: str) -> Ids:
        return self.base.encode(text).astype(self.dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [ids.astype(self.dtype) for ids in self.base.encode_batch(texts)]

    def encode_pieces(self, texts: Sequence[str], firsts: Sequence[bool]) -> list[Ids]:
        return [ids.astype(self.dtype) for ids in self.base.encode_pieces(texts, firsts)]

    def encode_sample(self, text: str) -> Ids:
        """The ids of a text, (N,), in which placeholders stand for media: one id each."""
        parts = [
            np.array([self.media_ids[part]], self.dtype)
            if part in self.media_ids
            else self.encode_pieces([part], [number == 0])[0]
            for number, part in enumerate(split_placeholders(text))
        ]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of some ids, with the placeholders of media."""
        values = np.asarray(ids, np.int64)
        is_media = (values >= self.base.vocab_size) & (values < self.vocab_size)
        parts, start = [], 0
        for position in [*np.flatnonzero(is_media).tolist(), len(values)]:
            if position > start:
                parts.append(self.base.decode(values[start:position]))
            if position < len(values):
                parts.append(MEDIA_TOKENS[int(values[position]) - self.base.vocab_size])
            start = position + 1
        # Words are written with spaces between them, which are no tokens of their own.
        return (" " if self.base.kind == "words" else "").join(part for part in parts if part)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": self.base.spec(),
            "media": list(MEDIA_TOKENS),
            "vocab_size": self.vocab_size,
        }

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        widths = self.base.token_bytes()
        return None if widths is None else np.append(widths, np.zeros(len(MEDIA_TOKENS), np.int32))


def media_tokenizer_from_spec(spec: dict[str, Any]) -> MediaTokenizer:
    """Rebuild it from its spec.

    Raises:
        DataError: it was made for other modalities, or its base has another size.
    """
    tokenizer = MediaTokenizer(tokenizer_from_spec(spec["base"]))
    if list(spec["media"]) != list(MEDIA_TOKENS):
        raise DataError(Problem("tokenizer.media", f"must be {', '.join(MEDIA_TOKENS)}", spec["media"]))
    if spec["vocab_size"] != tokenizer.vocab_size:
        rule = f"must be {tokenizer.vocab_size}, the base and its media"
        raise DataError(Problem("tokenizer.vocab_size", rule, spec["vocab_size"]))
    return tokenizer
