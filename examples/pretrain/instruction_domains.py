"""Fields with spoken surfaces and normalised values, and a grammar of requests and reports over many everyday domains.

instruction_domains.txt has one line per action:
`label + optional clauses = phrase; phrase; ...` with (a|b) and [optional] parts and {key:field} gaps.
Homes, devices, lamps, climate, timers, playback, shopping lists and weather queries are left out:
downstream tasks live there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from examples.pretrain.instruction_words import (
    ANIMALS,
    CITIES,
    COLORS,
    DAYS,
    FIRST,
    FOODS,
    GOODS_ADJ,
    LAST,
    MONTHS,
    NOUNS,
    TOPICS,
    Lexicon,
    code,
    digits,
    expand,
    novel,
    number_words,
    ordinal,
    pick,
    word,
)

Surface = tuple[str, "str | int"]

ENUMS = {
    "size": "small=small,tiny,little;medium=medium,mid-sized,regular;large=large,big,huge",
    "priority": "low=low,minor,unimportant;normal=normal,ordinary,usual;high=high,urgent,top",
    "status": "open=open,unsolved,pending;done=done,finished,completed;blocked=blocked,stuck,on hold",
    "cabin": "economy=economy,coach,cheap;business=business;first=first,luxury",
    "speed": "standard=standard,normal,regular;express=express,fast,quick;overnight=overnight",
    "currency": "USD=dollars,bucks;EUR=euros;GBP=pounds;JPY=yen",
    "taste": "mild=mild,not spicy;medium=medium hot;hot=hot,very spicy",
    "seat": "window=window,by the window;aisle=aisle,on the aisle;middle=middle",
    "channel": "email=email,mail;sms=text message,sms;phone=phone,phone call",
    "level": "beginner=beginner,starter,easy;intermediate=intermediate,middle;advanced=advanced,expert,hard",
    "repeat": "daily=day,single day;weekly=week;monthly=month;yearly=year",
    "payment": "card=card,credit card;cash=cash;transfer=bank transfer,wire",
    "direction": "north=north,northern;south=south,southern;east=east,eastern;west=west,western",
    "condition": "new=new,brand new,unused;used=used,second hand,old;broken=broken,damaged,faulty",
}
PLACES = (
    "market library station harbour museum park office school bakery hospital castle tower airport beach stadium"
).split()
FIXED = {
    "color": COLORS, "food": FOODS, "month": [m.lower() for m in MONTHS], "animal": ANIMALS,
    "job": TOPICS["profession"],
    "country": TOPICS["country"], "sport": "football tennis hockey chess rugby golf boxing handball".split(),
    "genre": "rock jazz folk blues metal classical pop opera".split(),
    "unit": "grams kilos litres cups spoons ounces".split(),
    "language": "english german french spanish italian polish dutch greek".split(), "vehicle": TOPICS["vehicle"],
    "subject": "math history biology music art physics chemistry latin geography".split(),
    "sky": "sunny cloudy foggy rainy stormy snowy windy".split(),
    "position": "goalkeeper defender striker captain".split(),
    "tool": TOPICS["tool"], "instrument": TOPICS["instrument"], "place": PLACES,
}  # fmt: skip


def _number(rng: Random, low: int, high: int) -> Surface:
    n = rng.randint(low, high)
    return (number_words(n) if rng.random() < 0.6 else str(n)), n


def _copy(text: str) -> Surface:
    return text, text


def _time(rng: Random) -> Surface:
    hour, pm = rng.randint(1, 11), rng.random() < 0.5
    value, shape = hour + 12 * pm, rng.random()
    part = (
        pick(rng, [" pm", " in the afternoon" if hour < 6 else " in the evening"])
        if pm
        else pick(rng, [" am", " in the morning"])
    )
    name = number_words(hour) if rng.random() < 0.6 else str(hour)
    if shape < 0.5:
        return name + part, f"{value:02}:00"
    if shape < 0.7:
        return f"half past {name}{part}", f"{value:02}:30"
    if shape < 0.8:
        return f"quarter past {name}{part}", f"{value:02}:15"
    minute = rng.randint(1, 59)
    return f"{value}:{minute:02}", f"{value:02}:{minute:02}"


def _date(rng: Random) -> Surface:
    m, d = rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[m - 1]
    day = ordinal(d) if rng.random() < 0.5 else str(d)
    return pick(rng, [f"{name} {day}", f"{day} {name}", f"the {ordinal(d)} of {name}"]), f"{m:02}-{d:02}"


def _person(rng: Random, lex: Lexicon) -> Surface:
    first = pick(rng, FIRST) if rng.random() < 0.7 else novel(rng).capitalize()
    return _copy(
        first if rng.random() < 0.6 else f"{first} {pick(rng, LAST) if rng.random() < 0.7 else novel(rng).capitalize()}"
    )


def _item(rng: Random, lex: Lexicon) -> Surface:
    x = rng.random()
    noun = pick(rng, NOUNS) if x < 0.6 else word(rng, lex) if x < 0.8 else novel(rng)
    return _copy(
        noun if rng.random() < 0.55 else f"{pick(rng, GOODS_ADJ) if rng.random() < 0.6 else word(rng, lex)} {noun}"
    )


def _title(rng: Random, lex: Lexicon) -> Surface:
    return _copy(" ".join(word(rng, lex) for _ in range(rng.choice([1, 2, 2, 3, 3, 4]))))


def _name(rng: Random, lex: Lexicon) -> Surface:
    return _copy(
        novel(rng).capitalize()
        if rng.random() < 0.5
        else " ".join(word(rng, lex).capitalize() for _ in range(rng.randint(1, 2)))
    )


def _enum(spec: str) -> Callable[[Random, Lexicon], Surface]:
    pairs = [(s, v) for entry in spec.split(";") for v, names in [entry.split("=")] for s in names.split(",")]
    return lambda rng, lex: pick(rng, pairs)


def _fixed(values: list[str]) -> Callable[[Random, Lexicon], Surface]:
    return lambda rng, lex: _copy(pick(rng, values) if rng.random() < 0.8 else novel(rng))


FIELDS: dict[str, Callable[[Random, Lexicon], Surface]] = {
    "person": _person, "item": _item, "title": _title, "name": _name,
    "city": lambda r, _: _copy(pick(r, CITIES) if r.random() < 0.7 else novel(r).capitalize()),
    "qty": lambda r, _: _number(r, 2, r.choice([9, 20, 99])), "big": lambda r, _: _number(r, 2, 990),
    "rating": lambda r, _: _number(r, 1, 5) if r.random() < 0.9 else _number(r, 6, 10),
    "percent": lambda r, _: _number(r, 1, 100), "day": lambda r, _: (lambda d: (d, d.lower()))(pick(r, DAYS)),
    "time": lambda r, _: _time(r), "date": lambda r, _: _date(r), "code": lambda r, _: _copy(code(r)),
    "phone": lambda r, _: _copy(digits(r, 4, 8)), "word": lambda r, lex: _copy(word(r, lex)),
    **{k: _enum(v) for k, v in ENUMS.items()}, **{k: _fixed(v) for k, v in FIXED.items()},
}  # fmt: skip

CLAUSES = {
    "color": "in {color}; in the colour {color}", "size": "in size {size}; in a {size} size",
    "day": "on {day}; this {day}", "time": "at {time}",
    "date": "on {date}", "person": "for {person}", "with": "(together with|with) {with:person}", "city": "in {city}",
    "from": "from {from:city}",
    "note": 'with the note "{note:title}"; and say "{note:title}"', "priority": "with {priority} priority",
    "price": "for {price:big} {currency}",
    "speed": "by {speed} delivery; with {speed} shipping", "cabin": "in {cabin} class", "seat": "with a {seat} seat",
    "code": "with code {code}",
    "qty": "for {qty} people", "rating": "with {rating} stars", "payment": "and pay by {payment}",
    "channel": "by {channel}", "repeat": "every {repeat}",
    "level": "at {level} level", "place": "at the {place}; near the {place}", "taste": "and make it {taste}",
    "genre": "in the {genre} style",
    "language": "in {language}", "month": "in {month}", "minutes": "for {minutes:qty} minutes",
    "version": "in version {version:qty}", "weight": "weighing {weight:big} kilos",
    "status": "as {status}", "subject": "in {subject}", "condition": "in {condition} condition",
    "phone": "at number {phone}", "extra": "with (extra|more) {extra:word}",
}  # fmt: skip

GRAMMAR = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")

GAP = re.compile(r"\{(\w+)(?::(\w+))?\}")


@dataclass(frozen=True)
class Action:
    """One label of a domain with its phrases and optional clauses."""

    label: str
    clauses: tuple[str, ...]
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A set of actions with a fixed order of keys; `statement` domains take no "please"."""

    name: str
    statement: bool
    actions: tuple[Action, ...]
    keys: tuple[str, ...]


