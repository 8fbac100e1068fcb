"""How right a text is, beside the one that was expected."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from esft.errors import InputError

Pairs = Sequence[tuple[str, str]]  # what was given, and what was expected


def matches(given: str, expected: str) -> bool:
    """Exact match: of the parsed values where the expected answer is a JSON object or list, else of the text."""
    wanted = _parsed(expected)
    if not isinstance(wanted, dict | list):
        return given.strip() == expected.strip()
    found = _parsed(given)
    return found == wanted and all(_right(found, wanted).values())


def _parsed(text: str) -> Any:
    """A JSON value; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or a number too long or nesting too deep to read
        return None


def field_matches(given: str, expected: str) -> dict[str, bool]:
    """Which fields are right, by their path: ``slots.area``, ``rooms.0``; a dot in a name is ``\\.``.

    A field is what is no object or list, or an empty one. Those that only one of the two answers has are wrong. Where
    no JSON object or list is expected, the answer is one field without a name, right where ``matches`` says so.
    """
    wanted = _parsed(expected)
    if not isinstance(wanted, dict | list):
        return {"": matches(given, expected)}
    right = _right(_parsed(given), wanted)
    return {".".join(part.replace(".", "\\.") for part in path): right[path] for path in sorted(right)}


def _right(found: Any, wanted: Any) -> dict[tuple[str, ...], bool]:
    """Which fields are right, by their path. True is not 1 here, though Python says so."""
    ours, theirs = _fields(wanted), _fields(found)
    return {
        path: path in ours
        and path in theirs
        and ours[path] == theirs[path]
        and isinstance(ours[path], bool) == isinstance(theirs[path], bool)
        for path in ours.keys() | theirs.keys()
    }


def _fields(value: Any) -> dict[tuple[str, ...], Any]:
    """Without recursion: what was read may be nested deeply."""
    found, left = {}, [((), value)]
    while left:
        path, value = left.pop()
        if value and isinstance(value, dict):
            left += [((*path, name), each) for name, each in value.items()]
        elif value and isinstance(value, list):
            left += [((*path, str(i)), each) for i, each in enumerate(value)]
        else:
            found[path] = value
    return found


def exact_share(pairs: Pairs) -> float:
    """Share of answers that match."""
    return _mean(matches(*pair) for pair in pairs)


def field_share(pairs: Pairs) -> float:
    """Mean over answers of the share of fields that are right, of those that either answer has."""
    return _mean(_mean(field_matches(*pair).values()) for pair in pairs)


def share_by_field(pairs: Pairs) -> dict[str, float]:
    """Of every field the share of answers that have it right, of those where either has it."""
    found: dict[str, list[bool]] = defaultdict(list)
    for pair in pairs:
        for name, right in field_matches(*pair).items():
            found[name].append(right)
    return {name: _mean(found[name]) for name in sorted(found)}


def chrf(pairs: Pairs) -> float:
    """chrF of all answers together, 0 to 100 (Popovic 2015; sacrebleu's, 6 characters, beta 2)."""
    given, expected = zip(*pairs, strict=True)
    return _library("chrf").CHRF().corpus_score(list(given), [list(expected)]).score


def rouge_l(pairs: Pairs) -> float:
    """Mean F-measure of ROUGE-L, 0 to 1 (Lin 2004; rouge-score's, without stemming). It knows Latin letters only."""
    scorer = _library("rouge_l").RougeScorer(["rougeL"])
    return _mean(scorer.score(expected, given)["rougeL"].fmeasure for given, expected in pairs)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


TEXT_SCORES: dict[str, Callable[[Pairs], float]] = {
    "exact_match": exact_share,
    "json_match": field_share,
    "chrf": chrf,
    "rouge_l": rouge_l,
}
_LIBRARIES = {"chrf": ("sacrebleu.metrics", "sacrebleu"), "rouge_l": ("rouge_score.rouge_scorer", "rouge-score")}


def _library(score: str) -> Any:
    module, package = _LIBRARIES[score]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{score} needs the {package} package: pip install 'esft[eval]'") from error


def check_libraries(scores: Iterable[str]) -> None:
    """Raise InputError where a score needs a library that is not installed."""
    for score in scores:
        if score in _LIBRARIES:
            _library(score)
