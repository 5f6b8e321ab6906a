"""``fsdd``: 3,000 recordings of spoken digits by six speakers, ``{digit}_{speaker}_{index}.wav``.

The official test part are the recordings of index 0 to 4; here those of index 5 to 9 are for validation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from glowflow.data.datasets.media.columns import compose_known
from glowflow.data.datasets.media.files import cut_rows
from glowflow.data.datasets.media.mnist import WORDS
from glowflow.data.datasets.media.samples import RawSample, load_file
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["COLUMNS", "FILES", "layout", "read", "recordings", "recordings_facts"]

COLUMNS = ("text", "label", "digit", "word", "speaker", "index")
FILES = (("recordings/",),)
_NAME = re.compile(r"^([0-9])_([a-z]+)_([0-9]+)\.wav$")


def recordings(folder: Path) -> dict[str, list[str]]:
    """Split -> names of its files in ``recordings/``, sorted."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in sorted(path.name for path in (folder / "recordings").iterdir()):
        if (match := _NAME.match(name)) is not None:
            index = int(match[3])
            splits["test" if index < 5 else "validation" if index < 10 else "train"].append(name)
    return splits


def recordings_facts(folder: Path) -> FileFacts:
    """Size and hash over all recordings."""
    digest, total, count = hashlib.sha256(), 0, 0
    for name in sorted(name for names in recordings(folder).values() for name in names):
        path = folder / "recordings" / name
        digest.update(f"{name}:{file_sha256(path)};".encode())
        total += path.stat().st_size
        count += 1
    return FileFacts(str(folder / "recordings"), "recordings", "samples", total, digest.hexdigest(), rows=count)


def layout(folders: Mapping[str, Path]) -> tuple[list[FileFacts], dict[str, list[Extent]]]:
    """The recordings, and extents of them per split."""
    folder, document_id = folders["fsdd"], 0
    splits = {}
    for split, names in recordings(folder).items():
        rows = ((n, n + 1, (folder / "recordings" / name).stat().st_size) for n, name in enumerate(names))
        extents = cut_rows(rows, (str(folder), split, "fsdd"))
        splits[split] = [replace(extent, document_id=extent.document_id + document_id) for extent in extents]
        document_id += len(names)
    return [recordings_facts(folder)], {split: extents for split, extents in splits.items() if extents}


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of some recordings of a split."""
    folder = Path(extent.path)
    for number, name in enumerate(recordings(folder)[extent.name][extent.start : extent.end]):
        match = _NAME.match(name)
        assert match is not None, "only such names are listed"
        digit = int(match[1])
        sample = RawSample(extent.document_id + number, f"fsdd/{name}", name, group=name)
        if media:
            try:
                sample = replace(sample, audio=(load_file(folder / "recordings", name),))
            except BadSample as bad:
                yield replace(sample, bad=bad)
                continue
        record = {"text": "", "label": digit, "digit": digit, "word": WORDS[digit]}
        yield compose_known({**record, "speaker": match[2], "index": int(match[3])}, settings, sample)
