"""Tokenizers: text in, token ids in the narrowest unsigned type out; each is rebuilt exactly from its JSON-able spec.

Four kinds are trained here: ``bytes``, ``chars``, ``words`` (for comparison with published word-level tables) and
``bpe``; others come as files (a tokenizer.json, or ``llama2c.py``'s tokenizer.bin). Data sets carry the whole spec, so
a manifest or checkpoint alone is enough to read and write text. A document is encoded as [bos] + tokens (+ [eos]): the
first real token is then a target too.
"""

from __future__ import annotations

import base64
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from glowflow.config.errors import DataError, Problem

__all__ = [
    "DEFAULT_BPE_VOCAB",
    "END_OF_TEXT",
    "KINDS",
    "UNKNOWN",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer_file",
    "parse_request",
    "spec_fingerprint",
    "tokenizer_from_spec",
    "train_tokenizer",
]

Ids = npt.NDArray[Any]  # one-dimensional, unsigned, of the tokenizer's dtype

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
DEFAULT_BPE_VOCAB = 4096
KINDS = ("bytes", "chars", "words", "bpe")
# Names under which a foreign tokenizer.json keeps its document boundary, in order of preference.
_BOUNDARIES = (END_OF_TEXT, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "</s>", "<|end_of_text|>", "[CLS]")


