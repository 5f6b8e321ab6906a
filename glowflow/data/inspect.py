"""What ``glowflow data list | inspect | verify`` show: plain dictionaries that print as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.catalogue import CATALOGUE, availability, cache_root
from glowflow.data.manifest import Manifest, file_sha256
from glowflow.data.media_facts import media_facts
from glowflow.data.shards import read_tokens

__all__ = ["check_index", "inspect_dataset", "list_datasets", "verify_dataset"]

_SAMPLE_CHARS = 400


def list_datasets(config: DataConfig | None = None) -> list[dict[str, Any]]:
    """Every catalogue entry: name, licence, default tokenizer, whether and where it is available, builds."""
    config = config or DataConfig()
    rows = []
    for entry in CATALOGUE.values():
        builds = sorted((cache_root(config) / "built").glob(f"{entry.name}-*/manifest.json"))
        rows.append(
            {
                "name": entry.name,
                "description": entry.description,
                "licence": entry.licence,
                "tokenizer": entry.tokenizer,
                **availability(entry, config),
                "built": [str(path.parent) for path in builds],
            }
        )
    return rows


def inspect_dataset(path: str | Path, samples: int = 3) -> dict[str, Any]:
    """Counts, tokenizer, splits and the beginning of some rows, decoded from their tokens; with media, their facts.

    Raises:
        DataError: there is no valid manifest, or a sampled shard can not be read.
    """
    manifest = Manifest.load(path)
    tokenizer = manifest.tokenizer()
    return {
        "name": manifest.name,
        "path": str(manifest.root),
        "fingerprint": manifest.fingerprint,
        "index_only": manifest.index_only,
        "token_dtype": manifest.token_dtype,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "fingerprint": manifest.tokenizer_fingerprint,
        },
        "source": manifest.source,
        "splits": {name: _split_facts(manifest, name) for name in manifest.splits},
        "samples": {name: _samples(manifest, name, samples) for name in manifest.splits} if samples else {},
        **({"media": media_facts(manifest)} if manifest.media else {}),
    }


def _split_facts(manifest: Manifest, name: str) -> dict[str, Any]:
    split = manifest.splits[name]
    return {
        "documents": split.documents,
        "rows": split.rows,
        "tokens": split.tokens,
        "text_bytes": split.text_bytes,
        "bytes_per_token": split.text_bytes / split.tokens if split.tokens else None,
        "shards": len(split.shards),
        "shard_bytes": sum(shard.bytes for shard in split.shards),
        "row_groups": sum(len(shard.row_groups) for shard in split.shards),
    }


def _samples(manifest: Manifest, split: str, count: int) -> list[dict[str, Any]]:
    """The first rows of the split."""
    tokenizer = manifest.tokenizer()
    # Of a sample with media the tokens around it are left out: some tokenizers show them as text.
    outer = 1 if manifest.media else 0
    found: list[dict[str, Any]] = []
    for shard_index, shard in enumerate(manifest.splits[split].shards):
        for row_group in range(len(shard.row_groups)):
            tokens, lengths, documents = read_tokens(manifest, split, shard_index, row_group)
            start = 0
            for length, document in zip(lengths.tolist(), documents.tolist(), strict=True):
                end = start + min(length - outer, _SAMPLE_CHARS)
                text = tokenizer.decode(tokens[start + outer : end])[:_SAMPLE_CHARS]
                found.append({"document_id": document, "num_tokens": length, "text": text})
                start += length
                if len(found) == count:
                    return found
    return found


def verify_dataset(path: str | Path, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Read every byte of a built data set and compare it with the manifest.

    Args:
        path: the directory or its manifest.json.
        progress: called with the size of each shard when it has been read.

    Returns:
        name, path, ok, shards, bytes, and problems as a list of texts.

    Raises:
        DataError: there is no valid manifest.
    """
    manifest = Manifest.load(path)
    problems = [*manifest.check("hash", progress), *check_index(manifest, "hash"), *_check_spec(manifest)]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return {
        "name": manifest.name,
        "path": str(manifest.root),
        "ok": not problems,
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "problems": [str(problem) for problem in problems],
    }


def check_index(manifest: Manifest, how: Literal["size", "hash"]) -> list[Problem]:
    """Compare the length indexes of an index-only data set with what the manifest says."""
    problems = []
    for index in manifest.source.get("index", {}).values():
        path = manifest.root / index["path"]
        try:
            damaged = path.stat().st_size != index["bytes"] or (how == "hash" and file_sha256(path) != index["sha256"])
        except OSError as error:
            problems.append(Problem(str(path), f"the index cannot be read: {error.strerror or error}"))
            continue
        if damaged:
            problems.append(
                Problem(str(path), "the index is not the one that the manifest names", hint="build it again")
            )
    return problems


def _check_spec(manifest: Manifest) -> list[Problem]:
    try:
        found = manifest.tokenizer().fingerprint
    except DataError as error:
        return list(error.problems)
    if found != manifest.tokenizer_fingerprint:
        rule = f"must have the fingerprint {manifest.tokenizer_fingerprint} that the manifest names"
        return [Problem(f"{manifest.path}: tokenizer", rule, found)]
    return []
