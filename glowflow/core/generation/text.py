"""From tokens to text while it is written: whole characters only, and nothing of a stop string.

A token may end within a character, and a stop string within a token or after several. What might still become part of
a stop string is held back until it is known not to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_HALF = "\ufffd"  # what decoding gives for bytes that are no whole character (yet)
_CONTEXT = 4  # tokens before the first new one: some tokenizers write a token in another way where a text starts


class TextStream:
    """The text after a prompt, piece by piece.

    ``text`` is all of it so far, ``stopped`` says that a stop string has come: the text ends before it.

    Args:
        decode: ids to text.
        prompt_ids: what stands before, without the token that starts a document.
        stops: strings that end the text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._ids = list(prompt_ids[-_CONTEXT:])  # the last tokens; the first ``_known`` of them are context alone
        self._known = len(self._ids)
        self._read = len(decode(self._ids))  # characters of their text that have been read before
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take in a token; returns what can be shown since the last call."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(_HALF)
        new, self._read = whole[self._read :], max(self._read, len(whole))
        if len(whole) == len(text):
            self._forget()
        return self._show(new)

    def _forget(self) -> None:
        """A character ends here: the tokens since the last such place are context enough for the next ones."""
        context = self._decode(self._ids[self._known :])
        if context:  # not special tokens alone, which stand for no text
            del self._ids[: self._known]
            self._known, self._read = len(self._ids), len(context)

    def finish(self) -> str:
        """No token comes any more; returns what was held back."""
        rest = self._decode(self._ids)[self._read :]
        self._read += len(rest)
        shown, rest = self._show(rest), self._held
        self._held = ""
        self.text += rest
        return shown + rest

    def _show(self, new: str) -> str:
        """What of the text, now ``new`` longer, can no longer become part of a stop string."""
        if self.stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
        else:
            length = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
            shown, self._held = self._held[:length], self._held[length:]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, less than all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
