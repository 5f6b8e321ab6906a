"""The catalogue: names that may stand for a data set, and how each is found on this machine.

``resolve`` looks for a catalogue name in GLOWFLOW_DATA/NAME, then in the cache, then on Hugging Face; for any other
name it takes the path of a file, of a folder, or of a built data set.
"""

from __future__ import annotations

import difflib
import logging
import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets import hub
from glowflow.data.datasets.layout import contiguous, hash_splits, held_out, split_files
from glowflow.data.datasets.scan import OUR_INDEX, keep_good, scan_files
from glowflow.data.datasets.source import Extent, FileFacts, Skipped, Source, source_digest
from glowflow.data.datasets.wikitext import article_starts

__all__ = ["CATALOGUE", "Entry", "availability", "cache_root", "is_ready", "resolve", "resolve_parquet"]

logger = logging.getLogger(__name__)

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_NOT_BUILT = ("manifest.json", ".building")


@dataclass(frozen=True)
class Entry:
    """One catalogue name.

    Args:
        tokenizer: what ``data.tokenizer: auto`` means for it.
        files: split -> file names that it may have, the canonical one first; empty for python-stdlib.
        folders: paths on Hugging Face that may hold its Parquet files.
        lines: the Parquet rows are lines of the original files.
        layout: turns the scanned files (by split) into extents.
        vocabulary: the known size of the default tokenizer's vocabulary.
        home: the entry whose files it has; empty: its own.
    """

    name: str
    description: str
    licence: str
    tokenizer: str
    files: dict[str, tuple[str, ...]]
    folders: tuple[str, ...]
    lines: bool
    layout: Callable[[dict[str, FileFacts]], dict[str, list[Extent]]] | None = None
    vocabulary: int | None = None
    home: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder that holds its files."""
        return self.home or self.name


def cache_root(config: DataConfig) -> Path:
    """The absolute cache directory."""
    return Path(config.cache_dir).expanduser().absolute()


def resolve(name_or_path: str, config: DataConfig) -> Source:
    """Find a data set and learn which documents its splits have; fetches catalogue data sets where needed.

    Args:
        name_or_path: catalogue name, file, folder, or built data directory.
        config: ``cache_dir`` and ``on_bad_file`` are used.

    Raises:
        DataError: it is nowhere (the places are listed), is empty, or has files that can not be used.
    """
    if name_or_path == "python-stdlib":
        return _python_stdlib()
    if name_or_path in CATALOGUE:
        return _resolve_entry(CATALOGUE[name_or_path], config)
    path = Path(name_or_path).expanduser()
    root = os.environ.get("GLOWFLOW_DATA")
    if not path.exists() and root and not path.is_absolute() and (Path(root) / path).exists():
        path = Path(root) / path
    if not path.exists():
        close = difflib.get_close_matches(name_or_path, CATALOGUE, n=1)
        known = f"catalogue: {', '.join(CATALOGUE)}" + (f"; did you mean {close[0]!r}?" if close else "")
        raise DataError(
            Problem("data.dataset", "is neither in the catalogue nor a path that exists", name_or_path, known)
        )
    return _resolve_path(path.absolute(), config)


def _resolve_path(path: Path, config: DataConfig) -> Source:
    name = path.stem if path.is_file() else path.name
    if path.name == "manifest.json" or (path / "manifest.json").is_file():
        root = path if path.is_dir() else path.parent
        return Source(root.name, root.name, "", "auto", built=root)
    if path.is_dir():
        _refuse_unfinished(path)
    pairs = [(path, path.name)] if path.is_file() else _folder_files(path)
    good, skipped, empty = keep_good(scan_files(pairs), config.on_bad_file)
    splits, unused = split_files(good)
    for one in unused:
        logger.warning("left out %s: %s", one.name, one.reason)
    unused_names = {one.name for one in unused}
    used = [facts for facts in good if facts.name not in unused_names]
    return _source(name, f"local: {path.name}", "not known", "bytes", used, splits, [*skipped, *unused], empty)


def resolve_parquet(path: str | Path, config: DataConfig) -> Source:
    """A file or folder of Parquet as the source of an index; an index that lies there already is passed over.

    Raises:
        DataError: there is no Parquet file, or one that can not be used.
    """
    root = Path(path).expanduser().absolute()
    if not root.exists():
        raise DataError(Problem("data.dataset", "does not exist", str(path)))
    files = [(root, root.name)] if root.is_file() else [p for p in _folder_files(root) if p[0].suffix == ".parquet"]
    scanned = [one for one in scan_files(files) if one.problem != OUR_INDEX]
    good, skipped, empty = keep_good(scanned, config.on_bad_file)
    splits, unused = split_files(good)
    unused_names = {one.name for one in unused}
    used = [facts for facts in good if facts.name not in unused_names]
    return _source(root.stem, f"local: {root.name}", "not known", "bytes", used, splits, [*skipped, *unused], empty)


def _refuse_unfinished(path: Path) -> None:
    hint = "run `glowflow data build` again: it goes on where it stopped"
    if (path / ".building").is_dir():
        raise DataError(
            Problem(str(path), "is a data directory whose build has not finished: manifest.json is missing", hint=hint)
        )


def _folder_files(folder: Path) -> list[tuple[Path, str]]:
    """All files below a folder in the order of their names; hidden ones and built data sets inside are left out."""
    found = []
    for current, directories, files in os.walk(folder, followlinks=True):
        if current != str(folder) and any(name in files or name in directories for name in _NOT_BUILT):
            directories.clear()
            continue
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "__pycache__")
        found += [Path(current, name) for name in files if not name.startswith(".")]
    return sorted(((path, path.relative_to(folder).as_posix()) for path in found), key=lambda pair: pair[1])


def _source(
    name: str,
    origin: str,
    licence: str,
    tokenizer: str,
    files: list[FileFacts],
    splits: dict[str, list[Extent]],
    skipped: list[Skipped],
    empty: int,
) -> Source:
    if not splits.get("train"):
        raise DataError(Problem("data.dataset", "the corpus has no text for the split `train`", name))
    digest = source_digest(files, splits)
    total = sum(facts.bytes for facts in files)
    return Source(name, origin, licence, tokenizer, digest, splits, len(files), total, empty, tuple(skipped))


def _python_stdlib() -> Source:
    """The interpreter's own library: text that every machine with Python has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs = []
    for current, directories, files in os.walk(root):
        directories[:] = sorted(name for name in directories if name not in _LEFT_OUT)
        # _sysconfigdata holds the settings of one machine's build, not source.
        python = (
            Path(current, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        )
        pairs += [(path, path.relative_to(root).as_posix()) for path in python]
    facts = scan_files(sorted(pairs, key=lambda pair: pair[1]))
    good, skipped, empty = keep_good(facts, "skip")
    if not good:
        hint = "this interpreter comes without its sources; set data.dataset to another one"
        raise DataError(Problem("data.dataset", "python-stdlib has no .py files", str(root), hint))
    splits = hash_splits(good, {one.name: index for index, one in enumerate(good)}, with_test=True)
    entry = CATALOGUE["python-stdlib"]
    origin = f"standard library of Python {platform.python_version()}"
    return _source(entry.name, origin, entry.licence, entry.tokenizer, good, splits, skipped, empty)


def _resolve_entry(entry: Entry, config: DataConfig) -> Source:
    directory = _find(entry, config)
    logger.info("%s: files in %s", entry.name, directory)
    chosen = _present(entry, directory)
    facts = scan_files([(directory / name, name) for name in chosen.values()])
    keep_good(facts, "refuse")
    by_split = dict(zip(chosen, facts, strict=True))
    layout = entry.layout(by_split) if entry.layout else {}
    # Where the files were found is a fact of the machine; equal files must give equal manifests everywhere.
    return _source(entry.name, f"hf://{entry.folders[0]}", entry.licence, entry.tokenizer, facts, layout, [], 0)


def _present(entry: Entry, directory: Path) -> dict[str, str]:
    """split -> file name, for the splits that a directory has as text."""
    found = {}
    for split, names in entry.files.items():
        name = next((name for name in names if (directory / name).is_file()), None)
        if name is not None:
            found[split] = name
    return found


def _places(entry: Entry, config: DataConfig) -> list[tuple[str, Path]]:
    places = [("the local cache", cache_root(config) / "downloads" / entry.folder)]
    if root := os.environ.get("GLOWFLOW_DATA"):
        places.insert(0, ("GLOWFLOW_DATA", Path(root).expanduser().absolute() / entry.folder))
    return places


def _find(entry: Entry, config: DataConfig) -> Path:
    """The directory that has the text files of a catalogue entry; made from Parquet where there is only that."""
    text = cache_root(config) / "downloads" / entry.folder / "text"  # ours: nobody else puts files there
    for _, place in _places(entry, config):
        if len(_present(entry, place)) == len(entry.files):
            return place
        if parquet := _parquet(entry, place):
            newest = max(Path(path).stat().st_mtime for paths in parquet.values() for path in paths)
            if not text.is_dir() or text.stat().st_mtime < newest:
                hub.write_text_files(parquet, text, files=_text_names(entry), lines=entry.lines)
            return text
    if len(_present(entry, text)) < len(entry.files):
        try:
            hub.fetch_text_files(entry.folders, text, files=_text_names(entry), lines=entry.lines)
        except hub.HubUnavailable as error:
            raise DataError(_nowhere(entry, config, str(error))) from None
    return text


def _parquet(entry: Entry, place: Path) -> dict[str, list[str]]:
    return hub.local_parquet(place, [folder.rsplit("/", 1)[-1] for folder in entry.folders]) if place.is_dir() else {}


def _text_names(entry: Entry) -> dict[str, str]:
    """Which text file each Parquet split goes to; an entry of one file joins them."""
    canonical = {split: names[0] for split, names in entry.files.items()}
    only = next(iter(canonical.values()))
    return canonical if len(canonical) > 1 else dict.fromkeys(("train", "validation", "test"), only)


def _nowhere(entry: Entry, config: DataConfig, reason: str) -> Problem:
    names = ", ".join(names[0] for names in entry.files.values())
    looked = [f"{label} ({place})" for label, place in _places(entry, config)]
    if not os.environ.get("GLOWFLOW_DATA"):
        looked.insert(0, "GLOWFLOW_DATA (not set)")
    looked.append(f"{hub.location(entry.folders[0])} ({reason})")
    hint = (
        f"looked in: {'; '.join(looked)}. Put {names} (or Parquet: train-*.parquet, ...) into one of the folders above,"
        f" or set GLOWFLOW_DATA to a folder that has {entry.folder}/{names.split(',')[0]}"
    )
    return Problem("data.dataset", "is not on this machine and cannot be fetched", entry.name, hint)


def is_ready(entry: Entry, config: DataConfig) -> bool:
    """Whether the text files are on this machine: resolving it then fetches and writes nothing."""
    places = [*(place for _, place in _places(entry, config)), cache_root(config) / "downloads" / entry.folder / "text"]
    return not entry.files or any(len(_present(entry, place)) == len(entry.files) for place in places)


def availability(entry: Entry, config: DataConfig) -> dict[str, Any]:
    """Where a catalogue entry would come from, without touching the network."""
    if not entry.files:
        return {"available": True, "where": f"this interpreter ({sysconfig.get_paths()['stdlib']})"}
    places = [*_places(entry, config), ("the local cache", cache_root(config) / "downloads" / entry.folder / "text")]
    for label, place in places:
        if len(_present(entry, place)) == len(entry.files) or _parquet(entry, place):
            return {"available": True, "where": f"{label} ({place})"}
    return {"available": False, "where": f"to be fetched from {hub.location(entry.folders[0])}"}


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
_ENTRIES = (
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
CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