def _domains() -> list[Domain]:
    found: list[tuple[str, list[Action]]] = []
    for line in GRAMMAR.strip().splitlines():
        if line.startswith("#"):
            found.append((line[1:].strip(), []))
            continue
        head, _, phrases = line.partition(" = ")
        label, _, clauses = head.partition("+")
        found[-1][1].append(Action(label.strip(), tuple(clauses.split()), tuple(p.strip() for p in phrases.split(";"))))
    out = []
    for name, actions in found:
        texts = [p for a in actions for p in (*a.phrases, *(CLAUSES[c] for c in a.clauses))]
        keys = tuple(dict.fromkeys(m[1] for text in texts for m in GAP.finditer(text)))
        statement = name.endswith(" statement")
        out.append(Domain(name.removesuffix(" statement"), statement, tuple(actions), keys))
    return out


DOMAINS = _domains()
POLITE = (
    "please {s}",
    "can you {s}",
    "{s} please",
    "hi, {s}",
    "{s}, thanks",
    "i'd like this: {s}",
    "could you {s}",
    "hey, {s} now",
)


@dataclass(frozen=True)
class Request:
    """A sentence of a domain, its action, and its values in the order of the domain's keys."""

    domain: Domain
    action: Action
    text: str
    values: dict[str, str | int]
    surfaces: dict[str, str]


