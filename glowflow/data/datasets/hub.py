"""Brings catalogue data sets to this machine as plain text files: from Parquet on Hugging Face, or from a local copy.

Every remote read goes through fsspec, ``hf://`` by default; GLOWFLOW_HF_MIRROR replaces that prefix by any other
fsspec URL that has the same paths below it. A machine without network learns so within seconds.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glowflow.data.datasets.wikitext import rebuild_lines

__all__ = [
    "PREFIX",
    "HubUnavailable",
    "fetch_parquet_files",
    "fetch_text_files",
    "local_parquet",
    "location",
    "write_text_files",
]

logger = logging.getLogger(__name__)

PREFIX = "hf://"
_TIMEOUT_SECONDS = 5.0
_COPY_BYTES = 4 << 20
_SPLITS = ("train", "validation", "test")


class HubUnavailable(Exception):
    """Why a remote data set could not be read."""


def location(path: str) -> str:
    """The URL of a path of the hub, on the mirror if there is one."""
    prefix = os.environ.get("GLOWFLOW_HF_MIRROR", PREFIX)
    return prefix + ("" if prefix.endswith("/") else "/") + path


def fetch_text_files(folders: Sequence[str], target: Path, *, files: dict[str, str], lines: bool) -> str:
    """Read the Parquet files of a data set and write them as text files into ``target``.

    Args:
        folders: paths on the hub; the first that holds ``{split}-*.parquet`` or ``{split}/*.parquet`` is used.
        target: directory that appears when everything is there.
        files: split -> name of the text file; splits of one name are joined in the order train, validation, test.
        lines: rows are lines of the original file (WikiText).

    Returns:
        The URL that was used.

    Raises:
        HubUnavailable: it can not be reached, or has none of the folders.
    """
    _check_reachable()
    reasons = []
    for folder in folders:
        url = location(folder)
        try:
            if _fetch(url, target, files, lines):
                return url
            reasons.append(f"{url} holds no train Parquet files")
        except Exception as error:  # fsspec backends raise errors of every kind
            first_line = (str(error).splitlines() or ["no message"])[0]
            reasons.append(f"{url}: {type(error).__name__}: {first_line}")
    raise HubUnavailable("; ".join(reasons))


def _fetch(url: str, target: Path, files: dict[str, str], lines: bool) -> bool:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    found = _remote_files(filesystem, root)
    if found:
        logger.info("reading %s", url)
        write_text_files(found, target, files=files, lines=lines, filesystem=filesystem)
    return bool(found)


def _remote_files(filesystem: Any, root: str) -> dict[str, list[str]]:
    root = root.rstrip("/")
    found: dict[str, list[str]] = {}
    for split in _SPLITS:
        for pattern in (f"{root}/{split}-*.parquet", f"{root}/{split}/*.parquet"):
            paths = sorted(str(path) for path in filesystem.glob(pattern))
            if paths and split not in found:
                found[split] = paths
    return found if "train" in found else {}


def fetch_parquet_files(path: str, target: Path) -> None:
    """Copy the Parquet files of a data set, or of a folder of it, as they are.

    Args:
        path: on the hub: ``datasets/OWNER/NAME``, or below.
        target: directory that appears when everything is there; files are named after their splits, if they have any.

    Raises:
        HubUnavailable: it can not be reached, or has no Parquet files there.
    """
    import fsspec

    _check_reachable()
    url = location(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        names = _remote_names(filesystem, root)
        if not names:
            raise HubUnavailable(f"{url} holds no Parquet files")
        for name, remote in names.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with filesystem.open(remote, "rb") as source, (partial / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)
        if not target.exists():  # else another process was faster
            os.replace(partial, target)
    except HubUnavailable:
        raise
    except Exception as error:  # fsspec backends raise errors of every kind
        first_line = (str(error).splitlines() or ["no message"])[0]
        raise HubUnavailable(f"{url}: {type(error).__name__}: {first_line}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remote_names(filesystem: Any, root: str) -> dict[str, str]:
    """Name here -> path there."""
    root = root.rstrip("/")
    for folder in (root, f"{root}/data"):
        if found := _remote_files(filesystem, folder):
            return {
                f"{split}-{number:05d}.parquet": path
                for split, paths in found.items()
                for number, path in enumerate(paths)
            }
    paths = sorted(str(path) for path in filesystem.glob(f"{root}/**/*.parquet"))
    return {path.removeprefix(root).lstrip("/"): path for path in paths}


def local_parquet(directory: Path, subfolders: Iterable[str]) -> dict[str, list[str]]:
    """Parquet files of a local copy in the hub's layout: in the directory or in one of the named subfolders."""
    import fsspec

    filesystem = fsspec.filesystem("file")
    for folder in (directory, *(directory / name for name in subfolders)):
        if found := _remote_files(filesystem, folder.absolute().as_posix()):
            return found
    return {}


def write_text_files(
    parquet: dict[str, list[str]], target: Path, *, files: dict[str, str], lines: bool, filesystem: Any = None
) -> None:
    """Turn Parquet files with a column ``text`` into text files; the directory appears as a whole or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for split in _SPLITS:
            if split in parquet and split in files:
                rows = _text_rows(parquet[split], filesystem)
                with (partial / files[split]).open("a", encoding="utf-8", newline="") as stream:
                    stream.writelines(rebuild_lines(rows) if lines else (row or "" for row in rows))
        if target.exists():  # an incomplete copy, or another process was faster
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _text_rows(paths: list[str], filesystem: Any) -> Iterator[str | None]:
    import fsspec
    import pyarrow.parquet as pq

    filesystem = filesystem or fsspec.filesystem("file")
    for path in paths:
        with filesystem.open(path, "rb") as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()


def _check_reachable() -> None:
    """Ask the hub for anything at all, with a short timeout that also covers name resolution."""
    if "GLOWFLOW_HF_MIRROR" in os.environ:
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise HubUnavailable("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    outcome: list[str] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_TIMEOUT_SECONDS).close()
        except urllib.error.HTTPError:
            outcome.append("")  # it answered
        except Exception as error:
            outcome.append(str(getattr(error, "reason", error)))
        else:
            outcome.append("")

    # A resolver can hang for long and knows no timeout: wait for a thread instead.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_SECONDS + 1)
    if not outcome:
        raise HubUnavailable(f"{endpoint} does not answer within {_TIMEOUT_SECONDS:.0f} s")
    if outcome[0]:
        raise HubUnavailable(f"{endpoint} cannot be reached ({outcome[0]})")
