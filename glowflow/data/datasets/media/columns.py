"""From the columns of a row to a sample: which column is what, templates, conversations, labels.

A column that the config maps is taken; otherwise the first of the usual names that is there. ``{name}`` in
``data.prompt`` and ``data.template`` stands for the text of a column; nothing else in them is interpreted.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glowflow.config.errors import Problem
from glowflow.config.media import PLACEHOLDERS
from glowflow.data.datasets.media.samples import Medium, RawSample, load_file, modality_of
from glowflow.data.datasets.media.settings import SampleSettings
from glowflow.data.processors.bad import BadSample

__all__ = [
    "FILE_NAMES",
    "MEDIA_NAMES",
    "Roles",
    "as_text",
    "compose",
    "compose_known",
    "fill",
    "mapping_problems",
    "named_columns",
]

TEXT_NAMES = (
    *("text", "caption", "captions", "txt", "sentence", "transcription", "transcript", "description"),
    *("messages", "conversations", "conversation"),
)
MEDIA_NAMES = {
    "image": ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_path"),
    "audio": ("audio", "audios", "recording", "speech", "wav", "flac", "ogg", "mp3", "audio_path"),
}
FILE_NAMES = ("file_name", "file", "filename", "path")
"""Columns of captions files that name a picture or a recording, which of them its suffix says."""
LABEL_NAMES = ("label", "cls", "class")
_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.\-]*)\}")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")


def named_columns(template: str | None) -> list[str]:
    """The columns that a prompt or template names."""
    return _NAME.findall(template or "")


def mapping_problems(settings: SampleSettings, columns: Collection[str], where: str) -> list[Problem]:
    """Columns that the config names and the source lacks; ``where`` is the source."""
    hint = f"columns of {where}: {', '.join(sorted(columns)) or 'none'}"
    problems = [
        Problem(f"data.columns.{part}", "names no column of the source", name, hint)
        for part, name in settings.columns.items()
        if name not in columns
    ]
    for key in ("prompt", "template"):
        for name in dict.fromkeys(named_columns(getattr(settings, key))):
            if name not in columns:
                problems.append(Problem(f"data.{key}", f"{{{name}}} is no column of the source", name, hint))
    return problems


@dataclass(frozen=True)
class Roles:
    """Which column is what in a file.

    Args:
        text, label, group: one column each, where there is one.
        media: modality -> its column.
        files: columns that name a file of either modality.
    """

    text: str | None
    label: str | None
    group: str | None
    media: Mapping[str, str]
    files: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        settings: SampleSettings,
        *,
        files: bool = False,
        usable: Callable[[str], bool] = lambda name: True,
    ) -> Roles:
        """The roles of a file's columns.

        Args:
            columns: their names.
            settings: what the config maps.
            files: columns of ``FILE_NAMES`` count too (captions files).
            usable: whether a column that the config does not map may hold media.
        """

        def first(mapped: str | None, names: Sequence[str], fits: Callable[[str], bool] = lambda name: True) -> Any:
            if mapped is not None:
                return mapped
            return next((name for name in names if name in columns and fits(name)), None)

        media = {
            modality: name
            for modality, names in MEDIA_NAMES.items()
            if (name := first(getattr(settings, modality), names, usable)) is not None
        }
        mapped = settings.image is not None or settings.audio is not None
        found = [name for name in FILE_NAMES if name in columns] if files and not mapped else []
        if media:
            found = [name for name in found if name == "file_name"]  # the others may repeat what is there
        return cls(
            text=first(settings.text, TEXT_NAMES),
            label=first(settings.label, LABEL_NAMES),
            group=settings.group,
            media=media,
            files=tuple(found[:1]),
        )

    def columns(self, settings: SampleSettings, *, media: bool) -> list[str]:
        """Every column that is read."""
        wanted = [self.text, self.label, self.group, *named_columns(settings.prompt), *named_columns(settings.template)]
        if media:
            wanted += [*self.media.values(), *self.files]
        return list(dict.fromkeys(name for name in wanted if name is not None))


def compose(
    record: Mapping[str, Any],
    roles: Roles,
    settings: SampleSettings,
    identity: RawSample,
    folder: Path,
    *,
    media: bool = True,
    names: Sequence[str] = (),
) -> RawSample:
    """The sample of one row.

    Args:
        record: its columns.
        roles: which of them is what.
        settings: prompt and template.
        identity: a sample with its number, name and key; its media and group are kept where the row has none.
        folder: what paths in the row are relative to.
        media: whether pictures and recordings are read.
        names: of the classes, where labels are numbers.

    Returns:
        A sample; a bad one where the row can not be used.
    """
    try:
        found: dict[str, tuple[Medium, ...]] = {"image": identity.images, "audio": identity.audio}
        if media:
            for modality, column in roles.media.items():
                found[modality] += _media_of(record.get(column), modality, folder)
            for column in roles.files:
                found = _with_files(found, record.get(column), folder)
        text = as_text(record.get(roles.text), roles.text) if roles.text is not None else ""
        group = as_text(record.get(roles.group), roles.group) if roles.group is not None else ""
        return RawSample(
            identity.document_id,
            identity.name,
            identity.key,
            text=_checked(text if settings.template is None else fill(settings.template, record)),
            prompt=None if settings.prompt is None else _checked(fill(settings.prompt, record)),
            images=found["image"],
            audio=found["audio"],
            label=_label(record.get(roles.label), names) if roles.label is not None else identity.label,
            group=_checked(group) or identity.group,
        )
    except BadSample as bad:
        return RawSample(identity.document_id, identity.name, identity.key, bad=bad)


def compose_known(
    record: Mapping[str, Any], settings: SampleSettings, identity: RawSample, *, prompt: str | None = None
) -> RawSample:
    """The sample of a catalogue entry: columns ``text`` and ``label``, and its own prompt unless the config has one.

    Args:
        record: the columns that the entry offers.
        settings: what the config says.
        identity: the sample with its media.
        prompt: the entry's own, a template.
    """
    roles = Roles(settings.text or "text", settings.label or "label", settings.group, {})
    chosen = settings if settings.prompt is not None else replace(settings, prompt=prompt)
    return compose(record, roles, chosen, identity, Path(), media=False)


def fill(template: str, record: Mapping[str, Any]) -> str:
    """A template with the texts of the columns that it names; an empty column gives nothing."""
    return _NAME.sub(lambda match: as_text(record.get(match[1]), match[1]), template)


def as_text(value: Any, column: str | None = None) -> str:
    """The text of a column's value; a conversation becomes lines ``role: content``.

    Raises:
        BadSample: it is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return _turn(value, column)
    if isinstance(value, Sequence) and not isinstance(value, bytes) and all(isinstance(v, Mapping) for v in value):
        return "\n".join(_turn(turn, column) for turn in value)
    if hasattr(value, "isoformat") or type(value).__name__ == "Decimal":
        return str(value)
    shown = "a list" if isinstance(value, Sequence) and not isinstance(value, bytes) else type(value).__name__
    raise BadSample("text", f"the column {column} holds {shown}, and neither a text nor a conversation")


