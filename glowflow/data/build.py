"""``glowflow data build``: a source becomes Parquet shards and a manifest, as a Ray Data job or in this process.

1. The source is cut into units, a tokenizer is trained where one is asked for, and both are written to OUT/.building.
2. Each unit becomes one shard, in any order and on any number of workers; the bytes are the same.
3. manifest.json is written last and atomically. Without it OUT is no data set, so a killed build leaves nothing
   half-valid; a second run with the same key goes on, another one starts clean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets.catalogue import resolve, resolve_parquet
from glowflow.data.datasets.source import Source
from glowflow.data.fitting import fit_tokenizer, request_key, suited_tokenizer
from glowflow.data.manifest import MANIFEST_NAME, Manifest, RowGroupInfo, ShardInfo, SplitInfo
from glowflow.data.processors.text import Tokenizer
from glowflow.data.sample_build import check_bad_share, media_facts
from glowflow.data.shards import ROW_GROUP_TOKENS
from glowflow.data.units import (
    STATE_DIR,
    STATE_FILE,
    Unit,
    load_state,
    plan_units,
    run_unit,
    write_json,
)

__all__ = ["FORMAT", "BuildOptions", "Progress", "build", "build_key"]

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same source and options give other shards
_SHOWN_PROBLEMS = 50
Progress = Callable[[int, int, int], None]  # (units done, units in all, tokens so far)


@dataclass(frozen=True)
class BuildOptions:
    """How shards are cut.

    Args:
        unit_bytes: about how much text becomes one shard; None: 4 to 256 MiB, by the size of the source.
        row_group_tokens: largest row group in tokens (a single row may hold up to 65,536).
        index_only: leave Parquet sources as they are and write a manifest and a length index beside them.
        on_bad_file: ``refuse`` or ``skip`` rows that hold no text (files are checked when the source is resolved).
    """

    unit_bytes: int | None = None
    row_group_tokens: int = ROW_GROUP_TOKENS
    index_only: bool = False
    on_bad_file: str = "refuse"

    def __post_init__(self) -> None:
        problems = []
        if self.unit_bytes is not None and self.unit_bytes < 1:
            problems.append(Problem("unit_bytes", "must be at least 1", self.unit_bytes))
        if self.row_group_tokens < 1:
            problems.append(Problem("row_group_tokens", "must be at least 1", self.row_group_tokens))
        if problems:
            raise DataError(problems)


def build(
    source: Source | str,
    out: str | Path,
    tokenizer: Tokenizer | str = "auto",
    *,
    config: DataConfig | None = None,
    options: BuildOptions | None = None,
    use_ray: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Build a data set.

    Args:
        source: a resolved source, or a catalogue name or path to resolve.
        out: directory of the shards; it may be new, empty, or hold an earlier build.
        tokenizer: ready-made, or a request as in ``data.tokenizer``; it is trained on the training split alone.
        config: for resolving (default: the defaults).
        options: how shards are cut; ``on_bad_file`` of the config counts where they are left out.
        use_ray: run the units as a Ray Data job (on a private local cluster when there is none) or in this process.
        progress: called with (units done, units in all, tokens so far).

    Returns:
        The manifest; the same for the same source, tokenizer and options, wherever and however it is built.

    Raises:
        DataError: the source is unusable or built already, or ``out`` holds files that no build wrote.
    """
    config = config or DataConfig()
    options = options or BuildOptions(on_bad_file=config.on_bad_file)
    if isinstance(source, str):
        source = resolve_parquet(source, config) if options.index_only else resolve(source, config)
    if source.built is not None:
        raise DataError(Problem("data.dataset", "is a built data set already", str(source.built)))
    target = Path(out).expanduser().absolute()
    key = build_key(source, tokenizer, options)
    units = _units(source, target, options)
    _refuse_foreign_files(target, units, options)
    with _exclusive(target):
        done = _finished(target, key)
        if done is not None:
            check_bad_share(done.media, config.max_bad_fraction)
            return done
        kept = _start_or_go_on(target, key, source, tokenizer, options, units)
        results = _run(target, units, kept, use_ray, progress)
        if source.samples is not None:  # what is done stays: with a larger share it goes on
            check_bad_share(media_facts(results), config.max_bad_fraction)
        return _commit(target, key, source, options, units, results)


