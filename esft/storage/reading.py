"""Reading text, JSON and YAML strictly: what could be meant in two ways, or never ends, is an error that says where."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from esft.errors import InputError
from esft.storage.limits import DEPTH, JSON_BYTES, NESTED, SETTINGS_BYTES, SHOWN

_NULL, _TEXT = "tag:yaml.org,2002:null", re.compile(r"tag:yaml\.org,2002:(null|str|int|float|bool)")
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = SHOWN


def shown(value: Any) -> str:
    """A bad value for a message: its repr, cut where it is long."""
    return _brief.repr(value)


def check_name(path: str | Path) -> None:
    """Raise InputError for what is no path: a name that is empty, too long, too deep or holds a null byte."""
    if not str(path):
        raise InputError("'': is no path")
    if len(Path(path).parts) > DEPTH:
        raise InputError(f"{shown(str(path))}: lies more than {DEPTH} folders deep")
    try:
        os.lstat(path)
    except ValueError as error:
        raise InputError(f"{shown(str(path))}: {error}") from error
    except OSError as error:  # any other is told by who opens it
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{shown(str(path))}: {error.strerror}") from error


def check_regular(path: str | Path) -> int:
    """The size of a regular file in bytes.

    Raises InputError for one that is missing, and for pipes and devices, whose reading may never end.
    """
    if not str(path):  # which pathlib takes for the working folder
        raise InputError("'': is no path")
    try:
        found = Path(path).stat()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: Is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is no regular file, and is not read")
    return found.st_size


def read_text(path: str | Path, encoding: str = "utf-8", most: float = math.inf) -> str:
    """The file's text. Raises InputError when it cannot be read, is no regular file, or has over ``most`` bytes."""
    if (size := check_regular(path)) > most:
        raise InputError(f"{path}: has {size:,} bytes; at most {most:,} are read")
    try:
        return Path(path).read_text(encoding=encoding)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def read_json(path: str | Path) -> Any:
    """The file's JSON value, see ``parse_json``."""
    return parse_json(read_text(path, most=JSON_BYTES), str(path))


def parse_json(text: str, where: str, lines: bool = True) -> Any:
    """The JSON value of a text.

    Args:
        where: file, or file and line, for the message.
        lines: whether the message names the text's line too.

    Raises InputError for what is no JSON, has a key twice, a number that is not finite or has thousands of digits, or
    is nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{where}: has the key {shown(twice)} twice")
        return found

    def no_number(word: str) -> float:
        raise InputError(f"{where}: {word} is no JSON number")

    def finite(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise InputError(f"{where}: {shown(digits)[1:-1]} is beyond the largest number")
        return value

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number, parse_float=finite)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: {f'line {error.lineno}: ' if lines else ''}not JSON ({error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON that is nested too deeply") from error
    except ValueError as error:  # Python's own limit
        raise InputError(f"{where}: holds a whole number of thousands of digits") from error


def read_settings(path: str | Path) -> dict[str, tuple[str | None, int]]:
    """A YAML file of one mapping from names to single values -> the text of each value, None for null, and its line.

    Numbers stay text: YAML's own rules read 1e-5 as a word and 1:30 as ninety. Raises InputError for anything else, for
    a name that comes twice, and for anchors and tags of other kinds.
    """
    top = _composed(read_text(path, "utf-8-sig", SETTINGS_BYTES), str(path), _Plain)
    if top is None or (isinstance(top, yaml.ScalarNode) and top.tag == _NULL):
        return {}
    if not isinstance(top, yaml.MappingNode):
        raise InputError(f"{path}: not a mapping of settings")
    found: dict[str, tuple[str | None, int]] = {}
    for name, value in top.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise InputError(f"{path}: line {line}: a setting's name must be a word")
        if name.value in found:
            raise InputError(
                f"{path}: line {line}: {shown(name.value)} is set twice, first in line {found[name.value][1]}"
            )
        if not isinstance(value, yaml.ScalarNode) or not _TEXT.fullmatch(value.tag):
            raise InputError(f"{path}: line {line}: {shown(name.value)} must have a single plain value")
        found[name.value] = (None if value.tag == _NULL else value.value), line
    return found


def texts_below(text: str, names: Collection[str], where: str) -> Iterator[str]:
    """Every single value at any depth below any mapping's entry of one of the names, in a YAML text.

    Raises InputError for what is no YAML; ``where`` is for its message.
    """
    top = _composed(text, where, _Shallow)
    waiting, seen = [] if top is None else [(top, False)], set[tuple[int, bool]]()
    while waiting:
        node, below = waiting.pop()
        if (id(node), below) in seen:  # of an anchor
            continue
        seen.add((id(node), below))
        if isinstance(node, yaml.ScalarNode) and below:
            yield node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [(value, below or key.value in names) for key, value in node.value]
            waiting += [(key, below) for key, _ in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(each, below) for each in node.value]


def _composed(text: str, where: str, loader: type[yaml.SafeLoader]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        at = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: {at}not YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise InputError(f"{where}: YAML that is nested too deeply") from error


class _Shallow(yaml.SafeLoader):
    """Nodes in few levels: each open bracket is looked at again at every further one, and thousands take minutes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > NESTED:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Plain(_Shallow):
    """Nodes without anchors, of which a few lines unfold to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if event.anchor is not None:
            raise yaml.composer.ComposerError(None, None, "anchors are not supported", event.start_mark)
        return super().compose_node(parent, index)


def key_number(text: Any, below: int) -> int | None:
    """The whole number that a JSON key is, written as Python writes it; None for anything else or one not below."""
    plain = isinstance(text, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", text)
    return int(text) if plain and int(text) < below else None


def check_keys(found: Iterable[Any], known: Iterable[str], complain: Callable[[str], InputError]) -> None:
    """Raise the complaint about the first key that is not known, with the known one that it is most like."""
    known = list(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise complain(
                f"{shown(key)}" + (f" (is {near[0]!r} meant?)" if near else f"; there are {', '.join(known)}")
            )
