"""WebDataset: tar files in which neighbouring members of one name before the first dot are one sample.

``000.jpg``, ``000.txt``, ``000.json``, ``000.cls``: pictures and recordings by their suffix, text from ``txt`` or
``caption``, the fields of ``json`` as columns, ``cls`` as the label. Compressed archives are read from their beginning.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from glowflow.config.errors import DataError, Problem
from glowflow.config.media import MODALITIES
from glowflow.data.datasets.media.columns import Roles, as_text, compose
from glowflow.data.datasets.media.files import SampleFile, cut_rows
from glowflow.data.datasets.media.samples import Medium, RawSample, is_selected, modality_of, plain
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.datasets.source import Extent, FileFacts
from glowflow.data.manifest import file_sha256
from glowflow.data.processors.bad import BadSample

__all__ = ["has_media", "is_tar", "read", "scan"]

_MEMBER = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")
_TEXTS = ("txt", "text", "caption", "cls")
_LARGEST_MEMBER = (1 << 31) - 1
_MEMBERS_LOOKED_AT = 64
_LOOKED_AT = 16  # samples that tell which columns there are
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError)
Content = bytes | BadSample


@dataclass
class _Group:
    """The members of one sample: suffix -> content, as far as it was asked for."""

    key: str
    begin: int
    end: int = 0
    members: dict[str, Content] = field(default_factory=dict)
    bad: BadSample | None = None


def is_tar(path: Path) -> bool:
    """Whether it is an archive by its name."""
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def has_media(path: Path) -> bool:
    """Whether one of the first members of an archive is a picture or a recording."""
    try:
        with path.open("rb") as stream:
            members = itertools.islice(_members(stream, path, 0), _MEMBERS_LOOKED_AT)
            return any(modality_of(member.name) is not None for _, member, _ in members)
    except (DataError, _Damaged, OSError):
        return False


def scan(path: Path, name: str, settings: SampleSettings) -> SampleFile:
    """An archive whose headers are read: where its samples begin.

    Raises:
        DataError: it is no archive, or the members of a sample lie apart from each other.
    """
    facts = FileFacts(str(path), name, "samples", path.stat().st_size, file_sha256(path))
    seen: set[str] = set()
    columns: dict[str, None] = {}

    def rows() -> Iterator[tuple[int, int, int]]:
        for group in _groups(path, 0, None, _first_few(seen)):
            if group.key in seen:
                hint = "sort them by name when you write it: tar --sort=name"
                rule = "the members of a sample must be next to each other"
                raise DataError(Problem(str(path), rule, group.key, hint))
            seen.add(group.key)
            if len(seen) <= _LOOKED_AT:
                columns.update(dict.fromkeys(_columns(group)))
            yield group.begin, group.end, group.end - group.begin

    extents = tuple(cut_rows(rows(), (str(path), name, "tar")))
    if _compressed(path) and extents:  # there is no way into the middle
        whole = replace(extents[0], end=extents[-1].end, size=sum(extent.size for extent in extents))
        extents = (whole,)
    return SampleFile(replace(facts, rows=len(seen)), extents, tuple(columns))


def _first_few(seen: set[str]) -> Callable[[str, str], bool]:
    """Contents of JSON members are looked at only at the beginning of an archive."""
    return lambda key, suffix: len(seen) < _LOOKED_AT and suffix.endswith("json")


def _columns(group: _Group) -> list[str]:
    fields: dict[str, Any] = {}
    for suffix, content in group.members.items():
        if suffix.endswith("json") and isinstance(content, bytes):
            try:
                fields.update(_json_fields(content))
            except BadSample:
                continue
    return [*group.members, *fields]


def read(extent: Extent, settings: SampleSettings, *, media: bool) -> Iterator[RawSample]:
    """The samples of a range of an archive; what can not be read is a bad sample."""

    def wanted(key: str, suffix: str) -> bool:
        if settings.group is None and not is_selected(extent, plain(f"{extent.name}:{key}")):
            return False
        return media or modality_of(f"x.{suffix}") is None

    for row, group in enumerate(_groups(Path(extent.path), extent.start, extent.end, wanted)):
        sample = _sample(extent, row, group, settings, media)
        if is_selected(extent, sample.key):
            yield sample


def _sample(extent: Extent, row: int, group: _Group, settings: SampleSettings, media: bool) -> RawSample:
    name = plain(f"{extent.name}:{group.key}")
    identity = RawSample(extent.document_id + row, name, name)
    try:
        if group.bad is not None:
            raise group.bad
        record = _record(group)
        if settings.group is not None and record.get(settings.group) is not None:
            identity = replace(identity, key=plain(f"group:{as_text(record[settings.group])}"))
        if media:
            images, audio = (_media(group, settings, modality) for modality in MODALITIES)
            identity = replace(identity, images=images, audio=audio)
    except BadSample as bad:
        return replace(identity, bad=bad)
    roles = replace(Roles.of(tuple(record), settings), media={})
    texts = [suffix for suffix in group.members if suffix in record]  # a member comes before a field of the JSON
    text = settings.text or next((suffix for suffix in texts if suffix != "cls"), roles.text)
    label = settings.label or ("cls" if "cls" in texts else roles.label)
    roles = replace(roles, text=text, label=label)
    return compose(record, roles, settings, identity, Path(extent.path).parent, media=False)


def _record(group: _Group) -> dict[str, Any]:
    """The columns of a sample: the fields of its JSON, and its texts by their suffixes."""
    fields: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for suffix, content in group.members.items():
        last = suffix.rpartition(".")[2]
        if isinstance(content, BadSample):
            raise content
        if last == "json":
            fields.update(_json_fields(content))
        elif last in _TEXTS:
            texts[suffix] = _decoded(content, suffix)
    return {**fields, **texts}


def _json_fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("text", f"the member json is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadSample("text", "the member json must be an object")
    return fields


def _decoded(content: bytes, suffix: str) -> str:
    try:
        return content.decode("utf-8-sig").strip("\r\n") if suffix != "cls" else content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("text", f"the member {suffix} is not UTF-8 at byte {error.start}") from None


def _media(group: _Group, settings: SampleSettings, modality: str) -> tuple[Medium, ...]:
    """The members of a modality: all of them, or those of the suffix that the config maps."""
    mapped: str | None = getattr(settings, modality)
    return tuple(
        Medium(content, f"{group.key}.{suffix}")
        for suffix, content in group.members.items()
        if modality_of(f"x.{suffix}") == modality
        and not isinstance(content, BadSample)
        and (mapped is None or mapped.lower() in (suffix, suffix.rpartition(".")[2]))
    )


# --- the archive ---------------------------------------------------------------------------------------------------


def _compressed(path: Path) -> bool:
    return not path.name.lower().endswith(".tar")


def _groups(path: Path, start: int, end: int | None, wanted: Callable[[str, str], bool]) -> Iterator[_Group]:
    """The samples whose first header lies in [start, end), with the contents of the members that are wanted."""
    group: _Group | None = None
    with path.open("rb") as stream:
        try:
            for begin, member, archive in _members(stream, path, start):
                if end is not None and begin >= end:
                    break
                match = _MEMBER.match(member.name)
                if match is None or member.isdir():
                    continue
                key, suffix = match[1], match[2].lower()
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key, begin)
                group.members[suffix] = _content(archive, member) if wanted(key, suffix) else b""
                group.end = archive.offset
        except _Damaged as damage:
            yield from _with_damage(group, damage)
            return
    if group is not None:
        yield group


def _with_damage(group: _Group | None, damage: _Damaged) -> Iterator[_Group]:
    """What stands at the end of an archive that is cut off or garbled."""
    bad = BadSample("no_data", str(damage))
    if group is not None:
        group.end = damage.offset
        if damage.inside:
            group.bad = bad
            yield group
            return
        yield group
    yield _Group(f"byte {damage.offset}", damage.offset, damage.offset + 1, bad=bad)


class _Damaged(Exception):
    """The archive can not be read from ``offset`` on; ``inside``: the last member's content is cut off."""

    def __init__(self, offset: int, inside: bool) -> None:
        what = "is cut off" if inside else "is damaged"
        super().__init__(f"the archive {what} at byte {offset}; what follows is lost")
        self.offset = offset
        self.inside = inside