def build_key(source: Source, tokenizer: Tokenizer | str, options: BuildOptions) -> str:
    """sha256 of everything that decides the shards: contents, splits, tokenizer and options."""
    if isinstance(tokenizer, str):
        wanted = request_key(source, tokenizer)
    else:
        wanted = f"fingerprint:{suited_tokenizer(source, tokenizer).fingerprint}"
    facts: list[Any] = [
        FORMAT,
        source.name,
        source.digest,
        wanted,
        options.unit_bytes,
        options.row_group_tokens,
        options.index_only,
    ]
    if source.samples is not None:
        facts.append(source.samples.to_dict())
    return hashlib.sha256(json.dumps([*facts, options.on_bad_file]).encode()).hexdigest()


def _units(source: Source, out: Path, options: BuildOptions) -> list[Unit]:
    if options.index_only:
        from glowflow.data.indexing import plan_index_units

        return plan_index_units(source)
    return plan_units(source, options.unit_bytes)


def _refuse_foreign_files(out: Path, units: Sequence[Unit], options: BuildOptions) -> None:
    """A build may only touch a directory that is new, empty, or the work of a build."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(Problem(str(out), "must be a directory"))
    ours = (out / STATE_DIR / STATE_FILE).is_file()
    sources = {Path(extent.path) for unit in units for extent in unit.extents} if options.index_only else set()
    if (out / MANIFEST_NAME).is_file():
        Manifest.load(out)  # somebody else's manifest.json is refused here
        ours = True
    foreign = [path.name for path in sorted(out.iterdir()) if path not in sources and path.name != STATE_DIR]
    if foreign and not ours:
        hint = "choose a new or empty directory"
        if any(out in path.parents for path in sources):
            return  # an index lies beside the Parquet files and whatever keeps them company
        raise DataError(Problem(str(out), "holds files that no build wrote", foreign[:5], hint))


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """One build at a time in a directory; the lock goes with its process, however that ends."""
    state = out / STATE_DIR
    while True:
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(Problem(str(out), f"cannot be written: {error.strerror or error}")) from error
        lock = state / "lock"
        with lock.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process builds %s; waiting for it", out)
                fcntl.flock(stream, fcntl.LOCK_EX)
            # The one we waited for has removed the state directory at its end: then this lock is nobody's.
            try:
                same = lock.stat().st_ino == os.fstat(stream.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if same:
                try:
                    yield
                finally:
                    _drop_empty_state(out)
                return


def _drop_empty_state(out: Path) -> None:
    """A build that never started, or has nothing to do, leaves no trace."""
    state = out / STATE_DIR
    if state.is_dir() and not (state / STATE_FILE).exists():
        shutil.rmtree(state, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()


def _finished(out: Path, key: str) -> Manifest | None:
    """The manifest, when this very build has been done and its shards are there."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(out)
    if manifest.source.get("build_key") != key or manifest.check("size"):
        return None
    _clear_state(out)
    return manifest


def _start_or_go_on(
    out: Path, key: str, source: Source, tokenizer: Tokenizer | str, options: BuildOptions, units: Sequence[Unit]
) -> dict[int, dict[str, Any]]:
    """Results of units that an interrupted build of the same key has finished; anything else is removed first."""
    state_file = out / STATE_DIR / STATE_FILE
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    if state.get("key") == key and not (out / MANIFEST_NAME).exists():
        results = _kept_results(out, units)
        logger.info("going on with an interrupted build: %d of %d units are done", len(results), len(units))
        return results
    _remove_own_files(out, state)
    shards = [unit.shard for unit in units]  # for --index-only: the index files
    taken = [name for name in shards if (out / name).exists()]
    if taken:
        raise DataError(Problem(str(out), "holds files with the names of shards that no build wrote", taken[:5]))
    ready = fit_tokenizer(source, tokenizer) if isinstance(tokenizer, str) else suited_tokenizer(source, tokenizer)
    content = {
        "key": key,
        "tokenizer": ready.spec(),
        "shards": shards,
        "index_only": options.index_only,
        "row_group_tokens": options.row_group_tokens,
        "on_bad_file": options.on_bad_file,
    }
    if source.samples is not None:
        content["samples"] = source.samples.to_dict()
    write_json(state_file, content)
    return {}


def _kept_results(out: Path, units: Sequence[Unit]) -> dict[int, dict[str, Any]]:
    results = {}
    for unit in units:
        path = out / STATE_DIR / f"unit-{unit.index:06d}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        files = [file for file in (result["shard"], result.get("index_file")) if file]
        sizes = [(out / file["path"]).stat().st_size if (out / file["path"]).is_file() else -1 for file in files]
        if sizes == [file["bytes"] for file in files]:
            results[unit.index] = result
    return results


