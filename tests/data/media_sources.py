"""Sources with media as users have them: folders of pictures, archives, Parquet, idx files, and broken files."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glowflow.config.schema import DataConfig
from glowflow.data.build import BuildOptions, build
from glowflow.data.datasets.catalogue import resolve
from glowflow.data.datasets.media.samples import RawSample, read_samples
from glowflow.data.datasets.source import Source
from glowflow.data.manifest import Manifest
from glowflow.data.shards import read_rows


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Files by their names below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    """An archive of members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_idx(folder: Path, stem: str, pictures: np.ndarray, labels: Sequence[int], *, packed: bool = True) -> None:
    """A pair of idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">IIII", 0x803, *pictures.shape) + pictures.astype(np.uint8).tobytes()
    classes = struct.pack(">II", 0x801, len(labels)) + bytes(labels)
    for name, content in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", classes)):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)


def config_of(tmp_path: Path, **keys: Any) -> DataConfig:
    """The data section, with a cache of its own."""
    return DataConfig.model_validate({"cache_dir": str(tmp_path / "cache"), **keys})


def samples_of(source: Source, split: str | None = None, *, media: bool = True) -> list[RawSample]:
    """The samples of a split, or of all of them."""
    assert source.samples is not None
    names = [split] if split else list(source.splits)
    return [
        sample
        for name in names
        for extent in source.splits.get(name, [])
        for sample in read_samples(extent, source.samples, media=media)
    ]


def read_source(path: Path, tmp_path: Path, **keys: Any) -> list[RawSample]:
    """All samples of a path, in the order of their numbers."""
    found = samples_of(resolve(str(path), config_of(tmp_path, **keys)))
    return sorted(found, key=lambda sample: sample.document_id)


def local_build(source: Path | str, out: Path, tokenizer: str = "bytes", **keys: Any) -> Manifest:
    """Build in this process."""
    options = BuildOptions(**{name: keys.pop(name) for name in ("unit_bytes", "row_group_tokens") if name in keys})
    return build(str(source), out, tokenizer, config=config_of(out.parent, **keys), options=options, use_ray=False)


def stored(manifest: Manifest, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a split, or of all of them, in the order of their numbers."""
    rows: list[dict[str, Any]] = []
    for name in [split] if split else manifest.splits:
        for index, shard in enumerate(manifest.splits[name].shards):
            for group in range(len(shard.row_groups)):
                rows += read_rows(manifest, name, index, group, list(_COLUMNS)).to_pylist()
    return sorted(rows, key=lambda row: row["document_id"])


_COLUMNS = (
    *("document_id", "part", "text", "tokens", "num_tokens", "source", "num_prompt", "images", "audio"),
    *("image_sizes", "audio_lengths", "label", "group", "bad"),
)
