"""``multi30k``: from English to German given the picture, for the lines whose pictures are in flickr8k.

``flickr8k_link.tsv`` says which they are: 6,993 lines for training, 242 for validation, 243 of the test of 2016.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from glowflow.config.errors import DataError, Problem
from glowflow.data.datasets.media import flickr8k
from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.samples import RawSample
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.processors.bad import BadSample

__all__ = ["COLUMNS", "DEFAULT_PROMPT", "FILES", "layout", "read"]

COLUMNS = ("text", "label", "en", "de", "file_name", "line")
DEFAULT_PROMPT = "<image> {en}\n"
_LINKS = "flickr8k_link.tsv"
_SPLITS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
_LANGUAGES = ("en", "de")
FILES = ((_LINKS,), *((f"raw/{name}.{lang}.gz",) for name in _SPLITS.values() for lang in _LANGUAGES))
_LINES_PER_EXTENT = 1024
_SEPARATOR = "\n"  # between the two folders in an extent's path


def layout(folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """The files, and extents of linked lines per split."""
    folder = folders["multi30k"]
    path = _SEPARATOR.join(str(folders[name]) for name in ("multi30k", "flickr8k"))
    sizes = flickr8k.picture_sizes(folders["flickr8k"])
    splits: dict[str, list[Extent]] = {}
    document_id = 0
    for split in _SPLITS:
        links = _links(str(folder), split)
        if not links or max(line for line, _ in links) >= min(
            len(_lines(str(folder), split, one)) for one in _LANGUAGES
        ):
            raise DataError(
                Problem(str(folder / _LINKS), "does not fit the lines of the split", split, "fetch it again")
            )
        for start in range(0, len(links), _LINES_PER_EXTENT):
            chosen = links[start : start + _LINES_PER_EXTENT]
            place = (start, start + len(chosen), document_id + start, sum(sizes.get(name, 0) for _, name in chosen))
            splits.setdefault(split, []).append(Extent(path, split, "samples", *place, reader="multi30k"))
        document_id += len(links)
    files = flickr8k.facts(folder, tuple(names[0] for names in FILES))
    return [*files, *flickr8k.facts(folders["flickr8k"], (flickr8k.ARCHIVE,))], splits


@lru_cache(maxsize=4)
def _links(folder: str, split: str) -> list[tuple[int, str]]:
    """(line, picture) of a split; lines are counted from 0."""
    with (Path(folder) / _LINKS).open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t")
        return [(int(r["line"]), r["flickr8k_image"]) for r in rows if r["multi30k_split"] == _SPLITS[split]]


@lru_cache(maxsize=8)
def _lines(folder: str, split: str, language: str) -> list[str]:
    with gzip.open(Path(folder) / "raw" / f"{_SPLITS[split]}.{language}.gz", "rt", encoding="utf-8") as stream:
        return [line.strip() for line in stream]


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of links."""
    folder, pictures = extent.path.split(_SEPARATOR)
    texts = {language: _lines(folder, extent.name, language) for language in _LANGUAGES}
    with flickr8k.opened_archive(Path(pictures)) as archive:
        for index, (line, name) in enumerate(_links(folder, extent.name)[extent.start : extent.end]):
            full = f"{_SPLITS[extent.name]}:{line}"
            sample = RawSample(extent.document_id + index, full, name, group=name)
            if media:
                try:
                    sample = replace(sample, images=(flickr8k.picture(archive, name),))
                except BadSample as bad:
                    yield replace(sample, bad=bad)
                    continue
            record: dict[str, object] = {language: lines[line] for language, lines in texts.items()}
            record |= {"text": record["de"], "file_name": name, "line": line, "label": None}
            yield compose_known(record, settings, sample, prompt=DEFAULT_PROMPT)