def _turn(turn: Mapping[str, Any], column: str | None) -> str:
    """One turn of a conversation."""
    role = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    content = next((turn[key] for key in _CONTENT_KEYS if key in turn), None)
    if role is None or content is None:
        raise BadSample("text", f"a turn in the column {column} has no role and content (or from and value)")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_part(part, column) for part in content)
    return f"{role}: {as_text(content, column)}"


def _part(part: Any, column: str | None) -> str:
    """One part of a turn: a text, or a picture or recording that its placeholder stands for."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = str(part.get("type", "text"))
        for modality, placeholder in PLACEHOLDERS.items():
            if kind == modality:
                return placeholder
        if kind == "text":
            return as_text(part.get("text"), column)
    raise BadSample("text", f"a turn in the column {column} has a part that is neither text nor media")


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample("text", f"half a surrogate pair at character {error.start}") from None
    return text


def _label(value: Any, names: Sequence[str]) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and names:
        if value < 0:
            return None  # the hub's mark of rows without a label
        if value >= len(names):
            raise BadSample("text", f"the label {value} has no name: there are {len(names)}")
        return names[value]
    if isinstance(value, (list, dict, bytes)):
        raise BadSample("text", f"the label must be one value, not {type(value).__name__}")
    return None if value is None or value == "" else _checked(str(value))


def _with_files(found: dict[str, tuple[Medium, ...]], value: Any, folder: Path) -> dict[str, tuple[Medium, ...]]:
    """Media of a column that names files of either modality."""
    for name in value if isinstance(value, list) else [value]:
        if name is None or name == "":
            continue
        modality = modality_of(name) if isinstance(name, str) else None
        if modality is None:
            raise BadSample("missing_file", f"{name!r} is no name of a picture or a recording")
        found = {**found, modality: (*found[modality], load_file(folder, name))}
    return found


def _media_of(value: Any, modality: str, folder: Path) -> tuple[Medium, ...]:
    """The media of a column's value: bytes, a path, {bytes, path}, or a list of them."""
    if value is None or value == "":
        return ()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return (Medium(bytes(value), ""),)
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            raise BadSample("missing_file", f"{value} is an address; files must be on this machine")
        return (load_file(folder, value),)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path") or ""
        if data is not None:
            return (Medium(_bytes(data), str(path)),)
        return (load_file(folder, str(path)),) if path else ()
    if isinstance(value, (list, tuple)):
        if any(one is None for one in value):
            raise BadSample("no_data", f"a list of {modality} media holds null")
        return tuple(medium for one in value for medium in _media_of(one, modality, folder))
    raise BadSample("no_data", f"the column of {modality} media holds {type(value).__name__}")


def _bytes(data: Any) -> bytes:
    """Bytes as they are, or as base64 in JSON."""
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadSample("no_data", f"the bytes are no base64: {error}") from None
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise BadSample("no_data", f"the bytes are {type(data).__name__}")