def spec_fingerprint(spec: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a spec."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Tokenizer(ABC):
    """Turns text into ids and back.

    ``bos_id`` starts every document; ``eos_id`` ends it where the tokenizer has one. Special tokens stand for no
    text: ``decode`` leaves them out.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int
    eos_id: int | None

    @property
    def name(self) -> str:
        """The name to show: the kind, and the vocabulary size where it was chosen."""
        return self.kind

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id."""
        return np.dtype(
            np.uint8 if self.vocab_size <= 1 << 8 else np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical spec: equal exactly when the tokenizers are."""
        return spec_fingerprint(self.spec())

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of a text, (N,), without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of some ids; special tokens are left out, ids that form no valid text give U+FFFD."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """A JSON-able description that is enough to rebuild the tokenizer."""

    def files(self) -> dict[str, bytes]:
        """The files, by name, in which other programs take this tokenizer; empty where there are none."""
        return {}

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of several texts; equal to encoding one by one."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, texts: Sequence[str], firsts: Sequence[bool]) -> list[Ids]:
        """The ids of pieces of documents; ``firsts`` says which begin one, for tokenizers to which that matters."""
        return self.encode_batch(texts)

    def encode_document(self, text: str) -> Ids:
        """[bos] + ids (+ [eos])."""
        ends = [] if self.eos_id is None else [self.eos_id]
        return np.concatenate([np.array([self.bos_id], self.dtype), self.encode(text), np.array(ends, self.dtype)])

    def num_bytes(self, text: str) -> int:
        """UTF-8 bytes of a text, the denominator of bits per byte."""
        return len(text.encode("utf-8"))

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """How many UTF-8 bytes each id stands for, (V,), 0 for special tokens; None where that is not exact."""
        return None


class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8, and ``<|endoftext|>`` around documents."""

    kind = "bytes"
    vocab_size = 257
    bos_id = 256
    eos_id = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        values = np.asarray(ids, np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def token_bytes(self) -> npt.NDArray[np.int32]:
        return np.array([1] * 256 + [0], np.int32)


class CharTokenizer(Tokenizer):
    """The sorted characters of the training split, then ``<|endoftext|>`` (starts a document) and ``<unk>``."""

    kind = "chars"
    eos_id = None

    def __init__(self, chars: str) -> None:
        self.chars = "".join(sorted(set(chars)))
        self._points = np.frombuffer(self.chars.encode("utf-32-le"), "<u4")
        self.bos_id = len(self.chars)
        self.unk_id = self.bos_id + 1
        self.vocab_size = self.bos_id + 2
        # One table look-up per character; every code point past the last known one shares the last entry.
        last = int(self._points[-1]) if len(self._points) else 0
        self._table = np.full(last + 2, self.unk_id, self.dtype)
        self._table[self._points] = np.arange(len(self._points), dtype=self.dtype)

    def encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return self._table[np.minimum(points, len(self._table) - 1)]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        values = np.asarray(ids, np.int64)
        values = values[(values >= 0) & (values != self.bos_id)]
        known = np.append(self._points, np.uint32(0xFFFD))
        return known[np.minimum(values, len(self._points))].astype("<u4").tobytes().decode("utf-32-le")

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars}

    def token_bytes(self) -> npt.NDArray[np.int32]:
        # <unk> stands for a character whose width is not known: at least one byte.
        return np.array([len(char.encode("utf-8")) for char in self.chars] + [0, 1], np.int32)


class WordTokenizer(Tokenizer):
    """Whitespace-separated words; a newline is the word ``<eos>``, an unknown word ``<unk>``.

    As in the published WikiText tables: ``<eos>`` counts as a token and none is added at the end of a document.
    ``<eos>`` also starts every document.
    """

    kind = "words"
    eos_id = None

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words) or not {END_OF_LINE, UNKNOWN} <= self._ids.keys():
            rule = f"the words must be distinct and contain {END_OF_LINE} and {UNKNOWN}"
            raise DataError(Problem("tokenizer.words", rule))
        self.vocab_size = len(self.words)
        self.bos_id = self._ids[END_OF_LINE]
        self.unk_id = self._ids[UNKNOWN]

    def encode(self, text: str) -> Ids:
        words = text.replace("\n", f" {END_OF_LINE} ").split()
        get, unknown = self._ids.get, self.unk_id
        return np.fromiter((get(word, unknown) for word in words), self.dtype, len(words))

    def decode(self, ids: Sequence[int] | Ids) -> str:
        size = self.vocab_size
        words = (self.words[i] if 0 <= i < size else UNKNOWN for i in np.asarray(ids, np.int64).tolist())
        return " ".join("\n" if word == END_OF_LINE else word for word in words)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "words": self.words}


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding through the library ``tokenizers``: trained here, or any tokenizer.json.

    Args:
        content: the text of a tokenizer.json.
        requested: the vocabulary size that was asked for when it was trained here.
    """

    kind = "bpe"

    def __init__(self, content: str, requested: int | None = None) -> None:
        self._engine = _engine(content)
        self.content = content
        self.requested = requested
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        boundaries = [name for name in _BOUNDARIES if name in vocabulary]
        if not boundaries:
            rule = f"has no token that could start a document; one of these is needed: {', '.join(_BOUNDARIES)}"
            raise DataError(Problem("data.tokenizer", f"the tokenizer {rule}"))
        ends = [name for name in (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]") if name in vocabulary]
        self.bos_id = vocabulary[boundaries[0]]
        self.eos_id = vocabulary[ends[0]] if ends else None
        self.vocab_size = max(vocabulary.values()) + 1

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.requested or self.vocab_size}"

    def encode(self, text: str) -> Ids:
        return np.array(self._engine.encode(text, add_special_tokens=False).ids, self.dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        values = [i for i in np.asarray(ids, np.int64).tolist() if 0 <= i < self.vocab_size]
        return str(self._engine.decode(values, skip_special_tokens=True))

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.requested or self.vocab_size, "tokenizer_json": self.content}

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, and the few lines with which ``transformers`` loads it."""
        names = {"bos_token": self._engine.id_to_token(self.bos_id)}
        if self.eos_id is not None:
            names["eos_token"] = self._engine.id_to_token(self.eos_id)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        return {
            "tokenizer.json": self.content.encode("utf-8"),
            "tokenizer_config.json": (json.dumps(described, indent=2) + "\n").encode("utf-8"),
        }

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """Exact for byte-level models, whose tokens write each byte as one character."""
        decoder = json.loads(self.content).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        widths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._engine.get_vocab(with_added_tokens=False).items():
            widths[index] = len(token)
        for index in self._engine.get_added_tokens_decoder():
            widths[index] = 0
        return widths


