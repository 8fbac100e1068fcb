"""``python -m esft`` is the ``esft`` command."""

from esft.cli.parser import entry

if __name__ == "__main__":
    entry()
