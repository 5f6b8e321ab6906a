"""Small data sets with media, in the layout that `glowflow data build` writes: tiny pictures, short tones, texts."""

from __future__ import annotations

import io
import wave
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glowflow.data.datasets.scan import SHARD_MARK
from glowflow.data.manifest import Manifest, RowGroupInfo, ShardInfo, SplitInfo, file_sha256
from glowflow.data.processors.audio import audio_facts
from glowflow.data.processors.image import image_facts
from glowflow.data.processors.media_text import MEDIA_TOKENS, MediaTokenizer
from glowflow.data.processors.text import ByteTokenizer, Tokenizer

_FILE = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_SIZES = pa.list_(pa.struct([("height", pa.int32()), ("width", pa.int32())]))
_LENGTHS = pa.list_(pa.struct([("samples", pa.int64()), ("rate", pa.int32())]))
_BYTES = ["images.list.element.bytes", "audio.list.element.bytes"]

MIXED: dict[str, Any] = {
    "model": {
        "arch": "multimodal",
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "image": {"patch": 4, "heads": 2},
        "audio": {"channels": [8, 16], "heads": 2},
    },
    "data": {
        "context": 128,
        "image": {"size": None, "longest": 16, "multiple": 4, "augment": {"flip": 0.5, "brightness": 0.2}},
        "audio": {"rate": 8000, "n_fft": 200, "hop": 80, "mels": 16, "augment": {"time_masks": 1, "time_width": 2}},
        "modality_dropout": 0.2,
        "on_bad_sample": "blank",
    },
}
"""A config whose model reads all that ``mixed_rows`` makes, with everything random turned on."""


@dataclass
class MediaRow:
    """One sample. Its text has one placeholder for each of its media."""

    text: str
    prompt: str = ""
    images: Sequence[bytes] = ()
    audio: Sequence[bytes] = ()
    label: str | None = None
    group: str | None = None
    bad: str | None = None  # "kind: reason" of a sample that was found bad when the data set was built
    facts: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)  # where they shall not be the files' own


def png(height: int = 8, width: int = 8, seed: int = 0, *, gray: bool = False) -> bytes:
    """A picture of smooth random colours."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    shape = (height, width) if gray else (height, width, 3)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tone(seconds: float = 0.1, hertz: float = 440.0, rate: int = 8000) -> bytes:
    """A sine as 16-bit WAV."""
    time = np.arange(round(seconds * rate)) / rate
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((12_000 * np.sin(2 * np.pi * hertz * time)).astype("<i2").tobytes())
    return stream.getvalue()


def mixed_rows(count: int, seed: int = 0, *, sizes: Sequence[int] = (8,)) -> list[MediaRow]:
    """Text alone, with a picture, with a tone, with both, with two pictures, in turn; labels "0" to "4".

    Args:
        count: number of samples.
        seed: of what is in them.
        sizes: heights and widths of pictures are drawn from these.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        kind = number % 5
        pictures = [
            png(int(rng.choice(sizes)), int(rng.choice(sizes)), seed=1000 * seed + 10 * number + k)
            for k in range((0, 1, 0, 1, 2)[kind])
        ]
        tones = [tone(0.05 + 0.01 * rng.integers(0, 8), 200 + 100 * rng.integers(0, 10))] if kind in (2, 3) else []
        words = " ".join(str(word) for word in rng.integers(0, 1000, rng.integers(1, 9)))
        start = "<image>" * len(pictures) + "<audio>" * len(tones)
        prompt, text = (start + " says ", words) if number % 2 else ("", f"{start} {words}")
        rows.append(MediaRow(text, prompt, pictures, tones, label=str(kind), group=f"group {number // 3}"))
    return rows


def write_media_set(
    root: Path,
    splits: Mapping[str, Sequence[MediaRow]],
    *,
    name: str = "media",
    rows_per_group: int = 4,
    groups_per_shard: int = 3,
    base: Tokenizer | None = None,
) -> Manifest:
    """Write samples as Parquet shards with a manifest.

    Args:
        root: directory, made when it is not there.
        splits: samples by split.
        rows_per_group, groups_per_shard: how they are laid out.
        base: the tokenizer of the text; default: bytes.
    """
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = MediaTokenizer(base or ByteTokenizer())
    built, first = {}, 0
    for split, rows in splits.items():
        numbered = list(enumerate(rows, first))
        first += len(numbered)
        groups = [numbered[i : i + rows_per_group] for i in range(0, len(numbered), rows_per_group)]
        shards = [
            _write_shard(root, f"{split}-{i:05d}.parquet", groups[at : at + groups_per_shard], tokenizer)
            for i, at in enumerate(range(0, len(groups), groups_per_shard))
        ]
        built[split] = SplitInfo(
            shards=shards,
            rows=len(rows),
            documents=len(rows),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(len(row.text.encode()) for row in rows),
        )
    every = [row for rows in splits.values() for row in rows]
    manifest = Manifest(
        name, root, tokenizer.spec(), tokenizer.fingerprint, str(tokenizer.dtype), built, media=_media(every)
    )
    manifest.save()
    return manifest


