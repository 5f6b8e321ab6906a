"""A sheet drawn as PNG: cards in three columns, each in the one that is shortest so far.

All lengths are in points of a page 1,140 wide; the picture has twice as many.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glowflow.data.sheets.cards import Card, Medium, Run, Sheet, runs
from glowflow.data.sheets.lines import set_lines
from glowflow.data.sheets.pictures import fitted, medium_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["png_of"]

_SCALE = 2
_PAGE, _COLUMNS, _GAP, _PAD = 1140, 3, 16, 12
_CARD = (_PAGE - (_COLUMNS + 1) * _GAP) // _COLUMNS
_INNER = _CARD - 2 * _PAD
_PICTURE, _ALONE, _SOUND = (152, 128), (_INNER, 168), (232, 96)  # boxes of the media
_MOST_MEDIA, _MOST_LINES, _MOST_SOURCE = 8, 14, 2
_LINE, _SMALL_LINE = 18, 14
_INK, _GREY, _FAINT, _RED, _EDGE = "#1F2933", "#6B7480", "#9AA3AD", "#B42318", "#D5DAE0"
_CHIPS = {"image": ("#0B5CAD", "#E3EFFB"), "audio": ("#9A4B00", "#FCEBD8")}


@lru_cache(maxsize=8)
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size * _SCALE)


def _measure(text: str, style: str) -> float:
    width: float = _font(13, style in _CHIPS).getlength(text) / _SCALE
    return width


class _Canvas:
    """A white picture and what draws on it, in points."""

    def __init__(self, height: float) -> None:
        import PIL.Image
        import PIL.ImageDraw

        self.image: Image = PIL.Image.new("RGB", (_PAGE * _SCALE, round(height * _SCALE)), "white")
        self._draw: ImageDraw = PIL.ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        color: str = _INK,
        *,
        bold: bool = False,
        anchor: str = "ls",
    ) -> None:
        """``y`` is that of the baseline."""
        self._draw.text((x * _SCALE, y * _SCALE), text, fill=color, font=_font(size, bold), anchor=anchor)

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str | None = None, edge: str | None = None
    ) -> None:
        corners = [round(v * _SCALE) for v in (x, y, x + width, y + height)]
        self._draw.rounded_rectangle(corners, radius=4 * _SCALE, fill=fill, outline=edge, width=_SCALE)

    def paste(self, picture: Image, x: float, y: float) -> None:
        self.image.paste(picture, (round(x * _SCALE), round(y * _SCALE)))


@dataclass(frozen=True)
class _Part:
    """Something of a card that has a height."""

    height: float
    paint: Callable[[_Canvas, float, float], None]


def png_of(sheet: Sheet) -> bytes:
    """The sheet as the bytes of a PNG; of equal sheets they are equal."""
    heading = _heading(sheet)
    placed, bottoms = [], [heading.height] * _COLUMNS
    for card in sheet.cards:
        parts = _parts(card)
        column = bottoms.index(min(bottoms))
        placed.append((card, parts, column, bottoms[column]))
        bottoms[column] += _height(parts) + _GAP
    canvas = _Canvas(max(bottoms))
    heading.paint(canvas, _GAP, 0)
    for card, parts, column, y in placed:
        x = _GAP + column * (_CARD + _GAP)
        canvas.box(x, y, _CARD, _height(parts), edge=_RED if card.bad else _EDGE)
        _paint(canvas, parts, x + _PAD, y + _PAD)
    stream = io.BytesIO()
    canvas.image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _height(parts: Sequence[_Part]) -> float:
    return sum(part.height for part in parts) + 2 * _PAD


def _paint(canvas: _Canvas, parts: Sequence[_Part], x: float, y: float) -> None:
    for part in parts:
        part.paint(canvas, x, y)
        y += part.height


def _heading(sheet: Sheet) -> _Part:
    notes = [_small_lines(note, _PAGE - 2 * _GAP, 11, 4) for note in sheet.notes]
    lines = [line for note in notes for line in note]

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        canvas.text(x, y + 36, sheet.title, 18, bold=True)
        for number, line in enumerate(lines):
            canvas.text(x, y + 58 + number * 16, line, 11, _GREY)

    return _Part(62 + 16 * len(lines), paint)


def _parts(card: Card) -> list[_Part]:
    parts = [_name(card)]
    if card.bad:
        parts.append(_small(f"blank: {card.bad}", _RED, 6))
    if card.media:
        parts += _media_rows(card.media)
    if card.prompt or card.text:
        parts.append(_text(card))
    if card.source:
        parts.append(_small(card.source, _FAINT, _MOST_SOURCE))
    return parts


def _name(card: Card) -> _Part:
    lines = _small_lines(" · ".join(card.facts), _INNER, 11, 3)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        canvas.text(x, y + 12, f"sample {card.number:,}", bold=True)
        for number, line in enumerate(lines):
            canvas.text(x, y + 29 + number * _SMALL_LINE, line, 11, _GREY)

    return _Part(24 + _SMALL_LINE * len(lines), paint)


def _small(text: str, color: str, most: int) -> _Part:
    lines = _small_lines(text, _INNER, 10, most)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        for number, line in enumerate(lines):
            canvas.text(x, y + 12 + number * _SMALL_LINE, line, 10, color)

    return _Part(6 + _SMALL_LINE * len(lines), paint)


def _small_lines(text: str, width: float, size: int, most: int) -> list[str]:
    font = _font(size)
    lines = set_lines([(text, "text")], width, lambda piece, style: font.getlength(piece) / _SCALE, most)
    return ["".join(piece for piece, _ in line).strip() for line in lines]


def _text(card: Card) -> _Part:
    lines = set_lines(runs(card), _INNER, _measure, _MOST_LINES)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        for number, line in enumerate(lines):
            _line(canvas, x, y + 4 + (number + 1) * _LINE - 4, line)

    return _Part(8 + _LINE * len(lines), paint)


def _line(canvas: _Canvas, x: float, y: float, line: Sequence[Run]) -> None:
    for text, style in line:
        width = _measure(text, style)
        if style in _CHIPS:
            color, ground = _CHIPS[style]
            canvas.box(x - 1, y - 12, width + 2, 16, fill=ground)
            canvas.text(x, y, text, color=color, bold=True)
        else:
            canvas.text(x, y, text, color=_GREY if style == "prompt" else _INK)
        x += width


def _media_rows(media: Sequence[Medium]) -> list[_Part]:
    """Two media side by side."""
    box = _ALONE if len(media) == 1 else _PICTURE
    shown = [_medium(medium, box) for medium in media[:_MOST_MEDIA]]
    parts = []
    for first in range(0, len(shown), 2):
        pair = shown[first : first + 2]

        def paint(canvas: _Canvas, x: float, y: float, pair: Sequence[_Part] = pair) -> None:
            for number, part in enumerate(pair):
                part.paint(canvas, x + number * (_INNER - _PICTURE[0]), y)

        parts.append(_Part(max(part.height for part in pair) + 4, paint))
    if len(media) > _MOST_MEDIA:
        parts.append(_small(f"and {len(media) - _MOST_MEDIA} more", _GREY, 1))
    return parts


def _medium(medium: Medium, box: tuple[int, int]) -> _Part:
    told = [(line, _GREY) for line in _told(medium, box[0])]
    told += [(line, _RED) for line in _small_lines(medium.reason, box[0], 10, 5)] if medium.reason else []
    drawn = _drawn(medium, box)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        drawn.paint(canvas, x, y)
        for number, (line, color) in enumerate(told):
            canvas.text(x, y + drawn.height + 12 + number * _SMALL_LINE, line, 10, color)

    return _Part(drawn.height + 6 + _SMALL_LINE * len(told), paint)


def _told(medium: Medium, width: int) -> list[str]:
    prepared = f"{medium.raw} → {medium.prepared}" if medium.prepared else medium.raw
    tokens = [f"{medium.slots:,} tokens"] if medium.slots != 1 else []
    return [line for text in (prepared, *tokens) for line in _small_lines(text, width, 10, 3)]


def _drawn(medium: Medium, box: tuple[int, int]) -> _Part:
    if medium.array is None:
        width, height = _PICTURE[0], 48

        def paint_nothing(canvas: _Canvas, x: float, y: float) -> None:
            canvas.box(x, y, width, height, fill="#F4F5F7", edge=_EDGE)
            canvas.text(x + width / 2, y + height / 2, f"no {medium.modality}", 11, _FAINT, anchor="mm")

        return _Part(height, paint_nothing)
    if medium.modality == "audio":
        return _spectrogram(medium, min(box[0], _SOUND[0]))
    picture = fitted(medium_picture(medium), box[0] * _SCALE, box[1] * _SCALE)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        canvas.paste(picture, x, y)

    return _Part(picture.height / _SCALE, paint)


def _spectrogram(medium: Medium, room: int) -> _Part:
    """With the frequencies at its ends on the left and the seconds below."""
    left, below = 26, 14
    width, height = room - left, _SOUND[1]
    picture = fitted(medium_picture(medium), width * _SCALE, height * _SCALE, stretch=True)
    low, high = (f"{hertz / 1000:.3g}k" if hertz >= 1000 else f"{hertz:.3g}" for hertz in medium.hertz)

    def paint(canvas: _Canvas, x: float, y: float) -> None:
        canvas.paste(picture, x + left, y)
        canvas.text(x + left - 4, y, high, 9, _GREY, anchor="rt")
        canvas.text(x + left - 4, y + height / 2, "Hz", 9, _FAINT, anchor="rm")
        canvas.text(x + left - 4, y + height, low, 9, _GREY, anchor="rs")
        canvas.text(x + left, y + height + 11, "0", 9, _GREY)
        canvas.text(x + left + width, y + height + 11, f"{medium.seconds:.2f} s", 9, _GREY, anchor="rs")

    return _Part(height + below, paint)
