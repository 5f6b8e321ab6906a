"""The manifest of a built data set: which shards there are, how many tokens each row group holds, and their hashes.

A plan reads only these counts, so sequence numbers and look-ups need no data file. One directory holds one
``manifest.json`` and, beside or below it, the Parquet shards that it names by relative path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glowflow.config.errors import DataError, Problem

if TYPE_CHECKING:
    from glowflow.data.processors.text import Tokenizer

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "RowGroupInfo",
    "ShardInfo",
    "SplitInfo",
    "file_sha256",
    "narrowest_dtype",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
TOKEN_DTYPES = ("uint8", "uint16", "uint32")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RowGroupInfo:
    """One Parquet row group: its rows, the sum of their ``num_tokens``, and the bytes of their media."""

    rows: int
    tokens: int
    media_bytes: int = 0


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file; ``path`` is relative to the directory of the manifest, with forward slashes."""

    path: str
    bytes: int
    sha256: str
    rows: int
    tokens: int
    row_groups: list[RowGroupInfo]


@dataclass(frozen=True)
class SplitInfo:
    """One split: its shards in order, and totals (``text_bytes``: UTF-8 bytes of its documents)."""

    shards: list[ShardInfo]
    rows: int
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``root`` is the directory that holds it and is not written.

    Args:
        name: name of the data set.
        root: directory of manifest.json; shard paths are relative to it.
        tokenizer: complete spec of the tokenizer, enough to rebuild it.
        tokenizer_fingerprint: its fingerprint; sources that are mixed must agree on it.
        token_dtype: unsigned type of the column ``tokens``.
        splits: split name -> shards and totals.
        source: origin, licence, counts, skipped files.
        media: what samples there are, their labels, what was bad (empty for text).
        index_only: the shards are somebody else's Parquet files that stay untouched.
    """

    name: str
    root: Path
    tokenizer_spec: dict[str, Any]
    tokenizer_fingerprint: str
    token_dtype: str
    splits: dict[str, SplitInfo]
    source: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)
    index_only: bool = False
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest from its file or from the directory that holds it.

        Raises:
            DataError: it is missing, no JSON, of another schema version, or inconsistent (all problems at once).
        """
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / MANIFEST_NAME
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = "build the data set with `glowflow data build SOURCE OUT`"
            raise DataError(Problem(str(file), "the manifest does not exist", hint=hint)) from None
        except (OSError, ValueError) as error:
            raise DataError(Problem(str(file), f"the manifest cannot be read: {error}")) from error
        return cls.from_dict(content, file.parent.absolute(), key=str(file))

    @classmethod
    def from_dict(cls, content: Any, root: Path, *, key: str = MANIFEST_NAME) -> Manifest:
        """Build a manifest from parsed JSON; ``key`` names it in errors.

        Raises:
            DataError: a field is missing or of the wrong type, or counts do not add up.
        """
        if not isinstance(content, Mapping):
            raise DataError(Problem(key, "the manifest must be a JSON object", content))
        if content.get("schema_version") != SCHEMA_VERSION:
            hint = "build the data set again with this version of GlowFlow"
            version = content.get("schema_version", "nothing")
            raise DataError(Problem(f"{key}: schema_version", f"must be {SCHEMA_VERSION}", version, hint))
        manifest = cls._parse(content, root, key)
        problems = _inconsistencies(manifest, key)
        if problems:
            raise DataError(problems, title="invalid manifest")
        return manifest

    @classmethod
    def _parse(cls, content: Mapping[str, Any], root: Path, key: str) -> Manifest:
        try:
            return cls(
                name=str(content["name"]),
                root=root,
                tokenizer_spec=dict(content["tokenizer"]),
                tokenizer_fingerprint=str(content["tokenizer_fingerprint"]),
                token_dtype=str(content["token_dtype"]),
                splits={str(name): _split(value) for name, value in content["splits"].items()},
                source=dict(content.get("source", {})),
                media=dict(content.get("media", {})),
                index_only=bool(content.get("index_only", False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"lacks the field {error}" if isinstance(error, KeyError) else f"has a malformed field: {error}"
            raise DataError(Problem(key, f"the manifest {reason}")) from error

    def to_dict(self) -> dict[str, Any]:
        """The JSON content, without ``root``."""
        content = asdict(self)
        del content["root"]
        content["tokenizer"] = content.pop("tokenizer_spec")
        for split in content["splits"].values():
            for shard in split["shards"]:
                for group in shard["row_groups"]:
                    if not group["media_bytes"]:  # manifests of text know nothing of media
                        del group["media_bytes"]
        return content

    def save(self) -> Path:
        """Write ``root/manifest.json`` atomically: it is there completely, or not at all."""
        self.root.mkdir(parents=True, exist_ok=True)
        target = self.root / MANIFEST_NAME
        partial = self.root / f".{MANIFEST_NAME}.{os.getpid()}.partial"
        try:
            with partial.open("w", encoding="utf-8") as stream:
                json.dump(self.to_dict(), stream, indent=1, sort_keys=True, ensure_ascii=False)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON content; the place where it lies does not matter."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def path(self) -> Path:
        """The file ``manifest.json``."""
        return self.root / MANIFEST_NAME

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, rebuilt from its spec."""
        from glowflow.data.processors.text import tokenizer_from_spec

        return tokenizer_from_spec(self.tokenizer_spec)

    def shard_path(self, shard: ShardInfo) -> Path:
        """Where a shard lies."""
        return self.root / shard.path

    def split(self, name: str) -> SplitInfo:
        """One split.

        Raises:
            DataError: there is none of that name.
        """
        if name not in self.splits:
            hint = f"splits of {self.name}: {', '.join(sorted(self.splits)) or 'none'}"
            raise DataError(Problem(str(self.path), "the data set has no such split", name, hint))
        return self.splits[name]

    def check(
        self, how: Literal["size", "hash"] = "size", progress: Callable[[int], None] | None = None
    ) -> list[Problem]:
        """Compare the shards on disk with the manifest.

        Args:
            how: ``size`` looks at file sizes only; ``hash`` reads every byte.
            progress: called with the number of bytes of each shard once it has been checked.

        Returns:
            All problems found; an empty list when the data set is whole.
        """
        problems = []
        for split in self.splits.values():
            for shard in split.shards:
                problem = _check_shard(self.shard_path(shard), shard, how)
                if problem is not None:
                    problems.append(problem)
                if progress is not None:
                    progress(shard.bytes)
        return problems


def narrowest_dtype(vocab_size: int) -> str:
    """The narrowest unsigned type that holds the ids 0..vocab_size-1."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _split(value: Mapping[str, Any]) -> SplitInfo:
    return SplitInfo(
        shards=[_shard(shard) for shard in value["shards"]],
        rows=_count(value, "rows"),
        documents=_count(value, "documents"),
        tokens=_count(value, "tokens"),
        text_bytes=_count(value, "text_bytes"),
    )


def _shard(value: Mapping[str, Any]) -> ShardInfo:
    return ShardInfo(
        path=str(value["path"]),
        bytes=_count(value, "bytes"),
        sha256=str(value["sha256"]),
        rows=_count(value, "rows"),
        tokens=_count(value, "tokens"),
        row_groups=[
            RowGroupInfo(
                _count(group, "rows"),
                _count(group, "tokens"),
                _count(group, "media_bytes") if "media_bytes" in group else 0,
            )
            for group in value["row_groups"]
        ],
    )


def _count(value: Mapping[str, Any], name: str) -> int:
    number = value[name]
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"`{name}` must be a count, it is {number!r}")
    return number


def _inconsistencies(manifest: Manifest, key: str) -> list[Problem]:
    """What no manifest that we wrote can contain: a hand-edited or damaged file."""
    problems = []
    if manifest.token_dtype not in TOKEN_DTYPES:
        problems.append(
            Problem(f"{key}: token_dtype", f"must be one of {', '.join(TOKEN_DTYPES)}", manifest.token_dtype)
        )
    for name, split in manifest.splits.items():
        where = f"{key}: splits.{name}"
        for total in ("rows", "tokens"):
            summed = sum(getattr(shard, total) for shard in split.shards)
            if summed != getattr(split, total):
                problems.append(
                    Problem(f"{where}.{total}", f"must be the sum over the shards, {summed}", getattr(split, total))
                )
        for shard in split.shards:
            problems += _shard_inconsistencies(shard, f"{where}: {shard.path}")
    return problems


def _shard_inconsistencies(shard: ShardInfo, where: str) -> list[Problem]:
    problems = []
    for total in ("rows", "tokens"):
        summed = sum(getattr(group, total) for group in shard.row_groups)
        if summed != getattr(shard, total):
            problems.append(
                Problem(f"{where}: {total}", f"must be the sum over the row groups, {summed}", getattr(shard, total))
            )
    if any(group.tokens < group.rows for group in shard.row_groups):
        problems.append(
            Problem(where, "a row holds at least one token, so tokens must be at least rows in every row group")
        )
    if not _SHA256.fullmatch(shard.sha256):
        problems.append(Problem(f"{where}: sha256", "must be 64 hexadecimal digits", shard.sha256))
    return problems


def _check_shard(path: Path, shard: ShardInfo, how: str) -> Problem | None:
    hint = "build the data set again"
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return Problem(str(path), f"must have {shard.bytes} bytes as the manifest says", size, hint)
        if how == "hash" and (found := file_sha256(path)) != shard.sha256:
            return Problem(str(path), f"must have the sha256 {shard.sha256} as the manifest says", found, hint)
    except OSError as error:
        return Problem(str(path), f"the shard cannot be read: {error.strerror or error}", hint=hint)
    return None
