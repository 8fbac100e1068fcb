"""What ``esft eval`` left: its file, read strictly, and two of them side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.runs.metrics import LARGEST
from esft.storage.reading import read_json, shown

_TEXTS = ("prompt", "expected", "given")


@dataclass(frozen=True)
class Answer:
    """A record's prompt, the answer it expects, the one the model gave, and whether that is right."""

    prompt: str
    expected: str
    given: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """The outcome of ``esft eval``.

    Attributes:
        figures: its numbers: records, and what was measured.
        answers: of every record, in the data's order; none where only the loss was measured.
    """

    figures: dict[str, float]
    answers: list[Answer]

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Raises InputError naming the file and what is wrong in it."""
        raw = read_json(path)
        if isinstance(raw, dict) and isinstance(raw.get("data"), dict):
            raise InputError(f"{path}: of several sets; a page takes the outcome of one")
        return cls.of(raw, path)

    @classmethod
    def of(cls, raw: Any, path: str | Path) -> Evaluation:
        """The outcome on one set, of a file's JSON value. Raises InputError naming the file and what is wrong in it."""
        if not isinstance(raw, dict) or not raw.keys() >= {"records", "answers"}:
            raise InputError(f"{path}: not an outcome of esft eval")
        if not isinstance(raw["answers"], list):
            raise InputError(f"{path}: answers must be a list, got {shown(raw['answers'])}")
        figures = {name: value for name, value in raw.items() if name not in ("answers", "json_fields")}
        for name, value in figures.items():
            if type(value) not in (int, float) or not abs(value) <= LARGEST:
                raise InputError(f"{path}: {name} is {shown(value)}, no number")
        told = [(i, each) for i, each in enumerate(raw["answers"], 1) if not _is_choice(each)]
        return cls(figures, [_answer(each, f"{path}: answer {i}") for i, each in told])


@dataclass(frozen=True)
class Change:
    """One record before and after; either is None where it was not asked."""

    before: Answer | None
    after: Answer | None

    @property
    def asked(self) -> Answer:
        return self.after or self.before  # type: ignore[return-value]


def changes(before: Evaluation | None, after: Evaluation | None) -> dict[str, list[Change]]:
    """The records by what became of their answers, in the order that interests most; kinds without any are left out.

    Raises InputError where both have answers, and not to the same records.
    """
    old, new = (each.answers if each else [] for each in (before, after))
    if old and new and [(a.prompt, a.expected) for a in old] != [(a.prompt, a.expected) for a in new]:
        raise InputError("the evaluations before and after are not of the same records")
    if old and new:
        kinds = {"right now": [], "wrong now": [], "still wrong": [], "right before and after": []}
        names = {(False, True): "right now", (True, False): "wrong now", (False, False): "still wrong"}
        for a, b in zip(old, new, strict=True):
            kinds[names.get((a.correct, b.correct), "right before and after")].append(Change(a, b))
    else:
        kinds = {"wrong": [], "right": []}
        for answer in old or new:
            kinds["right" if answer.correct else "wrong"].append(Change(answer, None) if old else Change(None, answer))
    return {kind: found for kind, found in kinds.items() if found}


def _is_choice(raw: Any) -> bool:
    """Whether a record's likeliest choice is told, and no answer was given."""
    return isinstance(raw, dict) and "chosen" in raw and "given" not in raw


def _answer(raw: Any, where: str) -> Answer:
    if not isinstance(raw, dict) or not all(isinstance(raw.get(name), str) for name in _TEXTS):
        raise InputError(f"{where}: must have texts {', '.join(_TEXTS)}, got {shown(raw)}")
    if not isinstance(raw.get("correct"), bool):
        raise InputError(f"{where}: correct must be true or false, got {shown(raw.get('correct'))}")
    return Answer(*(raw[name] for name in _TEXTS), raw["correct"])
