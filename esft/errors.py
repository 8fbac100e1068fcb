"""The error a user can mend: bad input, named."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, in one line naming the file, line, argument or value; the command prints it and exits 2."""


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