def _engine(content: str) -> Any:
    """The ``tokenizers`` object of a tokenizer.json; truncation, padding and special tokens in the text are off."""
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(Problem("data.tokenizer", f"is no valid tokenizer.json: {error}")) from error
    engine.no_truncation()
    engine.no_padding()
    # "<|endoftext|>" inside a document is text like any other: a file can not forge a document boundary.
    engine.encode_special_tokens = True
    return engine


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what ``spec()`` gave.

    Raises:
        DataError: the spec is of an unknown kind or incomplete.
    """
    try:
        kind = spec["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "chars":
            return CharTokenizer(spec["chars"])
        if kind == "words":
            return WordTokenizer(spec["words"])
        if kind == "bpe":
            return BpeTokenizer(spec["tokenizer_json"], spec.get("vocab_size"))
        if kind == "llama2c":
            return _llama2c(base64.b64decode(spec["tokenizer_bin"]))
        if kind == "media":
            return _media(spec)
    except KeyError as error:
        raise DataError(Problem("tokenizer", f"the spec lacks the field {error}")) from error
    raise DataError(Problem("tokenizer.kind", f"must be one of {', '.join(KINDS)}, llama2c, media", kind))


def _llama2c(content: bytes) -> Tokenizer:
    from glowflow.data.processors.llama2c import Llama2cTokenizer

    return Llama2cTokenizer(content)


def _media(spec: Mapping[str, Any]) -> Tokenizer:
    from glowflow.data.processors.media_text import media_tokenizer_from_spec

    return media_tokenizer_from_spec(dict(spec))


def parse_request(request: str) -> tuple[str, int | None, Path | None]:
    """Understand ``data.tokenizer``: (kind, vocabulary size, path of a tokenizer's file).

    Raises:
        DataError: neither a kind, ``KIND:SIZE`` nor a file that exists.
    """
    kind, _, size = request.partition(":")
    if kind in KINDS and not size and not request.endswith(":"):
        return kind, None, None
    if kind in ("bpe", "words") and size.isdecimal():
        smallest = 257 if kind == "bpe" else 2
        if int(size) < smallest:
            raise DataError(
                Problem("data.tokenizer", f"the vocabulary size of {kind} must be at least {smallest}", request)
            )
        return kind, int(size), None
    path = Path(request).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return ("llama2c" if path.suffix == ".bin" else "bpe"), None, path
    hint = "give auto, bytes, chars, words, words:SIZE, bpe, bpe:SIZE or the path of a tokenizer.json or tokenizer.bin"
    raise DataError(Problem("data.tokenizer", "is neither a kind of tokenizer nor a file", request, hint))


def load_tokenizer_file(path: Path) -> Tokenizer:
    """A tokenizer.bin of llama2.c, or a tokenizer.json of the Hugging Face library.

    To a tokenizer.json without a document boundary ``<|endoftext|>`` is added.

    Raises:
        DataError: the file can not be read or is no tokenizer.
    """
    try:
        if path.suffix == ".bin":
            return _llama2c(path.read_bytes())
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("data.tokenizer", f"{path} cannot be read: {error}")) from error
    except DataError as error:
        raise DataError([Problem(str(path), p.rule, p.value, p.hint) for p in error.problems]) from error
    engine = _engine(content)
    if not any(name in engine.get_vocab(with_added_tokens=True) for name in _BOUNDARIES):
        engine.add_special_tokens([END_OF_TEXT])
    return BpeTokenizer(engine.to_str())


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Train a tokenizer on the documents (or pieces of documents) of a training split.

    Args:
        kind: ``bytes``, ``chars``, ``words`` or ``bpe``.
        texts: read once; only ``bytes`` leaves them alone.
        vocab_size: largest vocabulary for ``bpe`` (default 4096) and ``words`` (default: every word).

    Returns:
        The same tokenizer for the same texts, whatever the number of threads.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer("".join(sorted(set().union(*map(set, texts)))))
    if kind == "words":
        return _train_words(texts, vocab_size)
    if kind == "bpe":
        return _train_bpe(texts, vocab_size or DEFAULT_BPE_VOCAB)
    raise DataError(Problem("data.tokenizer", f"must be one of {', '.join(KINDS)}", kind))


def _train_words(texts: Iterable[str], vocab_size: int | None) -> WordTokenizer:
    """Most frequent first, ties in alphabetical order; the two special words are always in."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.replace("\n", f" {END_OF_LINE} ").split())
    specials = [END_OF_LINE, UNKNOWN]
    words = sorted(counts.keys() - set(specials), key=lambda word: (-counts[word], word))
    if vocab_size is not None:
        words = words[: max(0, vocab_size - len(specials))]
    return WordTokenizer(specials + words)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE as in GPT-2; the 256 bytes are always in, so every text can be written."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(iter(texts), trainer)
    return BpeTokenizer(engine.to_str(), vocab_size)
