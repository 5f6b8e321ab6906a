"""The tokenizer of a build: trained on the training split, or ready-made; with tokens for media where they are."""

from __future__ import annotations

import logging

from glowflow.data.datasets.source import Source
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import Tokenizer, load_tokenizer_file, parse_request, train_tokenizer
from glowflow.data.sample_build import sample_texts
from glowflow.data.units import training_texts

__all__ = ["BPE_TRAINING_BYTES", "fit_tokenizer", "request_key", "suited_tokenizer"]

logger = logging.getLogger(__name__)

BPE_TRAINING_BYTES = 50_000_000


def request_key(source: Source, request: str) -> str:
    """What stands for a request in the key of a build: a ready tokenizer is told by its fingerprint."""
    kind, size, path = parse_request(source.tokenizer if request == "auto" else request)
    if path is not None:
        return f"fingerprint:{suited_tokenizer(source, load_tokenizer_file(path)).fingerprint}"
    return f"trained:{kind}:{size}"


def suited_tokenizer(source: Source, tokenizer: Tokenizer) -> Tokenizer:
    """A ready-made tokenizer, with tokens for media where the source has samples with media."""
    wrap = source.samples is not None and not isinstance(tokenizer, MediaTokenizer)
    return MediaTokenizer(tokenizer) if wrap else tokenizer


def fit_tokenizer(source: Source, request: str) -> Tokenizer:
    """The tokenizer that a request stands for, trained on the training split (BPE: on at most 50 MB of it).

    Raises:
        DataError: the request is not understood, or its file is no tokenizer.
    """
    kind, size, path = parse_request(source.tokenizer if request == "auto" else request)
    if path is not None:
        return suited_tokenizer(source, load_tokenizer_file(path))
    if kind != "bytes":
        logger.info("training the tokenizer %s on %s", kind if size is None else f"{kind}:{size}", source.name)
    limit = BPE_TRAINING_BYTES if kind == "bpe" else None
    if source.samples is not None:
        return MediaTokenizer(train_tokenizer(kind, sample_texts(source, limit), size))
    return train_tokenizer(kind, training_texts(source, limit), size)