def _members(stream: BinaryIO, path: Path, start: int) -> Iterator[tuple[int, tarfile.TarInfo, tarfile.TarFile]]:
    """(where its header begins, member, archive), none of them kept."""
    stream.seek(start)
    try:
        archive = tarfile.open(fileobj=stream, mode="r|gz" if _compressed(path) else "r:")
    except _DAMAGE as error:
        if start == 0:
            raise DataError(Problem(str(path), f"is no readable tar file: {error}")) from error
        raise _Damaged(start, False) from error
    before = start
    with archive:
        while True:
            try:
                member = archive.next()
            except _DAMAGE as error:
                raise _Damaged(before, True) from error
            archive.members = []  # type: ignore[attr-defined]  # else every header is kept
            if member is None:
                if not _compressed(path) and not _ends_well(stream, archive.offset):
                    raise _Damaged(archive.offset, False)
                return
            yield before, member, archive
            before = archive.offset


def _ends_well(stream: BinaryIO, offset: int) -> bool:
    """Whether an archive ends with zeros, or with the file; the library takes a garbled header for the end."""
    stream.seek(offset)
    return not stream.read(tarfile.BLOCKSIZE).strip(b"\0")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    if not member.isreg() or member.sparse is not None:
        return BadSample("no_data", f"the member {member.name} is a link or has holes")
    if member.size > _LARGEST_MEMBER:
        return BadSample("no_data", f"the member {member.name} has {member.size} bytes")
    try:
        file = archive.extractfile(member)
        content = file.read() if file is not None else b""
    except _DAMAGE as error:
        return BadSample("no_data", f"the member {member.name} cannot be read: {error}")
    if len(content) != member.size:
        return BadSample("no_data", f"the member {member.name} is cut off")
    return content
