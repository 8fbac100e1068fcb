"""Words, made-up strings, numbers and a small phrase grammar for the instruction generators."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

COMMON = (
    "apple river stone quiet garden letter window orange simple market bridge yellow summer winter morning table "
    "paper silver forest island mountain story music number circle answer question friend doctor teacher village "
    "engine bottle pocket basket candle hammer ladder mirror needle pencil ribbon saddle ticket tunnel valley wagon "
    "butter castle desert feather guitar helmet insect jacket kitten lemon magnet napkin oyster parrot quarry rocket "
    "shadow temple velvet wallet yogurt zipper anchor branch copper donkey empire fabric glacier harbor ivory jungle "
    "walk run jump carry build write read listen watch follow open close begin finish slow fast bright dark warm cold "
    "old new long short happy angry gentle brave clever famous heavy narrow plain rapid smooth tall useful wide young"
).split()
FIRST = (
    "Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Karin Leo Maria Nils Olga Paul Quinn Rosa Samir Tara Umar "
    "Vera Walter Xenia Yusuf Zoe Alice Bruno Chen Dina Elias Fatima Georg Hana Ivan Julia Kofi Lena Mateo Nora Oscar "
    "Priya Rafael Sofia Tomas Uma Victor Wanda Yara Zane Liam Mia Noah Ella Amir Bea Cleo Dario Edith Frank"
).split()
LAST = (
    "Becker Smith Moreau Garcia Novak Rossi Tanaka Silva Khan Olsen Kowalski Meyer Brown Dubois Lopez Ito Costa Larsen "
    "Wagner Jones Petit Romero Horvat Ferrari Singh Haas Nguyen Kim Weber Clark Laurent Ortiz Fischer Lewis "
    "Walker Young"
).split()
CITIES = (
    "Berlin|Paris|Madrid|Rome|Oslo|Vienna|Prague|Lisbon|Dublin|Athens|Warsaw|Budapest|Cairo|Lagos|Nairobi|Tokyo|Seoul|"
    "Delhi|Mumbai|Sydney|Toronto|Boston|Chicago|Denver|Lima|Bogota|New York|San Diego|Cape Town|Buenos Aires|Hong Kong|"
    "Los Angeles|Rio de Janeiro|Kuala Lumpur|Geneva|Hamburg|Lyon|Porto|Seville|Naples|Turin|Bergen|Malmo|Riga|Tallinn"
).split("|")
COLORS = "red blue green yellow black white orange purple brown grey pink turquoise beige golden silver violet".split()
NOUNS = (
    "shirt jacket notebook bicycle backpack camera kettle teapot blanket pillow mug chair desk keyboard phone "
    "watch ring "
    "scarf hat umbrella wallet suitcase bottle puzzle novel guitar violin drum tent hammer drill rope ladder "
    "bucket boots "
    "gloves socks sweater cushion vase clock toaster blender headphones charger calendar poster candle basket "
    "box key coin"
).split()
GOODS_ADJ = "wooden leather cotton vintage folding portable electric handmade waterproof woollen ceramic steel".split()
ANIMALS = (
    "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse rat eagle owl parrot shark whale salmon frog "
    "snake lizard turtle ant bee spider camel donkey monkey zebra giraffe elephant penguin otter badger"
).split()
FOODS = (
    "pizza|pasta|salad|soup|burger|curry|rice bowl|noodles|fish tacos|pancakes|omelette|lentil stew|tomato soup|"
    "apple pie|cheese sandwich|mushroom risotto|chicken wrap|fried rice|lemon cake|chocolate cookies|bean chili|sushi"
).split("|")
TOPICS: Mapping[str, Sequence[str]] = {
    "animal": ANIMALS,
    "fruit": "apple banana cherry grape lemon mango orange peach pear plum melon fig kiwi apricot papaya".split(),
    "color": COLORS,
    "tool": "hammer saw drill wrench screwdriver chisel axe shovel rake pliers crowbar trowel".split(),
    "vehicle": "car bus train tram bicycle truck boat ship plane helicopter scooter van ferry taxi".split(),
    "clothing": "shirt jacket coat hat scarf gloves socks shoes boots dress skirt sweater trousers belt".split(),
    "instrument": "piano violin guitar flute drum trumpet cello harp clarinet trombone banjo oboe".split(),
    "furniture": "chair table desk bed sofa shelf cupboard stool bench wardrobe dresser".split(),
    "profession": "doctor teacher baker pilot nurse farmer lawyer carpenter plumber chef painter sailor".split(),
    "country": "France Germany Spain Italy Norway Japan Brazil Egypt Kenya Canada Peru India Poland".split(),
    "body part": "hand foot arm leg nose ear eye knee elbow shoulder finger neck chin".split(),
    "metal": "iron copper gold silver tin lead zinc nickel aluminium titanium".split(),
}
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
GLOSSES = [
    ("bakery", "noun", "a shop where bread is made and sold"), ("island", "noun", "land surrounded by water"),
    ("whisper", "verb", "to speak very quietly"), ("ancient", "adjective", "very old"),
    ("orchard", "noun", "a field of fruit trees"), ("gather", "verb", "to bring together"),
    ("fragile", "adjective", "easily broken"), ("harbor", "noun", "a sheltered place for ships"),
    ("quickly", "adverb", "at high speed"), ("repair", "verb", "to make something work again"),
]  # fmt: skip
TRANSLATIONS = {
    "German": "house=Haus dog=Hund water=Wasser bread=Brot tree=Baum book=Buch red=rot day=Tag night=Nacht milk=Milch",
    "French": "house=maison dog=chien water=eau bread=pain tree=arbre book=livre red=rouge day=jour night=nuit "
    "milk=lait",
    "Spanish": "house=casa dog=perro water=agua bread=pan tree=árbol book=libro red=rojo day=día night=noche "
    "milk=leche",
}
POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "adj": "adjective", "r": "adverb", "adv": "adverb"}

BANNED = re.compile(r"turn(ed|s|ing)? (on|off)|thermostat|phonem|shopping list")  # downstream tasks


@dataclass(frozen=True)
class Lexicon:
    """Word material: files of a lexicon folder where present, small built-in lists otherwise."""

    words: Sequence[str] = field(default_factory=lambda: COMMON)
    glosses: list[tuple[str, str, str]] = field(default_factory=lambda: GLOSSES)
    translations: dict[str, list[tuple[str, str]]] = field(
        default_factory=lambda: {
            k: [(w, t) for w, t in (p.split("=") for p in v.split())] for k, v in TRANSLATIONS.items()
        }
    )
    tokens: list[str] = field(default_factory=list)  # vocabulary pieces of a tokenizer, without the leading space

    @classmethod
    def load(cls, work: Path, tokens: list[str] | None = None) -> Lexicon:
        """Read `work`/lexicon (or `work` itself); what is missing there is left at the built-in lists."""
        folder = work / "lexicon" if (work / "lexicon").is_dir() else work
        found: dict = {"tokens": tokens or []}
        if (folder / "words.txt").exists():
            lines = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
            found["words"] = [
                w for w in (x.strip() for x in lines) if 2 <= len(w) <= 14 and not BANNED.search(w)
            ] or COMMON
        if (folder / "glosses.tsv").exists():
            rows = [
                (r[0], POS.get(r[1], r[1]), r[2])
                for r in _rows(folder / "glosses.tsv", 3)
                if 8 <= len(r[2]) <= 110 and not BANNED.search(f"{r[0]} {r[2]}")
            ]
            found["glosses"] = rows or GLOSSES
        names = {"deu": "German", "fra": "French", "spa": "Spanish"}
        pairs = {n: _rows(folder / f"eng-{c}.tsv", 2) for c, n in names.items() if (folder / f"eng-{c}.tsv").exists()}
        pairs = {n: [(r[0], r[1]) for r in rows if len(r[0]) < 30 and len(r[1]) < 40] for n, rows in pairs.items()}
        if any(pairs.values()):
            found["translations"] = {n: rows for n, rows in pairs.items() if rows}
        return cls(**found)


def _rows(path: Path, width: int) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as f:
        rows = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [r[:width] for r in rows if len(r) >= width and all(x.strip() for x in r[:width])]


# ---- phrase grammar: (a|b) alternatives, [x] optional; braces are left for the caller ----


@cache
def _parse(pattern: str) -> tuple:
    def sequence(i: int, closers: str) -> tuple[tuple, int]:
        parts: list = []
        start = i
        while i < len(pattern) and pattern[i] not in closers:
            if pattern[i] in "([":
                if i > start:
                    parts.append(pattern[start:i])
                opener, options = pattern[i], []
                end = "|)" if opener == "(" else "|]"
                while True:
                    option, i = sequence(i + 1, end)
                    options.append(option)
                    if pattern[i] == end[1]:
                        break
                if opener == "[":
                    options += [()] * len(options)
                parts.append(options)
                start = i + 1
            i += 1
        if i > start:
            parts.append(pattern[start:i])
        return tuple(parts), i

    return sequence(0, "")[0]


def _walk(rng: Random, parts: tuple, out: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        else:
            _walk(rng, part[int(rng.random() * len(part))], out)


def expand(rng: Random, pattern: str) -> str:
    """One random reading of a pattern: "(add|put) it [now]" -> "put it"."""
    out: list[str] = []
    _walk(rng, _parse(pattern), out)
    text = "".join(out)
    return re.sub(r" +", " ", text).strip() if "  " in text or text[:1] == " " or text[-1:] == " " else text


# ---- made-up material ----

_ONSET = "b br c ch d dr f fl g gl gr h j k kl l m n p pl pr r s sh sk sl st t th tr v w z qu y".split()
_VOWEL = "a e i o u ai ea oo ou ie".split()
_CODA = ["", "", "", "n", "r", "l", "s", "t", "k", "m", "nd", "sh", "x", "ck"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Item = TypeVar("Item")


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """A random item (faster than `rng.choice`)."""
    return items[int(rng.random() * len(items))]


def novel(rng: Random) -> str:
    """A made-up pronounceable word."""
    n = 1 + int(rng.random() * 3)
    return "".join(pick(rng, _ONSET) + pick(rng, _VOWEL) + (pick(rng, _CODA)) for _ in range(n))


def letters(rng: Random, low: int = 2, high: int = 8) -> str:
    """Random letters."""
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def digits(rng: Random, low: int = 2, high: int = 7) -> str:
    """Random digits."""
    return "".join(rng.choices("0123456789", k=rng.randint(low, high)))


def code(rng: Random) -> str:
    """An identifier such as XK-482."""
    shape = int(rng.random() * 4)
    if shape == 0:
        return f"{letters(rng, 2, 3).upper()}-{digits(rng, 2, 4)}"
    if shape == 1:
        return f"{letters(rng, 1, 2)}{digits(rng, 1, 4)}"
    return f"#{digits(rng, 3, 5)}" if shape == 2 else f"{novel(rng)}{digits(rng, 1, 2)}"


def word(rng: Random, lex: Lexicon) -> str:
    """A lower-case word: of the lexicon, common, or made up."""
    x = rng.random()
    return pick(rng, lex.words) if x < 0.55 else pick(rng, COMMON) if x < 0.8 else novel(rng)


def words(rng: Random, lex: Lexicon, low: int, high: int) -> list[str]:
    """Distinct words."""
    n = rng.randint(low, high)
    out: list[str] = []
    while len(out) < n:
        w = word(rng, lex)
        if w not in out:
            out.append(w)
    return out


def piece(rng: Random, lex: Lexicon) -> str:
    """What one vocabulary token may look like: a word, a fragment, a capital, a symbol, a number."""
    if lex.tokens and rng.random() < 0.7:
        return pick(rng, lex.tokens)
    x = rng.random()
    if x < 0.35:
        return word(rng, lex)
    if x < 0.6:
        return word(rng, lex)[: rng.randint(1, 5)]
    if x < 0.75:
        return word(rng, lex)[: rng.randint(2, 8)].capitalize()
    if x < 0.85:
        return letters(rng, 1, 4).upper() if x < 0.8 else letters(rng, 1, 5)
    return digits(rng, 1, 4) if x < 0.94 else pick(rng, "( [ - = + * / : # & $ \" ' -- == < > @ {".split())


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(n: int) -> str:
    """English words of 0..9999."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f" {_ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % size
    return f"{number_words(n // size)} {name}" + (
        f" {'and ' if rest < 100 else ''}{number_words(rest)}" if rest else ""
    )


def ordinal(n: int) -> str:
    """1 -> "first", 13 -> "13th"."""
    names = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
    return (
        names[n - 1]
        if n <= 10
        else f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
    )


def capital(text: str) -> str:
    """First letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def listing(rng: Random, items: list[str]) -> tuple[str, str]:
    """The items joined, and the separator."""
    sep = pick(rng, [" ", " ", ", ", ", ", "\n", " | ", "; ", " - "])
    return sep.join(items), sep


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text under a tokenizers or a transformers tokenizer."""
    if hasattr(tokenizer, "get_vocab_size"):  # tokenizers.Tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False)


def printable_tokens(tokenizer: Any) -> list[str]:
    """Vocabulary entries that decode to a space and printable ASCII, and encode back to themselves; sorted by id."""
    pieces = []
    for i in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([i])
        if (
            len(text) > 1
            and text[0] == " "
            and text.isascii()
            and text[1:].isprintable()
            and " " not in text[1:]
            and encode(tokenizer, text) == [i]
        ):
            pieces.append(text[1:])
    return pieces
