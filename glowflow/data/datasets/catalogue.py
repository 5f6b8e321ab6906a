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
from dataclasses import replace
from pathlib import Path
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.config.schema import DataConfig
from glowflow.data.datasets import hub
from glowflow.data.datasets.entry import Entry
from glowflow.data.datasets.layout import hash_splits, split_files
from glowflow.data.datasets.media.entries import MEDIA_ENTRIES, found_folders, resolve_media
from glowflow.data.datasets.media.local import local_media, reader_of
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.scan import OUR_INDEX, folder_files, keep_good, scan_files
from glowflow.data.datasets.source import Extent, FileFacts, Skipped, Source, source_digest
from glowflow.data.datasets.text_entries import TEXT_ENTRIES

__all__ = [
    "CATALOGUE",
    "Entry",
    "availability",
    "cache_root",
    "has_media",
    "is_here",
    "is_ready",
    "resolve",
    "resolve_parquet",
]

logger = logging.getLogger(__name__)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in (*TEXT_ENTRIES, *MEDIA_ENTRIES)}
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def cache_root(config: DataConfig) -> Path:
    """The absolute cache directory."""
    return Path(config.cache_dir).expanduser().absolute()


def resolve(name_or_path: str, config: DataConfig) -> Source:
    """Find a data set and learn which documents its splits have; fetches catalogue data sets where needed.

    Args:
        name_or_path: catalogue name, file, folder, or built data directory.
        config: ``cache_dir`` and ``on_bad_file`` are used, and of samples with media what their build depends on.

    Raises:
        DataError: it is nowhere (the places are listed), is empty, or has files that can not be used.
    """
    if name_or_path == "python-stdlib":
        return _python_stdlib()
    if name_or_path in CATALOGUE:
        return _resolve_entry(CATALOGUE[name_or_path], config)
    if name_or_path.startswith(hub.PREFIX):
        return _resolve_hub(name_or_path, config)
    path = _path_of(name_or_path)
    if not path.exists():
        close = difflib.get_close_matches(name_or_path, CATALOGUE, n=1)
        known = f"catalogue: {', '.join(CATALOGUE)}" + (f"; did you mean {close[0]!r}?" if close else "")
        raise DataError(
            Problem("data.dataset", "is neither in the catalogue nor a path that exists", name_or_path, known)
        )
    return _resolve_path(path.absolute(), config)


def _resolve_hub(name: str, config: DataConfig) -> Source:
    """A data set of Hugging Face that has Parquet files: copied into the cache, then as a folder."""
    target = _hub_copy(name, config)
    if not target.is_dir():
        path = name.removeprefix(hub.PREFIX)
        logger.info("fetching %s", hub.location(path))
        try:
            hub.fetch_parquet_files(path, target)
        except hub.HubUnavailable as error:
            hint = f"looked in: {target}; put its Parquet files there, or a copy of them anywhere, and give that path"
            rule = f"is not on this machine and cannot be fetched ({error})"
            raise DataError(Problem("data.dataset", rule, name, hint)) from None
    return replace(_resolve_path(target, config), name=name.rstrip("/").rpartition("/")[2], origin=name)


def _hub_copy(name: str, config: DataConfig) -> Path:
    path = name.removeprefix(hub.PREFIX).strip("/").replace("/", "--")
    return cache_root(config) / "downloads" / "hub" / path


def is_here(name_or_path: str, config: DataConfig) -> bool:
    """Whether resolving a name fetches and writes nothing."""
    if name_or_path in CATALOGUE:
        return is_ready(CATALOGUE[name_or_path], config)
    return not name_or_path.startswith(hub.PREFIX) or _hub_copy(name_or_path, config).is_dir()


def _path_of(name: str) -> Path:
    """A path as given, or below GLOWFLOW_DATA where it is only there."""
    path = Path(name).expanduser()
    root = os.environ.get("GLOWFLOW_DATA")
    if not path.exists() and root and not path.is_absolute() and (Path(root) / path).exists():
        return Path(root) / path
    return path


def has_media(name_or_path: str, config: DataConfig) -> bool:
    """Whether a catalogue name or an existing path gives samples with media, not text; little is read.

    Raises:
        DataError: a folder of pictures or recordings has neither captions nor classes.
    """
    if name_or_path in CATALOGUE:
        return CATALOGUE[name_or_path].media is not None
    path = _hub_copy(name_or_path, config) if name_or_path.startswith(hub.PREFIX) else _path_of(name_or_path)
    pairs = [(path, path.name)] if path.is_file() else folder_files(path) if path.is_dir() else []
    return reader_of(pairs, config) is not None


def _resolve_path(path: Path, config: DataConfig) -> Source:
    name = path.stem if path.is_file() else path.name
    if path.name == "manifest.json" or (path / "manifest.json").is_file():
        root = path if path.is_dir() else path.parent
        return Source(root.name, root.name, "", "auto", built=root)
    if path.is_dir():
        _refuse_unfinished(path)
    pairs = [(path, path.name)] if path.is_file() else folder_files(path)
    if (media := local_media(path, pairs, config)) is not None:
        return media
    if SampleSettings.from_config(config).maps:
        logger.warning("%s is text: data.columns, data.prompt and data.template have no effect on it", name)
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
    files = [(root, root.name)] if root.is_file() else [p for p in folder_files(root) if p[0].suffix == ".parquet"]
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
    if entry.media is not None:
        return resolve_media(entry, config, lambda folder: _folder_places(folder, config))
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
    return _folder_places(entry.folder, config)


def _folder_places(folder: str, config: DataConfig) -> list[tuple[str, Path]]:
    places = [("the local cache", cache_root(config) / "downloads" / folder)]
    if root := os.environ.get("GLOWFLOW_DATA"):
        places.insert(0, ("GLOWFLOW_DATA", Path(root).expanduser().absolute() / folder))
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
    """Whether its files are on this machine: resolving it then fetches and writes nothing."""
    if entry.media is not None:
        return _media_folders(entry, config).keys() == entry.media.needs.keys()
    places = [*(place for _, place in _places(entry, config)), cache_root(config) / "downloads" / entry.folder / "text"]
    return not entry.files or any(len(_present(entry, place)) == len(entry.files) for place in places)


def availability(entry: Entry, config: DataConfig) -> dict[str, Any]:
    """Where a catalogue entry would come from, without touching the network."""
    if entry.media is not None:
        found = _media_folders(entry, config)
        missing = [folder for folder in entry.media.needs if folder not in found]
        if missing:
            return {"available": False, "where": f"to be put into GLOWFLOW_DATA: {', '.join(missing)}"}
        where = ", ".join(str(folder) for folder in found.values()) or "made on this machine"
        return {"available": True, "where": where}
    if not entry.files:
        return {"available": True, "where": f"this interpreter ({sysconfig.get_paths()['stdlib']})"}
    places = [*_places(entry, config), ("the local cache", cache_root(config) / "downloads" / entry.folder / "text")]
    for label, place in places:
        if len(_present(entry, place)) == len(entry.files) or _parquet(entry, place):
            return {"available": True, "where": f"{label} ({place})"}
    return {"available": False, "where": f"to be fetched from {hub.location(entry.folders[0])}"}


def _media_folders(entry: Entry, config: DataConfig) -> dict[str, Path]:
    assert entry.media is not None
    return found_folders(entry.media, lambda folder: _folder_places(folder, config))
