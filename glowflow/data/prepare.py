"""From the config's data section to checked manifests: what `train`, `eval` and `plan` call before anything else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.config.schema import DataConfig
from glowflow.data.build import BuildOptions, Progress, build, build_key
from glowflow.data.datasets.catalogue import CATALOGUE, cache_root, has_media, is_here, resolve
from glowflow.data.datasets.entry import Entry
from glowflow.data.datasets.source import Source
from glowflow.data.manifest import MANIFEST_NAME, Manifest
from glowflow.data.processors.media_text import MediaTokenizer
from glowflow.data.processors.text import (
    DEFAULT_BPE_VOCAB,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer_file,
    parse_request,
    spec_fingerprint,
)
from glowflow.data.sample_build import check_bad_share

__all__ = ["check_tokenizer", "ensure_built", "expected_vocabulary", "find_built", "load_built"]

logger = logging.getLogger(__name__)


def ensure_built(
    config: DataConfig,
    *,
    use_ray: bool = True,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[tuple[Manifest, float]]:
    """Make sure that every source of a config is built, whole, and of one tokenizer.

    Built directories are loaded and checked as ``config.verify`` says; anything else is built into the cache, once
    for each content, tokenizer and format. With several sources the first one's tokenizer serves all.

    Args:
        config: the data section.
        use_ray: build as a Ray Data job, or in this process; the result is the same.
        progress: called with (units done, units in all, tokens so far) of each build.
        tokenizer: that of a model which exists already: what is built is built with it, whatever the config asks for.

    Returns:
        (manifest, weight) per source, in the order of the config.

    Raises:
        DataError: a source can not be found or built, a shard has changed, or the tokenizers differ.
    """
    if tokenizer is not None and _asks_for(config, tokenizer):
        tokenizer = None
    resolved = [(resolve(name, config), weight) for name, weight in _wanted(config)]
    built: list[tuple[Manifest, float]] = []
    for source, weight in resolved:
        if source.built is not None:
            manifest = load_built(source.built, config.verify)
            if tokenizer is None:
                check_tokenizer(manifest, config.tokenizer)
        else:
            manifest = _build_into_cache(source, tokenizer or config.tokenizer, config, use_ray, progress)
        if tokenizer is None:
            tokenizer = manifest.tokenizer()
        built.append((manifest, weight))
    _check_same_tokenizer([manifest for manifest, _ in built])
    _check_splits(built[0][0], config)
    return built


def _asks_for(config: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer is what the config's own request has led to: then no second build of it is made."""
    if config.tokenizer.endswith((".json", ".bin")):
        return False  # its file may be gone; a build with the tokenizer itself is found under the same key
    found = find_built(config)
    return found is not None and all(m.tokenizer_fingerprint == tokenizer.fingerprint for m, _ in found)


def _wanted(config: DataConfig) -> list[tuple[str, float]]:
    return [(one.dataset, one.weight) for one in config.sources] or [(config.dataset, 1.0)]


def find_built(config: DataConfig) -> list[tuple[Manifest, float]] | None:
    """What ``ensure_built`` would give, where everything is built already: nothing is fetched, built or written.

    Returns:
        (manifest, weight) per source, their shards checked by size; None when something has yet to be built.

    Raises:
        DataError: a path does not exist, or is neither data nor text.
    """
    tokenizer: Tokenizer | None = None
    found: list[tuple[Manifest, float]] = []
    for name, weight in _wanted(config):
        if not is_here(name, config):
            return None
        source = resolve(name, config)
        out = source.built or _cache_place(source, tokenizer or config.tokenizer, config)[0]
        if not (out / MANIFEST_NAME).is_file():
            return None
        manifest = load_built(out, "size")
        if source.built is not None:
            check_tokenizer(manifest, config.tokenizer)
        tokenizer = tokenizer or manifest.tokenizer()
        found.append((manifest, weight))
    _check_same_tokenizer([manifest for manifest, _ in found])
    _check_splits(found[0][0], config)
    return found


def expected_vocabulary(config: DataConfig) -> int | None:
    """The size of the vocabulary before anything is built (for trained BPE: the size asked for), if it is known.

    Raises:
        DataError: the tokenizer is not understood, or a built data set has no valid manifest.
    """
    name = _wanted(config)[0][0]
    entry = CATALOGUE.get(name)
    built = Path(name).expanduser()
    if entry is None and (built / MANIFEST_NAME).is_file():
        return Manifest.load(built).tokenizer().vocab_size
    text = _expected_text_vocabulary(config, entry)
    media = len(MODALITIES) if has_media(name, config) else 0
    return None if text is None else text + media


