"""One file that is a whole page: it loads nothing, runs no script but its own, and shows texts of others as texts."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from esft.errors import InputError
from esft.reporting import figures
from esft.reporting.pictures import heat_colours
from esft.storage.files import write_text
from esft.text import printable

MARKER = '<meta name="generator" content="esft report">'
_WITHIN = 512  # first bytes of a page, which have the marker


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """A page from the template of this name. Raises DiskError when the file cannot be written."""
    environment = _environment()
    files = {name: Markup(_source(name)) for name in ("page.css", "page.js")}
    style = Markup(files["page.css"] + _heat_rules())
    values |= {"style": style, "script": files["page.js"], "policy": _policy(style, files["page.js"])}
    write_text(path, environment.get_template(template).render(marker=Markup(MARKER), **values))


def check_page(path: Path) -> None:
    """Raise InputError for a file that is no page of ``write_page``."""
    with open(path, "rb") as file:
        if MARKER.encode() not in file.read(_WITHIN):
            raise InputError("not a page that esft has written")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("esft.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters |= {"figure": figures.figure, "share": figures.share, "size": figures.size}
    return environment


def _shown(value: Any) -> Any:
    """What stands in a template's place for a value: of a text, nothing that moves a cursor or is no character."""
    return printable(value, kept="\n\t") if type(value) is str else value


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _heat_rules() -> str:
    rules = (f".heat{i}{{background:{back};color:{ink}}}" for i, (back, ink) in enumerate(heat_colours()))
    return "\n".join(rules)


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: nothing is loaded; this style and this script, by their hashes, and no other."""
    return "; ".join(
        (
            "default-src 'none'", "img-src data:", f"style-src {_hashed(style)}", f"script-src {_hashed(script)}",
            "base-uri 'none'", "form-action 'none'",
        )
    )  # fmt: skip


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