def row_tokens(row: MediaRow, tokenizer: MediaTokenizer) -> tuple[np.ndarray, int]:
    """[bos] + prompt + text + [eos], and how many of them are begin marker and prompt."""
    ends = ([tokenizer.bos_id], [tokenizer.eos_id])
    if row.bad is not None:
        return np.array([*ends[0], *ends[1]], tokenizer.dtype), 1
    prompt, text = tokenizer.encode_sample(row.prompt), tokenizer.encode_sample(row.text)
    return np.concatenate([ends[0], prompt, text, ends[1]]).astype(tokenizer.dtype), 1 + len(prompt)


def _media(rows: Sequence[MediaRow]) -> dict[str, Any]:
    good = [row for row in rows if row.bad is None]
    kinds = Counter(
        "+".join(name for name, media in (("image", row.images), ("audio", row.audio)) if media) or "text"
        for row in good
    )
    bad = [row.bad for row in rows if row.bad is not None]
    return {
        "images": sum(len(row.images) for row in good),
        "audio": sum(len(row.audio) for row in good),
        "samples": {kind: kinds[kind] for kind in ("text", "image", "audio", "image+audio")},
        "labels": sorted({row.label for row in rows if row.label is not None}),
        "bad": {
            "counts": dict(Counter(reason.partition(":")[0] for reason in bad)),
            "first": [["row", *reason.split(": ", 1)] for reason in bad[:10]],
            "skipped": 0,
            "blank": len(bad),
        },
        "placeholders": list(MEDIA_TOKENS),
    }


def _write_shard(
    root: Path, name: str, groups: list[list[tuple[int, MediaRow]]], tokenizer: MediaTokenizer
) -> ShardInfo:
    schema = _schema(tokenizer.dtype)
    infos = []
    with pq.ParquetWriter(root / name, schema, use_dictionary=[*_BYTES, "source"]) as writer:
        for rows in groups:
            encoded = [row_tokens(row, tokenizer) for _, row in rows]
            good = [row if row.bad is None else MediaRow("") for _, row in rows]
            columns = {
                "document_id": [number for number, _ in rows],
                "part": [0] * len(rows),
                "text": ["" if row.bad else row.prompt + row.text for _, row in rows],
                "tokens": [tokens for tokens, _ in encoded],
                "num_tokens": [len(tokens) for tokens, _ in encoded],
                "source": [f"file-{number}" for number, _ in rows],
                "num_prompt": [prompt for _, prompt in encoded],
                "images": [_files(row.images, ".png") for row in good],
                "audio": [_files(row.audio, ".wav") for row in good],
                "image_sizes": [_named(_sizes(row), ("height", "width")) for row in good],
                "audio_lengths": [_named(_lengths(row), ("samples", "rate")) for row in good],
                "label": [row.label for _, row in rows],
                "group": [row.group for _, row in rows],
                "bad": [row.bad for _, row in rows],
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
            media_bytes = sum(len(one) for row in good for one in (*row.images, *row.audio))
            infos.append(RowGroupInfo(len(rows), sum(len(tokens) for tokens, _ in encoded), media_bytes))
    path = root / name
    return ShardInfo(
        path=name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        rows=sum(info.rows for info in infos),
        tokens=sum(info.tokens for info in infos),
        row_groups=infos,
    )


def _schema(dtype: np.dtype[Any]) -> pa.Schema:
    fields = [
        ("document_id", pa.int64()),
        ("part", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.from_numpy_dtype(dtype))),
        ("num_tokens", pa.int32()),
        ("source", pa.string()),
        ("num_prompt", pa.int32()),
        ("images", _FILE),
        ("audio", _FILE),
        ("image_sizes", _SIZES),
        ("audio_lengths", _LENGTHS),
        ("label", pa.string()),
        ("group", pa.string()),
        ("bad", pa.string()),
    ]
    return pa.schema(fields, metadata={SHARD_MARK: b"1"})


def _files(contents: Sequence[bytes], suffix: str) -> list[dict[str, Any]]:
    return [{"bytes": content, "path": f"{number}{suffix}"} for number, content in enumerate(contents)]


def _named(facts: list[tuple[int, int]], names: tuple[str, str]) -> list[dict[str, int]]:
    return [dict(zip(names, pair, strict=True)) for pair in facts]


def _sizes(row: MediaRow) -> list[tuple[int, int]]:
    return row.facts.get("image") or [image_facts(content, 1 << 30) for content in row.images]


def _lengths(row: MediaRow) -> list[tuple[int, int]]:
    return row.facts.get("audio") or [audio_facts(content, 1e9) for content in row.audio]
