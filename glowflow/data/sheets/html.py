"""A sheet as one HTML page, with its pictures inside; all texts escaped."""

from __future__ import annotations

from html import escape

from glowflow.data.sheets.cards import Card, Medium, Sheet, runs
from glowflow.data.sheets.pictures import data_uri, medium_picture

__all__ = ["html_of"]

_STYLE = """
:root { --ink: #1f2933; --grey: #6b7480; --edge: #d5dae0; --ground: #ffffff; --bad: #b42318;
  --image: #0b5cad; --image-ground: #e3effb; --audio: #9a4b00; --audio-ground: #fcebd8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --grey: #9aa3ad; --edge: #3b444e; --ground: #15191e; --bad: #ff8a7a;
    --image: #8cc4ff; --image-ground: #10304f; --audio: #ffc38a; --audio-ground: #44290c; } }
body { margin: 1.5rem; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
p { margin: 0; }
.note, .facts, figcaption, .source { color: var(--grey); font-size: .8rem; }
.source { overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; margin-top: 1rem; }
article { border: 1px solid var(--edge); border-radius: 6px; padding: .8rem; display: grid; gap: .5rem;
  align-content: start; min-width: 0; }
article.bad { border-color: var(--bad); }
h2 { font-size: .95rem; margin: 0; }
.media { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; max-width: 100%; }
figure img { display: block; image-rendering: pixelated; max-width: 100%; }
figure.audio img { width: 190px; height: 120px; }
figcaption { max-width: 12rem; }
.reason { color: var(--bad); font-size: .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--grey); }
b.image, b.audio { font-weight: 600; }
b.image { color: var(--image); background: var(--image-ground); border-radius: 3px; }
b.audio { color: var(--audio); background: var(--audio-ground); border-radius: 3px; }
"""
_SIDE = 190  # pixels of the page that the longer side of a picture takes at least, if it has few of its own


def html_of(sheet: Sheet) -> bytes:
    """The page in UTF-8; of equal sheets the bytes are equal."""
    notes = "\n".join(f'<p class="note">{escape(note)}</p>' for note in sheet.notes)
    cards = "\n".join(_card(card) for card in sheet.cards)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(sheet.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(sheet.title)}</h1>
{notes}
<main>
{cards}
</main>
</body>
</html>
"""
    return page.encode("utf-8", errors="replace")


def _card(card: Card) -> str:
    parts = [f"<h2>sample {card.number:,}</h2>", f'<p class="facts">{escape(" · ".join(card.facts))}</p>']
    if card.bad:
        parts.append(f'<p class="reason">blank: {escape(card.bad)}</p>')
    if card.media:
        parts.append('<div class="media">' + "\n".join(_figure(medium) for medium in card.media) + "</div>")
    text = "".join(
        f'<b class="{style}">{escape(piece)}</b>'
        if style in ("image", "audio")
        else f'<span class="{style}">{escape(piece).replace(chr(10), "↵" + chr(10))}</span>'
        for piece, style in runs(card)
    )
    parts.append(f'<p class="text">{text}</p>')
    if card.source:
        parts.append(f'<p class="source">{escape(card.source)}</p>')
    return f'<article class="{"bad" if card.bad else "good"}">\n' + "\n".join(parts) + "\n</article>"


def _figure(medium: Medium) -> str:
    told = [f"{medium.raw} → {medium.prepared}" if medium.prepared else medium.raw]
    picture = ""
    if medium.array is not None:
        made = medium_picture(medium)
        size = ""
        if medium.modality == "image":
            factor = max(1, _SIDE // max(made.size))
            size = f' width="{made.width * factor}"'
        else:
            low, high = medium.hertz
            told.append(f"{low:g} to {high:g} Hz, {medium.seconds:.2f} s")
        picture = f'<img alt="{medium.modality}"{size} src="{data_uri(made)}">'
    if medium.slots != 1:
        told.append(f"{medium.slots:,} tokens")
    reason = f'<div class="reason">{escape(medium.reason)}</div>' if medium.reason else ""
    caption = "<br>".join(escape(line) for line in told)
    return f'<figure class="{medium.modality}">{picture}<figcaption>{caption}</figcaption>{reason}</figure>'
