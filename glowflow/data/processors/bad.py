"""What is wrong with one sample: raised by readers and processors, handled by the policy of the data set."""

from __future__ import annotations

__all__ = ["KINDS", "BadSample"]

KINDS = (
    "missing_file",
    "no_data",
    "image_header",
    "image_decode",
    "image_too_large",
    "audio_header",
    "audio_decode",
    "audio_too_long",
    "audio_empty",
    "audio_not_finite",
    "placeholders",
    "text",
)
"""The kinds by which bad samples are counted."""

_LONGEST = 200


class BadSample(Exception):
    """One sample that can not be used; ``str`` gives ``"kind: reason"``.

    It is no error of the user's that ends a program: ``data.on_bad_sample`` says what becomes of it.

    Args:
        kind: one of ``KINDS``.
        reason: why, in plain words; made one printable line of at most 200 characters.
    """

    def __init__(self, kind: str, reason: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of bad sample")
        line = "".join(char if char.isprintable() else "?" for char in " ".join(reason.split()))
        self.kind = kind
        self.reason = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
        # Both as arguments of the base class: that is what crosses process borders.
        super().__init__(kind, self.reason)

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"
