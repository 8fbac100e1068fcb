"""The error a user can mend: bad input, named."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, in one line naming the file, line, argument or value; the command prints it and exits 2."""