def request(rng: Random, lex: Lexicon, domain: Domain | None = None) -> Request:
    """A random sentence: phrase, up to three optional clauses in random order, case and politeness."""
    domain = domain or pick(rng, DOMAINS)
    action = pick(rng, domain.actions)
    text = expand(rng, pick(rng, action.phrases))
    used = {m[1] for m in GAP.finditer(text)}
    count = min(len(action.clauses), rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 3)))
    for name in rng.sample(action.clauses, count):
        clause = expand(rng, pick(rng, CLAUSES[name].split("; ")))
        keys = {m[1] for m in GAP.finditer(clause)}
        if not keys & used:
            used |= keys
            text = (
                f"{clause}, {text}"
                if rng.random() < 0.08 and name in ("day", "date", "time", "month")
                else f"{text} {clause}"
            )
    if not domain.statement and rng.random() < 0.2:
        text = pick(rng, POLITE).replace("{s}", text)
    lower = rng.random() < 0.45
    values: dict[str, str | int] = {}
    surfaces: dict[str, str] = {}

    def fill(m: re.Match) -> str:
        surface, value = FIELDS[m[2] or m[1]](rng, lex)
        if lower and surface == value:
            value = surface.lower()
        surfaces[m[1]], values[m[1]] = (surface.lower() if lower else surface), value
        return surface

    text = GAP.sub(fill, text)
    if lower:
        text = text.lower()
    else:
        for key, surface in surfaces.items():  # a copied value at the start is capitalised with its sentence
            if text.startswith(surface):
                surfaces[key] = surface[:1].upper() + surface[1:]
                values[key] = surfaces[key] if values[key] == surface else values[key]
                break
        text = text[:1].upper() + text[1:] + pick(rng, ("", ".", ".", "!"))
    return Request(domain, action, text, {k: values[k] for k in domain.keys if k in values}, surfaces)
