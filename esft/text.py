"""Texts that somebody else has written, so that they can be shown: nothing in them moves a cursor or turns a line."""

from __future__ import annotations

import unicodedata

# Characters that turn the direction of what follows: a name could be shown as another.
_TURNS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")


def printable(text: str, kept: str = "") -> str:
    """A text with control characters, line ends and half surrogates as escapes, but for the characters to be kept."""
    return "".join(_escaped(c) if c not in kept and _is_unseen(c) else c for c in text)


def _is_unseen(character: str) -> bool:
    return character in _TURNS or unicodedata.category(character) in _UNSEEN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