def _expected_text_vocabulary(config: DataConfig, entry: Entry | None) -> int | None:
    """The same without the tokens of media."""
    default = entry.tokenizer if entry is not None else "bytes"
    kind, size, path = parse_request(default if config.tokenizer == "auto" else config.tokenizer)
    if path is not None:
        return load_tokenizer_file(path).vocab_size
    if kind == "bytes":
        return ByteTokenizer.vocab_size
    if kind == "bpe":
        return size or DEFAULT_BPE_VOCAB
    known = entry.vocabulary if entry is not None and entry.tokenizer == kind else None
    return min(size, known) if size and known else size or known


def load_built(path: Path, verify: Literal["size", "hash"]) -> Manifest:
    """Load the manifest of a built directory and check its shards.

    Raises:
        DataError: there is none, it is invalid, or shards have changed (all are named).
    """
    from glowflow.data.inspect import check_index

    manifest = Manifest.load(path)
    if manifest.index_only:
        problems = [*manifest.check(verify), *check_index(manifest, verify)]
    else:
        problems = manifest.check(verify)
    if problems:
        raise DataError(problems, title=f"the data set {manifest.name} is damaged")
    return manifest


def check_tokenizer(manifest: Manifest, request: str) -> None:
    """Refuse a built data set whose tokenizer is not the one that the config asks for.

    Raises:
        DataError: ``request`` is not ``auto`` and stands for another tokenizer.
    """
    if request == "auto":
        return
    kind, size, path = parse_request(request)
    spec = manifest.tokenizer_spec
    spec = spec["base"] if spec.get("kind") == MediaTokenizer.kind else spec
    if path is not None:
        same = load_tokenizer_file(path).fingerprint == spec_fingerprint(spec)
    elif kind == "words":
        same = spec.get("kind") == kind and (size is None or len(spec["words"]) <= size)
    else:
        same = spec.get("kind") == kind and (size is None or spec.get("vocab_size") == size)
    if not same:
        hint = "set data.tokenizer=auto to take the data set's own, or build the data set with the other one"
        rule = f"must be the tokenizer of {manifest.root}, which is {manifest.tokenizer().name}"
        raise DataError(Problem("data.tokenizer", rule, request, hint))


def _build_into_cache(
    source: Source, tokenizer: Tokenizer | str, config: DataConfig, use_ray: bool, progress: Progress | None
) -> Manifest:
    out, key = _cache_place(source, tokenizer, config)
    if (out / MANIFEST_NAME).is_file():
        manifest = load_built(out, config.verify)
        if manifest.source.get("build_key") == key:
            check_bad_share(manifest.media, config.max_bad_fraction)
            logger.info("%s is built already: %s", source.name, out)
            return manifest
    return build(source, out, tokenizer, config=config, use_ray=use_ray, progress=progress)


def _cache_place(source: Source, tokenizer: Tokenizer | str, config: DataConfig) -> tuple[Path, str]:
    """Where the cache keeps a source built with a tokenizer, and the key of that build."""
    key = build_key(source, tokenizer, BuildOptions(on_bad_file=config.on_bad_file))
    return cache_root(config) / "built" / f"{source.name}-{key[:16]}", key


def _check_same_tokenizer(manifests: list[Manifest]) -> None:
    first = manifests[0]
    others = [m for m in manifests[1:] if m.tokenizer_fingerprint != first.tokenizer_fingerprint]
    if others and any(m.media for m in others) and not isinstance(first.tokenizer(), MediaTokenizer):
        rule = "must come before sources of text: its tokenizer has tokens for media, and the first one's serves all"
        raise DataError([Problem(f"data.sources: {m.name}", rule) for m in others if m.media])
    if others:
        rule = f"must have the tokenizer of the first source, {first.name} ({first.tokenizer_fingerprint[:12]})"
        hint = "build all sources with one tokenizer: `glowflow data build SOURCE OUT --tokenizer ...`"
        problems = [Problem(f"data.sources: {m.name}", rule, m.tokenizer_fingerprint[:12], hint) for m in others]
        raise DataError(problems, title="sources of different tokenizers")


def _check_splits(manifest: Manifest, config: DataConfig) -> None:
    """The training split must be there; evaluation names the split it wants when it wants it."""
    manifest.split(config.train_split)