def _remove_own_files(out: Path, state: dict[str, Any]) -> None:
    """Remove an earlier build: its manifest first, so that it is never half there."""
    names = list(state.get("shards", []))
    if (out / MANIFEST_NAME).is_file():
        manifest = Manifest.load(out)
        if not manifest.index_only:
            names += [shard.path for split in manifest.splits.values() for shard in split.shards]
        names += [index["path"] for index in manifest.source.get("index", {}).values()]
        manifest.path.unlink()
    for name in names:
        (out / name).unlink(missing_ok=True)
    for path in (out / STATE_DIR).iterdir():
        if path.name != "lock":
            path.unlink()


def _run(
    out: Path, units: Sequence[Unit], results: dict[int, dict[str, Any]], use_ray: bool, progress: Progress | None
) -> list[dict[str, Any]]:
    """Run the units that are not done, and collect every result in the order of the units."""
    todo = [unit for unit in units if unit.index not in results]
    tokens = sum(_tokens(result) for result in results.values())
    if progress is not None:
        progress(len(results), len(units), tokens)
    if use_ray and todo:
        from glowflow.data.rayjob import run_units_on_ray

        stream = run_units_on_ray(out, todo)
    else:
        stream = (run_unit(str(out), unit.to_json()) for unit in todo)
    problems: list[Problem] = []
    for result in stream:
        results[result["index"]] = result
        problems += [Problem(key, rule, hint=hint) for key, rule, hint in result.get("problems", [])]
        tokens += _tokens(result)
        if progress is not None:
            progress(len(results), len(units), tokens)
    if problems:
        if not any(results[unit.index].get("retry") for unit in todo):
            # Bad input will not get better by going on: leave nothing behind.
            _remove_own_files(out, json.loads((out / STATE_DIR / STATE_FILE).read_text(encoding="utf-8")))
        raise DataError(problems[:_SHOWN_PROBLEMS], title="the data set cannot be built")
    return [results[unit.index] for unit in units]


def _tokens(result: dict[str, Any]) -> int:
    shard = result.get("shard")
    return sum(group[1] for group in shard["row_groups"]) if shard else 0


def _commit(
    out: Path, key: str, source: Source, options: BuildOptions, units: Sequence[Unit], results: list[dict[str, Any]]
) -> Manifest:
    """Write the manifest, then drop the state of the build."""
    tokenizer, _ = load_state(out)
    splits = {split: _split_info([r for r in results if r["split"] == split]) for split in source.splits}
    splits = {name: info for name, info in splits.items() if info.rows}
    if "train" not in splits:
        what = "no tokens" if source.samples is None else "no samples that can be used"
        raise DataError(Problem("data.dataset", f"the corpus is empty: its training split has {what}", source.name))
    manifest = Manifest(
        name=source.name,
        root=out,
        tokenizer_spec=tokenizer.spec(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        token_dtype=str(tokenizer.dtype),
        splits=splits,
        source={**_source_facts(source, results), "build_key": key, **_index_facts(results)},
        media=media_facts(results) if source.samples is not None else {},
        index_only=options.index_only,
    )
    manifest.save()
    _clear_state(out)
    return manifest


def _split_info(results: Sequence[dict[str, Any]]) -> SplitInfo:
    shards = []
    for result in results:
        if (shard := result["shard"]) is None:
            continue
        groups = [RowGroupInfo(*group) for group in shard["row_groups"]]
        rows, tokens = sum(group.rows for group in groups), sum(group.tokens for group in groups)
        shards.append(ShardInfo(shard["path"], shard["bytes"], shard["sha256"], rows, tokens, groups))
    return SplitInfo(
        shards=shards,
        rows=sum(shard.rows for shard in shards),
        documents=sum(result["documents"] for result in results),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(result["text_bytes"] for result in results),
    )


def _source_facts(source: Source, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for result in results for row in result.get("skipped_rows", [])]
    for key, rule in rows[:_SHOWN_PROBLEMS]:
        logger.warning("skipped %s: %s", key, rule)
    return {
        "origin": source.origin,
        "licence": source.licence,
        "digest": source.digest,
        "files": source.files,
        "bytes": source.bytes,
        "empty_files": source.empty_files,
        "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in source.skipped],
        "skipped_rows": len(rows),
    }


def _index_facts(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    indexes = {result["index_key"]: result["index_file"] for result in results if result.get("index_file")}
    return {"index": indexes} if indexes else {}


def _clear_state(out: Path) -> None:
    shutil.rmtree(out / STATE_DIR, ignore_errors=True)
